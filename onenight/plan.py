"""The plan: the time and memory that a run will take. Its speed is measured on micro-batches of
the real model or, for a card that is not in this machine, calculated from the card's rating."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model import GPT, GPTConfig
from onenight.bins import token_count
from onenight.device import GB, RESERVE, peak_memory_gb
from onenight.errors import UserError
from onenight.memory import predict_memory
from onenight.schedule import SHORTEST_S, describe_schedule
from onenight.settings import TrainConfig
from onenight.trainer import Trainer, model_args
from onenight.wording import duration

MAX_EPOCHS = 4  # more epochs help little: Muennighoff et al., arXiv:2305.16264
# Each job is measured this many times, or fewer if that takes longer than this many seconds on
# average, but at least once. On a shared machine, a second or two would say little.
MEASURED_TIMES = 50
MEASURED_S = 3.0
# On a CPU, if a micro-batch needs more FLOPs than this, one window is measured, without warming up.
MAX_CPU_FLOPS = 1e12
INT8_GAIN = 1.05  # int8=auto uses int8 if an iteration is at least this many times as fast

# -----------------------------------------------------------------------------
# A card that is not here


@dataclass(frozen=True)
class Card:
    name: str
    memory_gb: float  # its GiB, counted as GB: the difference is for the driver and the desktop
    tflops: float  # dense products in bfloat16 that sum in float32, as NVIDIA rates it
    reported: str = ""  # what other programs were reported to reach, with about 124M parameters


# From NVIDIA's white papers on the architectures (Ampere GA102, Ada, RTX Blackwell). Cards that
# they leave out have twice their float32 TFLOP/s, as the others do: 4 x cores x boost clock. What
# was reported: docs/cards.md.
CARDS = (
    Card("RTX 3060", 12, 25.5),
    Card("RTX 3090", 24, 71.2, "12,000 to 20,000 tokens/s"),
    Card("RTX 4060 Ti 16 GB", 16, 44.1),
    Card("RTX 4070", 12, 58.3, "55,700 tokens/s"),
    Card("RTX 4070 Ti SUPER", 16, 88.2),
    Card("RTX 4080", 16, 97.5),
    Card("RTX 4090", 24, 165.2, "93,000 to 110,000 tokens/s"),
    Card("RTX 5060 Ti 16 GB", 16, 47.4),
    Card("RTX 5070", 12, 61.7),
    Card("RTX 5080", 16, 112.6),
    Card("RTX 5090", 32, 209.5),
)
# How much of a card's rated speed training reaches: nanochat's d12 was reported to train 55,700
# tokens/s of 887 MFLOP on an RTX 4070, which is 49.4 TFLOP/s of 58.3.
REACHED_OF_RATED = 0.85


def find_card(name: str) -> Card:
    """Return the card of that name; case and spaces do not matter. Raises UserError."""
    for card in CARDS:
        if card.name.replace(" ", "").lower() == name.replace(" ", "").lower():
            return card
    listed = ", ".join(card.name for card in CARDS)
    raise UserError(f"plan_card={name!r} is not one of {listed}")


def print_card_plan(config: TrainConfig):
    """Print the plan of resolved settings for config.plan_card."""
    card = find_card(config.plan_card)
    with torch.device("meta"):
        model = GPT(GPTConfig(**model_args(config)))
    tokens_per_s = REACHED_OF_RATED * card.tflops * 1e12 / model.flops_per_token()
    print_outline(model, config, card.memory_gb * GB - RESERVE, f"an {card.name}")
    line = f"{tokens_per_s:,.0f} tokens/s, calculated from {REACHED_OF_RATED} times the rated "
    line += f"{card.tflops} TFLOP/s, as nanochat was reported to reach on an RTX 4070"
    if card.reported:
        line += f"; with about 124M parameters, others reported {card.reported}"
    print(f"speed: {line}")
    seconds = config.max_iters * config.tokens_per_iter / tokens_per_s
    if config.hours:
        seconds = config.hours * 3600
        iters = seconds * tokens_per_s / config.tokens_per_iter
        print(f"iterations: {iters:,.0f}, {iters * config.tokens_per_iter:,.0f} tokens")
    print(f"time: {duration(seconds)}, without evaluations")


# -----------------------------------------------------------------------------
# What needs no measurement


def print_outline(model: GPT, config: TrainConfig, free: float | None, name: str):
    """Print what a run with these resolved settings is, and whether it fits into the `free` bytes
    of memory that `name` has."""
    per_token = model.flops_per_token() / 1e6
    print(f"parameters: {model.get_num_params() / 1e6:.2f}M, {per_token:,.0f} MFLOP per token")
    line = f"tokens: {config.tokens_per_iter:,} per iteration"
    if not config.hours:
        line += f", {config.max_iters:,} iterations, "
        line += describe_tokens(config, config.max_iters * config.tokens_per_iter)
    print(line)
    print(f"learning rate: {describe_schedule(config)}")
    memory = predict_memory(model, config, config.batch_size)
    parts = ", ".join(f"{part} {size / GB:.2f}" for part, size in memory.items())
    print(f"memory: {sum(memory.values()) / GB:.1f} GB at the peak ({parts})")
    print(f"fits: {judge_fit(model, config, free, name)}")


def describe_tokens(config: TrainConfig, tokens: int) -> str:
    """Return a number of tokens, and how many passes over train.bin they are, in words."""
    train_bin = config.data_dir / "train.bin"
    if not train_bin.exists():
        return f"{tokens:,} tokens (no {train_bin} yet)"
    train_tokens = max(1, token_count(train_bin))
    epochs = tokens / train_tokens
    words = f"{tokens:,} tokens, {epochs:.2f} epochs of {train_tokens:,}"
    if epochs > MAX_EPOCHS:
        words += f" (more than {MAX_EPOCHS} epochs help little: prepare more text)"
    return words


def judge_fit(model: GPT, config: TrainConfig, free: float | None, name: str) -> str:
    """Return in words whether the memory is enough, and the largest micro-batch for which it
    is."""
    if free is None:
        return "unknown: this system does not report its memory"
    sizes = [2**i for i in range(10)]
    fitting = [size for size in sizes if sum(predict_memory(model, config, size).values()) <= free]
    amount = f"{free / GB:.1f} GB free on {name}"
    if not fitting:
        return f"no, not even with --batch_size=1, in {amount}: use a smaller model or block_size"
    does_fit = sum(predict_memory(model, config, config.batch_size).values()) <= free
    return f"{'yes' if does_fit else 'no'}, in {amount}; at most --batch_size={max(fitting)}"


# -----------------------------------------------------------------------------
# Speed, measured


@dataclass(frozen=True)
class Speed:
    """What the parts of a run take in this process, in seconds."""

    micro_step_s: float  # a window, forward and backward
    update_s: float
    eval_step_s: float  # a window, forward
    sample_s: float = 0.0  # the sample of an evaluation

    def iteration_s(self, trainer: Trainer) -> float:
        windows = trainer.windows_per_iter / trainer.ranks.world_size
        return windows * self.micro_step_s + self.update_s

    def evaluation_s(self, trainer: Trainer) -> float:
        """Return the seconds of an evaluation of both splits, without its checkpoints and
        picture."""
        config = trainer.config
        tokens = 0
        for split in ("train", "val"):
            path = config.data_dir / f"{split}.bin"
            size = token_count(path) if path.exists() else config.eval_tokens
            tokens += min(size, config.eval_tokens)
        windows = tokens / config.block_size / trainer.ranks.world_size
        return windows * self.eval_step_s + self.sample_s


def measure(trainer: Trainer) -> Speed:
    """Run micro-batches and updates as the run will, and return how long they take. With int8=auto,
    do so with and without int8, and keep the faster.

    Call this before the first update. Leaves the weights, the optimizers, the random
    numbers of the run and the order of the data as they were. If memory runs out, the micro-batch
    is halved, as in training.
    """
    weights = [parameter.detach().to("cpu", copy=True) for parameter in trainer.model.parameters()]
    speed = trainer.within_memory(measure_steps, trainer)
    if trainer.config.int8 == "auto":
        micro_batch_size = trainer.micro_batch_size
        trainer.set_int8(True)
        with_int8 = trainer.within_memory(measure_steps, trainer)
        is_faster = gains_enough(speed.iteration_s(trainer), with_int8.iteration_s(trainer))
        is_faster = bool(trainer.ranks.from_first(is_faster))
        trainer.set_int8(is_faster)
        if is_faster:
            speed = with_int8
        else:
            trainer.micro_batch_size = micro_batch_size
    with torch.no_grad():
        for parameter, weight in zip(trainer.model.parameters(), weights):
            parameter.copy_(weight)
    for optimizer in trainer.optimizers.values():
        optimizer.state.clear()
    trainer.model.zero_grad(set_to_none=True)
    return speed


def gains_enough(without_s: float, with_int8_s: float) -> bool:
    """Return whether int8 makes an iteration so much faster that it is used, and print it."""
    gain = without_s / with_int8_s
    is_faster = gain >= INT8_GAIN
    print(f"int8: {gain:.2f} times as fast as without, {'used' if is_faster else 'not used'}")
    return is_faster


def measure_steps(trainer: Trainer) -> Speed:
    """Measure forward and backward, the update and the forward pass of an evaluation."""
    windows = trainer.micro_batch_size
    compiled_model = trainer.compiled_model
    flops = windows * trainer.config.block_size * trainer.model.flops_per_token()
    is_slow = trainer.device.type == "cpu" and flops > MAX_CPU_FLOPS
    if is_slow:
        windows = 1
        trainer.compiled_model = trainer.model  # compiling would be for this size alone
    jobs = steps_of(trainer, windows)
    sample_s = 0.0
    try:
        if not is_slow:
            # Once to warm up, and to allocate the optimizers' state.
            for job in [trainer.sample, *jobs]:
                job()
            [sample_s] = seconds_of([trainer.sample], trainer.device)
        micro_step_s, update_s, eval_step_s = seconds_of(jobs, trainer.device)
    finally:
        trainer.compiled_model = compiled_model
    return Speed(micro_step_s / windows, update_s, eval_step_s / windows, sample_s)


def steps_of(trainer: Trainer, windows: int) -> list[Callable]:
    """Return the parts of a run that take its time, with random ids: forward and backward of so
    many windows, the update, and the forward pass of an evaluation."""
    random = torch.Generator().manual_seed(0)
    shape = (windows, trainer.config.block_size)
    ids = torch.randint(trainer.model.config.vocab_size, shape, generator=random)
    x = ids.to(trainer.device)
    y = x.clone()  # as in training; one tensor passed twice would be compiled on its own

    def micro_step():
        trainer.model.train()
        trainer.micro_step(x, y)

    def update():
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        for optimizer in trainer.optimizers.values():
            optimizer.step()

    def eval_step():
        trainer.model.eval()
        with torch.no_grad():
            trainer.eval_step(x, y)

    return [micro_step, update, eval_step]


def seconds_of(jobs: list[Callable], device: torch.device) -> list[float]:
    """Return the mean seconds of each job: a run pays for its slow moments too, which a median
    would leave out. They run in turn, so that a slow phase of the machine affects all alike."""
    times = {job: [] for job in jobs}
    n = 0
    end = time.perf_counter() + MEASURED_S * len(jobs)
    while n == 0 or (n < MEASURED_TIMES and time.perf_counter() < end):
        n += 1
        for job in jobs:
            began = time.perf_counter()
            job()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times[job].append(time.perf_counter() - began)
    return [max(statistics.fmean(seconds), SHORTEST_S) for seconds in times.values()]


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take, evaluations included."""

    tokens_per_s: float
    eval_s: float  # of an evaluation
    iters: int
    tokens: int
    seconds: float
    peak_memory_gb: float


def make_plan(trainer: Trainer, speed: Speed, elapsed_s: float) -> Plan:
    """Return the plan of the whole run, which has taken `elapsed_s` seconds until now."""
    config = trainer.config
    done = trainer.progress.iter_num
    iteration_s = speed.iteration_s(trainer)
    eval_s = speed.evaluation_s(trainer)
    with_eval_s = iteration_s + eval_s / config.eval_interval
    # The first evaluation and, on average, half of one at the end, which may be at an interval.
    ends_s = (0.5 if done else 1.5) * eval_s
    iters = max(done, config.max_iters)
    seconds = elapsed_s + (iters - done) * with_eval_s + ends_s
    if config.hours:
        seconds = config.hours * 3600
        iters = max(1, done + int((seconds - elapsed_s - ends_s) / with_eval_s))
    memory = predict_memory(trainer.model, config, trainer.micro_batch_size)
    return Plan(
        tokens_per_s=config.tokens_per_iter / iteration_s,
        eval_s=eval_s,
        iters=iters,
        tokens=iters * config.tokens_per_iter,
        seconds=seconds,
        peak_memory_gb=sum(memory.values()) / GB,
    )


def print_plan(trainer: Trainer, plan: Plan):
    config = trainer.config
    peak, _ = peak_memory_gb(trainer.device)
    if peak:
        print(f"measured: {peak:.1f} GB at the peak with --batch_size={trainer.micro_batch_size}")
    print(
        f"speed: {plan.tokens_per_s:,.0f} tokens/s, measured; "
        f"an evaluation takes {duration(plan.eval_s)}"
    )
    if config.hours:
        print(f"iterations: {plan.iters:,}, {describe_tokens(config, plan.tokens)}")
    line = f"time: {duration(plan.seconds)}, evaluations included"
    if trainer.progress.iter_num:
        line += f"; {duration(trainer.progress.elapsed_s)} of it have passed"
    print(line)
