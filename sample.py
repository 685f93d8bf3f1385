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
    init_from: str = setting("resume", "'resume': out_dir; or a *.pt file; or a Hugging Face folder or name", path=True)
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
    n_samples, step = 1 if config.interactive else config.num_samples, None
    with contextlib.redirect_stdout(sys.stderr):
        device, dtype, compiled = set_up_device(config.device, config.dtype, config.compile)
        name = (config.out_dir or newest_run()) if config.init_from == "resume" else config.init_from
        model = build_model(resolve_checkpoint(config.init_from, Path(name)), name, dtype).to(device)
        if compiled:
            torch._inductor.config.triton.cudagraphs = True  # on a GPU: one launch per token instead of hundreds
            step = compile_model(model)
        elif device.type == "cpu":
            pack_matrices(model, n_samples)
    ask = functools.partial(input, "> " if sys.stdin.isatty() else "")
    try:
        prompts = iter(ask, None) if config.interactive else [read_prompt(config.start)]
        for number, prompt in enumerate(prompts):
            write_samples(model, step, config, dtype, prompt, range(number, number + n_samples))
    except EOFError:
        pass  # no more prompts
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
            content = Path(os.path.expanduser(name)).read_bytes()
    except OSError as error:
        raise SystemExit(f"{name}: the prompt cannot be read ({error})") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SystemExit(f"{name}: the prompt is in UTF-16; save it as UTF-8")
    return content.decode("utf-8-sig", "replace").replace("\r\n", "\n")


def write_samples(model: GPT, step, config: SampleConfig, dtype: str, start: str, samples: range):
    """Writes samples of one prompt, as many at once as fit in memory. Raises SystemExit if not even one does."""
    prompt = [id for part in start.split(EOT_TEXT) for id in (EOT, *encode_document(part).tolist())][1:] or [EOT]
    block_size = model.config.block_size
    if len(prompt) + config.max_new_tokens > block_size:
        say_once(f"the model sees {block_size} tokens; then it continues from the last {max(1, block_size // 2)}")
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
    page, done, at_once = Page(start, samples.start), 0, len(samples)
    started, n_tokens = time.perf_counter(), 0
    while batch := samples[done : done + at_once]:
        try:
            uniforms = draw_uniforms(config.seed, batch, config.max_new_tokens)
            tokens = generate(model, prompt, uniforms, sampling, dtype, step)
            n_tokens += page.write(tokens, batch, config.stop)
            done += len(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise SystemExit("out of memory with a single sample; try a smaller --max_new_tokens or prompt")
            at_once = len(batch) // 2
            print(f"out of memory with {len(batch)} samples at once: going on with {at_once}", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"{n_tokens:,} tokens in {seconds:.1f} s: {n_tokens / seconds:,.1f} tokens/s", file=sys.stderr)


class Page:
    """Samples of one prompt on stdout, one below the other, each with a line of dashes after it."""

    def __init__(self, start: str, first: int):
        self.start = start.encode(errors="replace")
        self.sample, self.shown = first, 0  # the one being written, and how many of its bytes are out
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back an incomplete character

    def write(self, tokens: Iterator[list[int]], samples: range, stop: bool) -> int:
        """Writes the samples, but not again what an earlier attempt has written. Returns the number of tokens."""
        texts, growing, n_tokens = {sample: bytearray(self.start) for sample in samples}, set(samples), 0
        self.show(texts, growing)
        for ids in tokens:
            n_tokens += len(growing)
            for sample, token in zip(samples, ids):
                if stop and token == EOT:
                    growing.discard(sample)
                elif sample in growing:
                    texts[sample] += get_encoding().decode_single_token_bytes(token)
            self.show(texts, growing)
            if not growing:
                break
        self.show(texts, growing=set())
        return n_tokens

    def show(self, texts: dict[int, bytearray], growing: set[int]):
        """Writes the new text of the current sample; when it has ended, the next one with all its text so far."""
        while self.sample in texts:
            text, ended = texts[self.sample], self.sample not in growing
            print(self.decoder.decode(text[self.shown :], final=ended), end="", flush=True)
            self.shown = max(self.shown, len(text))
            if not ended:
                return
            print("\n---------------", flush=True)
            self.sample, self.shown = self.sample + 1, 0


@functools.cache
def say_once(message: str):
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
