"""
Generates text with a trained model.

    python sample.py --out_dir=out-fineweb-single-parquet --start="Once upon a time"
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=1 --temperature=0
    python sample.py --out_dir=out-demo --interactive
    python sample.py --init_from=out-demo/best.pt
    python sample.py --init_from=gpt2 --start="Once upon a time"

The text goes to stdout, everything else to stderr.
"""

import codecs
import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onenight.checkpoint import build_model, newest_run
from onenight.console import set_up_output
from onenight.device import DTYPES, compile_model, is_out_of_memory, set_up_device
from onenight.generate import Sampling, draw_uniforms, generate, pack_matrices
from onenight.huggingface import resolve_checkpoint
from onenight.tokenizer import EOT, EOT_TEXT, encode_document, get_encoding

import torch

from configurator import configure, setting
from model import GPT


@dataclass
class SampleConfig:
    init_from: str = setting("resume", "'resume': out_dir; or a *.pt file; or GPT-2's folder or name", path=True)
    out_dir: str = setting("", "folder of the ckpt.pt to sample from; '': the newest out*/ here", path=True)
    start: str = setting("\n", "the prompt; FILE:prompt.txt reads it from a file, - from stdin; '' starts a document")
    interactive: bool = setting(False, "ask for one prompt after another, with one sample for each")
    num_samples: int = setting(10, "samples to draw, all at once", low=1)
    max_new_tokens: int = setting(500, "tokens in each sample", low=1)
    stop: bool = setting(True, "end a sample at end-of-text; False: continue with a new document")
    temperature: float = setting(0.8, "0 always takes the likeliest token, 1 keeps the model's probabilities", low=0)
    top_k: int = setting(200, "sample from the k likeliest tokens only; 0: from all", low=0)
    top_p: float = setting(1.0, "sample from the fewest tokens that together have this probability", above=0, high=1)
    repetition_penalty: float = setting(1.0, "over 1, such as 1.1: tokens in the text become less likely", above=0)
    seed: int = setting(1337, "the same seed gives the same text", low=0)
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = setting("auto", "number format", choices=("auto", *DTYPES))
    compile: bool = setting(False, "torch.compile: slow to start, then faster")


def main(arguments: list[str]):
    set_up_output("stderr")
    sys.stdin = sys.stdin or open(os.devnull)  # closed from the start
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may not have every character
    config = configure(SampleConfig, arguments, __doc__)
    step = None
    with contextlib.redirect_stdout(sys.stderr):
        device, dtype, compiled = set_up_device(config.device, config.dtype, config.compile)
        name = (config.out_dir or newest_run()) if config.init_from == "resume" else config.init_from
        model = build_model(resolve_checkpoint(config.init_from, Path(name)), name, dtype).to(device)
        if compiled:
            torch._inductor.config.triton.cudagraphs = True  # on a GPU: one launch per token instead of hundreds
            step = compile_model(model)
        elif device.type == "cpu":
            pack_matrices(model, 1 if config.interactive else config.num_samples)
    try:
        prompts = ask() if config.interactive else [read_prompt(config.start)]
        for number, prompt in enumerate(prompts):
            samples = range(number, number + 1) if config.interactive else range(config.num_samples)
            write_samples(model, step, config, dtype, prompt, samples)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise SystemExit(f"the text cannot be written: {error.strerror}")


def read_prompt(start: str) -> str:
    """The prompt that --start means; bytes that are not UTF-8 become U+FFFD. Raises SystemExit if it cannot be read."""
    name, content = start.removeprefix("FILE:"), os.fsencode(start)
    try:
        if start == "-":
            content = sys.stdin.buffer.read()
        elif name != start:
            content = Path(name).expanduser().read_bytes()
    except (OSError, RuntimeError) as error:  # the latter for the home of an unknown user
        raise SystemExit(f"{name}: the prompt cannot be read ({error})") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SystemExit(f"{name}: the prompt is in UTF-16; save it as UTF-8")
    return content.decode("utf-8-sig", "replace").replace("\r\n", "\n")


def ask() -> Iterator[str]:
    """Yields the prompts that the user types, until the input ends."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def write_samples(model: GPT, step, config: SampleConfig, dtype: str, start: str, samples: range):
    """Writes samples of one prompt to stdout, drawn all at once, or as many at once as fit in memory. Raises SystemExit
    if not even one does."""
    prompt = [id for part in start.split(EOT_TEXT) for id in (EOT, *encode_document(part).tolist())][1:] or [EOT]
    block_size = model.config.block_size
    if len(prompt) + config.max_new_tokens > block_size:
        say_once(f"the model sees {block_size} tokens; then it continues from the last {max(1, block_size // 2)}")
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
    started, n_tokens, page, batches = time.perf_counter(), 0, Page(samples.start), [samples]
    while batches:
        batch = batches.pop(0)
        try:
            uniforms = draw_uniforms(config.seed, batch, config.max_new_tokens)
            tokens = generate(model, prompt, uniforms, sampling, dtype, step)
            n_tokens += write_batch(tokens, batch, start, page, config.stop)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise SystemExit("out of memory with a single sample; try a smaller --max_new_tokens or prompt")
            half = len(batch) // 2
            batches[:0] = [batch[:half], batch[half:]]
            print(f"out of memory with {len(batch)} samples at once: going on with {half}", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"{n_tokens:,} tokens in {seconds:.1f} s: {n_tokens / seconds:,.1f} tokens/s", file=sys.stderr)


def write_batch(tokens: Iterator[list[int]], samples: range, start: str, page: "Page", stop: bool) -> int:
    """Writes the samples token by token, each after `start`. Returns the number of tokens."""
    n_tokens, texts = 0, {sample: Text(start) for sample in samples}
    page.show(texts)
    for ids in tokens:
        for text, token in zip(texts.values(), ids):
            if not text.ended:
                n_tokens += 1
                text.add(token, stop)
        page.show(texts)
        if all(text.ended for text in texts.values()):
            break
    for text in texts.values():
        text.end()
    page.show(texts)
    return n_tokens


class Text:
    """A sample as it grows. The bytes of an incomplete character are held back until it is complete."""

    def __init__(self, start: str):
        self.text, self.ended = start, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, stop: bool):
        if stop and token == EOT:
            self.end()
        else:
            self.text += self.decoder.decode(get_encoding().decode_single_token_bytes(token))

    def end(self):
        self.text += self.decoder.decode(b"", final=True)
        self.ended = True


class Page:
    """Writes samples to stdout in their order, with a line of dashes after each."""

    def __init__(self, first: int):
        self.sample, self.shown = first, 0  # the sample being written, and how many characters of it are out

    def show(self, texts: dict[int, Text]):
        """Writes the new text of the current sample; when it has ended, the next sample with all its text so far."""
        while self.sample in texts:
            sample = texts[self.sample]
            print(sample.text[self.shown :], end="", flush=True)
            self.shown = max(self.shown, len(sample.text))
            if not sample.ended:
                return
            print("\n---------------", flush=True)
            self.sample, self.shown = self.sample + 1, 0


@functools.cache
def say_once(message: str):
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
