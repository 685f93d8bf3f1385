"""
Writes text with a trained model.

    python sample.py --out_dir=out-fineweb-single-parquet --start="Once upon a time"
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=1 --temperature=0
    python sample.py --out_dir=out-demo --interactive
    python sample.py --init_from=out-demo/best.pt
    python sample.py --init_from=gpt2 --start="Once upon a time"

The text goes to stdout, all else to stderr.
"""

import codecs
import functools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin longer crawl on a busy machine
import torch

from backend import choose_device, choose_dtype, compile_model, use_tf32
from configurator import configure, setting
from generate import Taste, chances, generate
from model import GPT
from pretrained import build_model, load_weights
from tokenizer import EOT, EOT_TEXT, get_encoding


@dataclass
class SampleConfig:
    init_from: str = setting("resume", "'resume': out_dir; or a *.pt file; or GPT-2: a Hugging Face folder or name")
    out_dir: str = setting("out", "folder of the ckpt.pt to sample from")
    start: str = setting("\n", "the prompt; FILE:prompt.txt reads it from a file, - from stdin; '' starts a document")
    interactive: bool = setting(False, "ask for one prompt after another, each for one sample")
    num_samples: int = setting(10, "samples to draw, all at once")
    max_new_tokens: int = setting(500, "tokens in each sample")
    stop: bool = setting(True, "end a sample at end-of-text; False: go on with a new document")
    temperature: float = setting(0.8, "0 always takes the likeliest token, 1 samples the model as it is")
    top_k: int = setting(200, "sample from the k likeliest tokens only; 0: from all")
    top_p: float = setting(1.0, "sample from the likeliest tokens only that together have this probability")
    repetition_penalty: float = setting(
        1.0, "more than 1, such as 1.1, makes tokens that are there already less likely"
    )
    seed: int = setting(1337, "the same seed, the same text")
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = setting("auto", "'auto', 'float32', 'bfloat16', 'float16'")
    compile: bool = setting(False, "torch.compile: slow to start, then faster")

    def __post_init__(self):
        problems = [f"{key} must be at least 1" for key in ("num_samples", "max_new_tokens") if getattr(self, key) < 1]
        not_negative = ("temperature", "top_k", "seed")
        problems += [f"{key} must not be negative" for key in not_negative if getattr(self, key) < 0]
        if not 0 < self.top_p <= 1:
            problems.append("top_p must be more than 0, and at most 1")
        if self.repetition_penalty <= 0:
            problems.append("repetition_penalty must be more than 0")
        if problems:
            raise ValueError("\n".join(problems))


def main(arguments: list[str]):
    config = configure(SampleConfig, arguments, __doc__)
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show every character
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    use_tf32(device)
    name = config.out_dir if config.init_from == "resume" else config.init_from
    model = build_model(load_weights(config.init_from, Path(config.out_dir)), name, dtype).to(device)
    step = None
    if config.compile:
        torch._inductor.config.triton.cudagraphs = True  # on a GPU: one launch for a token instead of hundreds
        step = compile_model(model, device)
    try:
        prompts = ask() if config.interactive else [read_prompt(config.start)]
        for number, prompt in enumerate(prompts):
            samples = range(number, number + 1) if config.interactive else range(config.num_samples)
            write_samples(model, step, config, dtype, prompt, samples)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # who reads the text has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_prompt(start: str) -> str:
    """The prompt that --start means. Raises SystemExit if it cannot be read."""
    try:
        if start == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(start[5:]).read_text(encoding="utf-8") if start.startswith("FILE:") else start
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{start.removeprefix('FILE:')}: the prompt cannot be read ({error})") from None


def ask() -> Iterator[str]:
    """One prompt after another from whoever types them, until the input ends."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def write_samples(model: GPT, step, config: SampleConfig, dtype: str, start: str, samples: range):
    """
    Writes samples of one prompt to stdout, drawn all at once, or as many at once as the memory holds. Raises
    SystemExit if it does not hold one.
    """
    prompt = get_encoding().encode(start, allowed_special={EOT_TEXT}) or [EOT]
    block_size = model.config.block_size
    if len(prompt) + config.max_new_tokens > block_size:
        say_once(f"the model sees {block_size} tokens; past them, it goes on from the last {max(1, block_size // 2)}")
    taste = Taste(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
    started, n_tokens, page, batches = time.perf_counter(), 0, Page(samples.start), [samples]
    while batches:
        batch = batches.pop(0)
        try:
            chance = chances(config.seed, batch, config.max_new_tokens)
            tokens = generate(model, prompt, chance, taste, dtype, step)
            n_tokens += write_batch(tokens, batch, start, page, config.stop)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise SystemExit(
                    "out of memory with a single sample; take a smaller max_new_tokens or a shorter prompt"
                )
            half = len(batch) // 2
            batches[:0] = [batch[:half], batch[half:]]
            print(f"out of memory with {len(batch)} samples at once: going on with {half}", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"{n_tokens:,} tokens in {seconds:.1f} s: {n_tokens / seconds:,.1f} tokens/s", file=sys.stderr)


def write_batch(tokens: Iterator[list[int]], samples: range, start: str, page: "Page", stop: bool) -> int:
    """Writes the samples as their tokens come, each after `start`. Returns how many tokens they took."""
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
    """A sample as it grows: the bytes of an unfinished character are held back until the others come."""

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
    """What stands on stdout: the samples in their order, a line of dashes after each."""

    def __init__(self, first: int):
        self.sample, self.shown = first, 0  # the sample being written, and how many of its characters are

    def show(self, texts: dict[int, Text]):
        """Writes what is new of the sample being written. Once it has ended, the next follows with all it has."""
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
