"""
Generate text with a trained model.

    python sample.py --out_dir=out-fineweb-fast --start="Once upon a time"
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=1 --temperature=0
    python sample.py --out_dir=out-demo --interactive
    python sample.py --init_from=out-demo/best.pt
    python sample.py --init_from=gpt2 --start="Once upon a time"

The text goes to stdout, everything else to stderr.
"""

try:
    import onenight.startup  # isort: skip  (first: see there)  # noqa: F401
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}: keep this script next to onenight/, and run it without -P, -I or PYTHONSAFEPATH"
    ) from None

import codecs
import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import UserError, configure, setting
from model import GPT
from onenight.data.tokenizer import EOT, EOT_TEXT, encode_document
from onenight.models.checkpoint import build_model, newest_run
from onenight.models.generate import Sampling, draw_uniforms, generate, pack_matrices
from onenight.models.huggingface import resolve_checkpoint
from onenight.models.sample_printer import SamplePrinter
from onenight.system.console import run_script, set_up_output
from onenight.system.device import DTYPES, compile_if_possible, set_up_device
from onenight.system.memory import is_out_of_memory


@dataclass
class SampleConfig(Sampling):
    # which model
    init_from: str = setting(
        "resume",
        "'resume': ckpt.pt in out_dir; or a *.pt file; or a Hugging Face folder or name",
        path=True,
    )
    out_dir: str = setting(
        "", "folder of the ckpt.pt to sample from; '': the newest out*/ here", folder=True
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
    set_up_output("stderr")
    set_up_text_streams()
    config = configure(SampleConfig, arguments, __doc__)
    n_samples = 1 if config.interactive else config.num_samples

    # the model; what its loading prints must not mix with the text
    with contextlib.redirect_stdout(sys.stderr):
        device, dtype, compiled = set_up_device(config.device, config.dtype, config.compile)
        model = load_model(config, dtype).to(device)
        step = None
        if compiled:
            # On a GPU, CUDA graphs need one launch per token instead of hundreds.
            torch._inductor.config.triton.cudagraphs = True
            step = compile_if_possible(model)
        elif device.type == "cpu":
            pack_matrices(model, n_samples)

    # the samples; each interactive prompt has the next number, and so other random numbers
    try:
        for number, prompt in enumerate(read_prompts(config)):
            samples = range(number, number + n_samples)
            write_samples(model, step, config, dtype, prompt, samples)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise UserError(f"the text cannot be written: {error.strerror}")


def set_up_text_streams():
    """Make stdin and stdout accept any text, whatever their encoding."""
    if sys.stdin is None:  # closed by the program that started this one
        sys.stdin = open(os.devnull)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")


def load_model(config: SampleConfig, dtype: str) -> GPT:
    """Return the model that the config refers to. Raises UserError if it cannot be loaded."""
    if config.init_from == "resume":
        name = config.out_dir or newest_run()
    else:
        name = config.init_from
    return build_model(resolve_checkpoint(config.init_from, Path(name)), name, dtype)


def read_prompts(config: SampleConfig) -> Iterator[str]:
    """Yield the prompt of --start or, if interactive, each line that is entered."""
    if not config.interactive:
        yield read_prompt(config.start)
        return
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:  # Ctrl-D, or the end of a file
            return
        yield line


def read_prompt(start: str) -> str:
    """Return the prompt that --start refers to. Bytes that are not UTF-8 become U+FFFD. Raises
    UserError if it cannot be read, or is the name of a file."""
    if os.path.isfile(os.path.expanduser(start)):
        raise UserError(
            f"--start={start} is a file; write --start=FILE:{start} to use its content as the "
            "prompt, or --start=- to give the prompt on standard input"
        )
    name = start.removeprefix("FILE:")
    try:
        if start == "-":
            content = sys.stdin.buffer.read()
        elif start.startswith("FILE:"):
            content = Path(os.path.expanduser(name)).read_bytes()
        else:
            content = os.fsencode(start)
    except OSError as error:
        raise UserError(f"{name}: the prompt cannot be read ({error})") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{name}: the prompt is in UTF-16; save it as UTF-8")
    return content.decode("utf-8-sig", "replace").replace("\r\n", "\n")


def unescape(text: str) -> str:
    r"""Return the text with line breaks and tabs for \n and \t, as a shell passes them on, and a
    backslash for \\."""
    characters = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda escape: characters[escape[0]], text)


def encode_prompt(prompt: str) -> list[int]:
    """Return the ids of the prompt, in which <|endoftext|> is the token. An empty prompt is an
    end-of-text, after which a document starts."""
    ids = []
    for number, document in enumerate(prompt.split(EOT_TEXT)):
        if number > 0:
            ids.append(EOT)
        ids.extend(encode_document(document).tolist())
    return ids or [EOT]


def write_samples(model: GPT, step, config: SampleConfig, dtype: str, prompt: str, samples: range):
    """Print the samples of one prompt, as many at once as fit in memory. Raises UserError if not
    even one does."""
    ids = encode_prompt(prompt)
    block_size = model.config.block_size
    if len(ids) + config.max_new_tokens > block_size:
        print_once(
            f"the model's context is {block_size} tokens; each time it is full, "
            f"generation continues from the last {max(1, block_size // 2)}"
        )

    printer = SamplePrinter(prompt, samples.start, unescape(config.stop_at))
    started = time.perf_counter()
    n_tokens = 0
    n_done = 0
    at_once = len(samples)
    while n_done < len(samples):
        batch = samples[n_done : n_done + at_once]
        try:
            uniforms = draw_uniforms(config.seed, batch, config.max_new_tokens)
            tokens = generate(model, ids, uniforms, config, dtype, step)
            n_tokens += printer.print_samples(tokens, batch, config.stop)
            n_done += len(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise UserError(
                    "out of memory with a single sample; use a smaller --max_new_tokens or prompt"
                )
            at_once = len(batch) // 2
            print(
                f"out of memory with {len(batch)} samples at once: continuing with {at_once}",
                file=sys.stderr,
            )
    seconds = time.perf_counter() - started
    print(
        f"{n_tokens:,} tokens in {seconds:.1f} s: {n_tokens / seconds:,.1f} tokens/s",
        file=sys.stderr,
    )


@functools.cache
def print_once(message: str):
    print(message, file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
