"""
Generate text with a trained model.

    python sample.py --out_dir=out-fineweb-fast --start="Once upon a time"
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=1 --temperature=0
    python sample.py --out_dir=out-demo --interactive
    python sample.py --init_from=out-demo/best.pt
    python sample.py --init_from=gpt2 --start="Once upon a time"

The text goes to stdout, everything else to stderr.
"""

from onenight.startup import run_script

import codecs
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import configure, setting
from model import GPT
from onenight.checkpoint import build_model, open_checkpoint
from onenight.device import DTYPES, compile_model, set_up_device
from onenight.errors import UserError
from onenight.generate import Sampling, generate
from onenight.tokenizer import EOT, EOT_TEXT, encode_documents, get_encoding

SEPARATOR = "\n---------------\n"


@dataclass
class SampleConfig(Sampling):
    # which model
    init_from: str = setting(
        "resume",
        "'resume': ckpt.pt in out_dir; or a *.pt file; or a Hugging Face folder or name",
        path=True,
    )
    out_dir: str = setting(
        "", "folder of the ckpt.pt to sample from; '': the newest out*/ here", path=True
    )
    # what to generate
    start: str = setting(
        "\n", "the prompt; FILE:prompt.txt: from a file; -: from stdin; '': a new document"
    )
    interactive: bool = setting(False, "ask for one prompt after another, with one sample for each")
    num_samples: int = setting(10, "number of samples, generated at the same time", low=1)
    max_new_tokens: int = setting(500, "tokens in each sample", low=1)
    stop: bool = setting(True, "end a sample at end-of-text; False: continue with a new document")
    stop_at: str = setting(
        "", r"end a sample before this text, for example '\n\n', an empty line; '': do not"
    )
    seed: int = setting(1337, "the same seed gives the same text", low=0)
    # machine
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = setting("auto", "data type for computing", choices=("auto", *DTYPES))
    compile: bool = setting(False, "use torch.compile: slow to start, then faster")


def main(arguments: list[str]):
    use_utf8()
    config, _ = configure(SampleConfig, arguments, __doc__)

    # The model; what its loading prints must not mix with the text
    with contextlib.redirect_stdout(sys.stderr):
        device, dtype, compiled = set_up_device(config.device, config.dtype, config.compile)
        name, checkpoint = open_checkpoint(config.init_from, config.out_dir)
        model = build_model(checkpoint, name, dtype).to(device)
        step = None
        if compiled:
            # On a GPU, CUDA graphs need one launch per token instead of hundreds.
            torch._inductor.config.triton.cudagraphs = True
            step = compile_model(model)

    # The samples; each interactive prompt has other random numbers
    try:
        for number, prompt in enumerate(read_prompts(config)):
            write_samples(model, step, config, dtype, prompt, config.seed + number)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise UserError(f"{error.filename or 'the text'}: {error.strerror}")


def use_utf8():
    """Make stdin and stdout UTF-8, whatever the locale, unless they are a terminal, which shows
    characters of its own encoding."""
    sys.stdin = sys.stdin or open(os.devnull)  # None if it was closed when the process started
    sys.stdout = sys.stdout or open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout):
        encoding = stream.encoding if stream.isatty() else "utf-8"
        stream.reconfigure(encoding=encoding, errors="replace")


# -----------------------------------------------------------------------------
# Prompts


def read_prompts(config: SampleConfig) -> Iterator[str]:
    """Yield the prompt of --start or, if interactive, each line that is entered."""
    if not config.interactive:
        yield read_prompt(config.start)
        return
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:  # Ctrl-D, or the end of a file
            return


def read_prompt(start: str) -> str:
    """Return the prompt that --start refers to. Raises OSError if it cannot be read."""
    if start == "-":
        return sys.stdin.read()
    if not start.startswith("FILE:"):
        return unescape(start)
    path = Path(start.removeprefix("FILE:")).expanduser()
    return path.read_bytes().decode("utf-8-sig", "replace").replace("\r\n", "\n")


def unescape(text: str) -> str:
    r"""Return the text with line breaks and tabs for \n and \t, as a shell passes them on, and a
    backslash for \\."""
    characters = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda escape: characters[escape[0]], text)


def encode_prompt(prompt: str) -> list[int]:
    """Return the ids of the prompt, in which <|endoftext|> is the token. An empty prompt is an
    end-of-text, after which a document starts."""
    documents = [document.encode("utf-8", "surrogatepass") for document in prompt.split(EOT_TEXT)]
    ids, _ = encode_documents(documents)
    return ids[:-1].tolist() or [EOT]  # without the end of the last document


# -----------------------------------------------------------------------------
# Samples


def write_samples(model: GPT, step, config: SampleConfig, dtype: str, prompt: str, seed: int):
    """Print the samples of one prompt, each followed by a line of dashes: the first one token by
    token, the others when it is complete."""
    ids = encode_prompt(prompt)
    block_size = model.config.block_size
    if len(ids) + config.max_new_tokens > block_size:
        print(
            f"the model's context is {block_size} tokens; each time it is full, "
            f"generation continues from the last {max(1, block_size // 2)}",
            file=sys.stderr,
        )
    n_samples = 1 if config.interactive else config.num_samples
    samples = [Sample(prompt, config.stop, unescape(config.stop_at)) for _ in range(n_samples)]

    started = time.perf_counter()
    n_tokens = 0
    n_printed = 0  # samples that are complete and printed
    for tokens in generate(model, ids, n_samples, config.max_new_tokens, config, seed, dtype, step):
        n_tokens += sum(not sample.is_complete for sample in samples)
        for sample, token in zip(samples, tokens):
            sample.add(token)
        n_printed = print_samples(samples, n_printed)
        if n_printed == n_samples:
            break
    for sample in samples:
        sample.is_complete = True
    print_samples(samples, n_printed)
    seconds = time.perf_counter() - started
    print(
        f"{n_tokens:,} tokens in {seconds:.1f} s: {n_tokens / seconds:,.1f} tokens/s",
        file=sys.stderr,
    )


def print_samples(samples: list["Sample"], n_printed: int) -> int:
    """Print what is new in the first sample that is not complete, after those before it. Return how
    many samples are complete and printed."""
    for sample in samples[n_printed:]:
        print(sample.take(), end="", flush=True)
        if not sample.is_complete:
            break
        print(SEPARATOR, end="", flush=True)
        n_printed += 1
    return n_printed


class Sample:
    """The text of a sample while it grows. It ends at end-of-text, with `stop`, and before the
    first `stop_at` in what the model adds to the prompt, if that is not empty."""

    def __init__(self, prompt: str, stop: bool, stop_at: str):
        self.text = bytearray(prompt.encode(errors="replace"))
        self.stop = stop
        self.stop_at = stop_at.encode()
        self.is_complete = False
        self.searched = len(self.text)  # bytes that have no stop_at after the prompt
        self.taken = 0  # bytes that take() has returned
        # Holds back the bytes of an incomplete character.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int):
        """Add a token, unless the sample is complete."""
        if self.is_complete:
            return
        if self.stop and token == EOT:
            self.is_complete = True
            return
        self.text += get_encoding().decode_single_token_bytes(token)
        if self.stop_at:
            found = self.text.find(self.stop_at, self.searched)
            if found >= 0:
                del self.text[found:]
                self.is_complete = True
            # The end may be the beginning of stop_at.
            self.searched = max(self.searched, len(self.text) - len(self.stop_at) + 1)

    def take(self) -> str:
        """Return what can be printed since the last call: of a sample that grows, not the end that
        may become stop_at."""
        end = len(self.text)
        if self.stop_at and not self.is_complete:
            end = max(self.taken, self.searched)
        new = self.text[self.taken : end]
        self.taken = end
        return self.decoder.decode(new, final=self.is_complete)


if __name__ == "__main__":
    run_script(main, outputs=["stderr"])  # text that cannot be written ends the script
