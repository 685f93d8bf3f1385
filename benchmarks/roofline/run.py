"""
What an RTX 4070 will be asked to do, computed on a machine without a GPU.

    python benchmarks/roofline/run.py train config/train_fineweb_4070.py --batch_size=16
    python benchmarks/roofline/run.py eval config/train_fineweb_4070.py
    python benchmarks/roofline/run.py sample config/train_fineweb_4070.py --num_samples=8
    python benchmarks/roofline/run.py eager config/train_fineweb_4070.py --dtype=float16
    python benchmarks/roofline/run.py peer --peer=../nanoGPT --batch_size=8
    python benchmarks/roofline/run.py all

Each compiles the model as the project does, for sm_89 and by the same Inductor, Triton and ptxas,
and runs one micro-batch, or one new token of each sample, with fake tensors. `eager` runs what is
not compiled: sampling, clipping and the updates. `all` does everything that a user can start with
the files in config/, in bfloat16 and in float16, and prints a table.

Set it up once, on Linux with g++, in a virtual environment of its own (6 GB):

    python3 -m venv ../roofline
    ../roofline/bin/pip install torch==2.14.1 numpy tiktoken filelock
    ../roofline/bin/pip install --no-deps torchao==0.18.0    # for --int8
    ../roofline/bin/python benchmarks/roofline/run.py train config/train_fineweb_4070.py

Exact, for torch 2.14.1: that everything compiles; the bytes of all buffers that kernels read and
write, each counted once; the FLOPs of matrix products and attention; the peak of each compiled
graph, as Inductor plans it; and the bytes of the tensors that are alive outside of the graphs. The
milliseconds are an estimate, from the card's rated speeds and the fractions of them below. They are
the same for all models, so compare rows with one another. Not counted: launching kernels, waiting
for the processor, the update, and the memory that the allocator and CUDA's libraries need besides.
CUDA graphs, which sample.py --compile uses, are not captured. What fails here fails on a card, but
no kernel is run, and fake tensors check less than real ones: their shapes, and the number formats
of the operators in counting.py's SAME_FORMAT.
"""

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import common
import pretended_card
from common import ROOT, failure_reason
from configurator import UserError, configure, setting
from counting import KINDS, Counter, FakeCard, Work
from model import GPT, GPTConfig
from onenight.data.tokenizer import EOT, VOCAB_SIZE
from onenight.models.checkpoint import build_model
from onenight.models.generate import Sampling, draw_uniforms, generate
from onenight.system.console import run_script
from onenight.system.device import autocast, compile_model, use_tf32
from onenight.system.memory import GB
from onenight.training.costs import INT8_SPEED, predict_memory
from onenight.training.int8 import use_int8
from onenight.training.optimizers import CHOICES, make_optimizers
from onenight.training.settings import TrainConfig
from onenight.training.trainer import model_args
from train import clip_and_update

DEVICE = torch.device("cuda", 0)
# The card's rated speeds, and the fraction of each that good kernels reach.
PRODUCT_FLOPS = 0.86 * 58.3e12
ATTENTION_FLOPS = 0.60 * 58.3e12
BYTES = 0.85 * 504e9


@dataclass
class RooflineConfig(TrainConfig):
    num_samples: int = setting(1, "samples at once", low=1)
    peer: str = setting("", "folder of a nanoGPT checkout", path=True)


def main(arguments: list[str]):
    commands = {
        "train": train,
        "eval": evaluate,
        "sample": sample,
        "eager": eager,
        "peer": peer,
        "all": everything,
    }
    command = arguments[0] if arguments else ""
    if command == "--help":
        configure(RooflineConfig, arguments, __doc__)  # prints it and exits
    if command not in commands:
        raise UserError(f"the first argument must be one of: {', '.join(commands)}")
    config = configure(RooflineConfig, arguments[1:], __doc__)
    if config.dtype == "auto":
        config = replace(config, dtype="bfloat16")
    pretended_card.start_with_driver()
    use_tf32(DEVICE)
    commands[command](config)


# ---- one step


def train(config: RooflineConfig):
    """Print what a micro-batch of training takes, when the gradients of an earlier one exist."""
    print_plan(*run_micro_batch("train", config), config)


def evaluate(config: RooflineConfig):
    """Print what a micro-batch of an evaluation takes."""
    run_micro_batch("eval", config)


def run_micro_batch(what: str, config: RooflineConfig) -> tuple[Counter, GPT]:
    """Print what a micro-batch takes. Return what was counted, and the model."""
    counter = Counter()
    with FakeCard(counter):
        with DEVICE:
            gpt = new_model(config)
        if config.int8:
            use_int8(gpt)
        count_micro_batch(counter, gpt, config, trains=what == "train")
    print_micro_batch(what, config, counter)
    return counter, gpt


def sample(config: RooflineConfig):
    """Print what a compiled step of sampling takes: one new token of each sample."""
    counter = Counter()
    loaded = model_for_sampling(config)
    with FakeCard(counter):
        gpt = loaded.to_empty(device=DEVICE)
        counter.start(gpt)
        with counter.uncounted():  # the prompt, and drawing; not the compiled graph
            draw_samples(gpt, config, Sampling(), n_tokens=2, step=compile_model(gpt))
    print_work("sample", config, counter, tokens=config.num_samples)


def peer(config: RooflineConfig):
    """Print what a micro-batch of nanoGPT takes, in training and in an evaluation."""
    if not Path(config.peer, "model.py").is_file():
        raise UserError(f"--peer={config.peer}: give the folder of a nanoGPT checkout")
    shape = {name: config.shape.get(name, size) for name, size in common.GPT2_SHAPE.items()}
    counter = Counter()
    for what in ("train", "eval"):
        counter.kernels.clear()
        with FakeCard(counter):
            with DEVICE:
                gpt = common.make_peer(Path(config.peer), shape)
            count_micro_batch(counter, gpt, config, trains=what == "train")
        print_micro_batch(what, config, counter)


def new_model(config: RooflineConfig) -> GPT:
    """Return the model that a run with this config trains, on torch's default device."""
    arguments = model_args(config)
    if config.init_from == "gpt2":
        arguments["vocab_size"] = VOCAB_SIZE  # OpenAI's weights, without padding
    return GPT(GPTConfig(**arguments))


def count_micro_batch(counter: Counter, gpt, config: RooflineConfig, trains: bool):
    """Run two micro-batches, and count the second: the first one compiles."""
    step = compile_model(gpt) if config.compile else gpt
    scaler = torch.amp.GradScaler("cuda", enabled=config.dtype == "float16")
    shape = (config.batch_size, config.block_size)
    ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    gpt.train(trains)
    for _ in range(2):
        counter.start(gpt)
        with torch.set_grad_enabled(trains):
            with autocast(config.dtype, DEVICE):
                _, loss = step(ids, ids)
            if trains:
                scaler.scale(loss).backward()
        del loss


def model_for_sampling(config: RooflineConfig) -> GPT:
    """Return the model as sample.py loads it, on no device yet."""
    with torch.device("meta"):
        gpt = new_model(config)
        checkpoint = {"model_args": vars(gpt.config), "model": gpt.state_dict()}
        return build_model(checkpoint, "random weights", config.dtype)


def draw_samples(gpt: GPT, config: RooflineConfig, sampling: Sampling, n_tokens: int, step=None):
    """Continue a prompt of one token."""
    uniforms = draw_uniforms(config.seed, range(config.num_samples), n_tokens)
    for _ in generate(gpt, [EOT], uniforms, sampling, config.dtype, step):
        pass


# ---- what is not compiled


SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, top_k=0),
    Sampling(top_k=50, repetition_penalty=1.1),
    Sampling(top_k=0, top_p=0.9),
    Sampling(top_k=50, top_p=0.9),
)


def eager(config: RooflineConfig):
    """Run what the project does not compile: sampling, clipping and the updates."""
    counter = Counter()
    config = replace(config, block_size=16, batch_size=2, compile=False, num_samples=2)
    loaded = model_for_sampling(config)
    with FakeCard(counter):
        gpt = loaded.to_empty(device=DEVICE)
        for sampling in SAMPLINGS:
            draw_samples(gpt, config, sampling, n_tokens=20)  # more than the context
        for optimizer in CHOICES:
            update(replace(config, optimizer=optimizer, embedding_lr=0.1, head_lr=0.1))
    print(f"eager: {len(SAMPLINGS)} ways to sample; clipping, {' and '.join(CHOICES)}")


def update(config: RooflineConfig):
    """Compute a gradient, clip it, and update the weights twice, as train.py does."""
    with DEVICE:
        gpt = new_model(config)
    trainer = SimpleNamespace(
        config=config,
        model=gpt,
        optimizers=make_optimizers(gpt, config, DEVICE),
        scaler=torch.amp.GradScaler("cuda", enabled=config.dtype == "float16"),
    )
    ids = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device=DEVICE)
    for _ in range(2):  # the first update creates the optimizers' state
        with autocast(config.dtype, DEVICE):
            _, loss = gpt(ids, ids)
        trainer.scaler.scale(loss).backward()
        clip_and_update(trainer, loss=1.0)


# ---- everything


def everything(config: RooflineConfig):
    """Print a table of all that a user can start with the files in config/."""
    print("| number format | config | command | result |\n|---|---|---|---|")
    commands = ("train", "eval", "sample", "sample --num_samples=8", "eager")
    for dtype in ("bfloat16", "float16"):
        for path in sorted(ROOT.glob("config/*.py")):
            for command in commands:
                result = outcome(*command.split(), f"config/{path.name}", f"--dtype={dtype}")
                print(f"| {dtype} | `{path.name}` | {command} | {result} |", flush=True)


def outcome(command: str, *arguments: str) -> str:
    """Return what a command of this script, in a process of its own, came to, in words."""
    process = subprocess.run(
        [sys.executable, __file__, command, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if process.returncode:
        return failure_reason(process.stderr, process.returncode)
    compiled = re.search(r"(\d+) kernels compiled", process.stdout)
    if compiled and int(compiled[1]):
        return f"compiled, {compiled[1]} kernels"
    return "runs, not compiled"


# ---- words


def print_micro_batch(what: str, config: RooflineConfig, counter: Counter):
    print_work(what, config, counter, config.batch_size * config.block_size)
    print_memory(counter)


def print_work(what: str, config: RooflineConfig, counter: Counter, tokens: int):
    """Print the kernels, bytes and FLOPs of what was counted, and how fast the card could be."""
    work = counter.work
    milliseconds = estimate_ms(work)
    moved = sum(item.bytes for item in work if item.kind == "kernels")
    flops = sum(item.flops for item in work if "products" in item.kind)
    uncompiled = [item.bytes for item in work if item.phase == "eager"]
    print(f"{what}: {describe(config, tokens)}; {len(counter.kernels)} kernels compiled for sm_89")
    print("ms: " + ", ".join(f"{kind} {value:.1f}" for kind, value in milliseconds.items()))
    print(
        f"moved by kernels: {moved / GB:.2f} GB, {moved / tokens / 1e3:,.0f} kB a token; "
        f"products: {flops / tokens / 1e6:,.0f} MFLOP a token"
    )
    print(f"outside of the graphs: {len(uncompiled)} operators, {sum(uncompiled) / GB:.2f} GB")
    print(f"tokens/s at most: {1e3 * tokens / sum(milliseconds.values()):,.0f}")


def describe(config: RooflineConfig, tokens: int) -> str:
    """Return the shape of the model and of its input, in words."""
    architecture = "nanoGPT" if config.peer else config.architecture
    return (
        f"{architecture}, {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, "
        f"{tokens:,} tokens, {config.dtype}"
    )


def estimate_ms(work: list[Work]) -> dict[str, float]:
    """Return the milliseconds of each kind of work, by the rates at the top of this file."""
    milliseconds = dict.fromkeys(KINDS, 0.0)
    for item in work:
        seconds = item.bytes / BYTES
        if item.kind == "products":
            seconds = max(seconds, item.flops / PRODUCT_FLOPS)
        elif item.kind == "int8 products":
            seconds = max(seconds, item.flops / INT8_SPEED / PRODUCT_FLOPS)
        elif item.kind == "attention":
            # Half of the FLOPs: a token attends to those before it.
            seconds = max(seconds, item.flops / 2 / ATTENTION_FLOPS)
        milliseconds[item.kind] += 1e3 * seconds
    return milliseconds


def print_memory(counter: Counter):
    """Print the most memory in use at once beside weights, gradients and optimizer."""
    peak = max(counter.peaks.values())
    print(
        f"peak beside weights, gradients and optimizer: {peak / GB:.2f} GB "
        f"({in_gb(counter.peaks)}); of these in the graphs: {in_gb(counter.graph_peaks)}"
    )


def in_gb(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GB:.2f}" for name, size in sizes.items())


def print_plan(counter: Counter, gpt: GPT, config: RooflineConfig):
    """Print what the plan predicts of this peak, and by how much it is wrong."""
    peak = max(counter.peaks.values())
    memory = predict_memory(gpt, config, config.batch_size)
    parts = {name: memory[name] for name in ("activations", "head")}
    planned = sum(parts.values())
    print(f"plan: {planned / GB:.2f} GB, {planned / peak - 1:+.1%} ({in_gb(parts)})")
    if config.compile:
        found = {"activations": counter.saved, "head": peak - counter.saved}
        print(f"found: {in_gb(found)}")


if __name__ == "__main__":
    run_script(main)
