"""Samples on stdout, as they are generated."""

import codecs
from collections.abc import Iterator

from onenight.data.tokenizer import EOT, get_encoding

SEPARATOR = "\n---------------\n"


class SamplePrinter:
    """Prints several samples of one prompt, one after the other, each followed by a line of dashes.

    The samples are generated at the same time. The current one is printed token by token; the
    others follow when it is complete.
    """

    def __init__(self, prompt: str, first: int, stop_at: str = ""):
        """`first` is the number of the sample that is printed first. A sample ends before the first
        `stop_at` in what the model adds to the prompt, if it is not empty."""
        self.prompt = prompt.encode(errors="replace")
        self.stop_at = stop_at.encode(errors="replace")
        self.sample = first
        self.n_printed = 0  # bytes of that sample
        # Holds back the bytes of an incomplete character.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def print_samples(self, tokens: Iterator[list[int]], samples: range, stop: bool) -> int:
        """Print the samples as `tokens` yields the next id of each. Return the number of tokens.

        With `stop`, a sample also ends at its first end-of-text. Text that an earlier call has
        already printed is not repeated, so that an interrupted generation can be started again.
        """
        texts = {sample: bytearray(self.prompt) for sample in samples}
        growing = set(samples)
        n_tokens = 0
        self.print_new_text(texts, growing)
        for ids in tokens:
            n_tokens += len(growing)
            for sample, token in zip(samples, ids):
                if sample not in growing:
                    continue
                if stop and token == EOT:
                    growing.remove(sample)
                    continue
                piece = get_encoding().decode_single_token_bytes(token)
                texts[sample] += piece
                if self.cut_at_stop(texts[sample], len(piece)):
                    growing.remove(sample)
            self.print_new_text(texts, growing)
            if not growing:
                break
        self.print_new_text(texts, growing=set())
        return n_tokens

    def cut_at_stop(self, text: bytearray, n_new: int) -> bool:
        """Cut a text, whose last `n_new` bytes are new, before `stop_at`. Return whether it has
        one."""
        if not self.stop_at:
            return False
        # It may begin in the text that was there before.
        begin = max(len(self.prompt), len(text) - n_new - len(self.stop_at) + 1)
        found = text.find(self.stop_at, begin)
        if found < 0:
            return False
        del text[found:]
        return True

    def printable_end(self, text: bytearray) -> int:
        """Return the length of a growing text without the end that may become `stop_at`."""
        longest = min(len(self.stop_at) - 1, len(text) - len(self.prompt))
        for length in range(longest, 0, -1):
            if text.endswith(self.stop_at[:length]):
                return len(text) - length
        return len(text)

    def print_new_text(self, texts: dict[int, bytearray], growing: set[int]):
        """Print what is new in the current sample, and after its end what there is of the next."""
        while self.sample in texts:
            text = texts[self.sample]
            complete = self.sample not in growing
            end = len(text) if complete else self.printable_end(text)
            new = text[self.n_printed : end]
            print(self.decoder.decode(new, final=complete), end="", flush=True)
            self.n_printed = max(self.n_printed, end)
            if not complete:
                return
            print(SEPARATOR, end="", flush=True)
            self.sample += 1
            self.n_printed = 0
