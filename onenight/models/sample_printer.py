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

    def __init__(self, prompt: str, first: int):
        """`first` is the number of the sample that is printed first."""
        self.prompt = prompt.encode(errors="replace")
        self.sample = first
        self.n_printed = 0  # bytes of that sample
        # Holds back the bytes of an incomplete character.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def print_samples(self, tokens: Iterator[list[int]], samples: range, stop: bool) -> int:
        """Print the samples as `tokens` yields the next id of each. Return the number of tokens.

        With `stop`, a sample ends at its first end-of-text. Text that an earlier call has already
        printed is not repeated, so that an interrupted generation can be started again.
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
                else:
                    texts[sample] += get_encoding().decode_single_token_bytes(token)
            self.print_new_text(texts, growing)
            if not growing:
                break
        self.print_new_text(texts, growing=set())
        return n_tokens

    def print_new_text(self, texts: dict[int, bytearray], growing: set[int]):
        """Print what is new in the current sample, and after its end what there is of the next."""
        while self.sample in texts:
            text = texts[self.sample]
            complete = self.sample not in growing
            print(self.decoder.decode(text[self.n_printed :], final=complete), end="", flush=True)
            self.n_printed = max(self.n_printed, len(text))
            if not complete:
                return
            print(SEPARATOR, end="", flush=True)
            self.sample += 1
            self.n_printed = 0
