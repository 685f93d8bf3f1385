"""The plan: what a run will take. Memory is calculated from the shapes of the tensors; speed is
measured, by running micro-batches of the real model, or for a card that is not here calculated from
its rated speed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model import CHUNK_ROWS, GPT, GPTConfig
from onenight.bins import token_count
from onenight.device import DTYPES, GB, RESERVE, peak_memory_gb
from onenight.errors import UserError
from onenight.optim import state_numbers
from onenight.schedule import SHORTEST_S, describe_schedule
from onenight.settings import TrainConfig
from onenight.trainer import Trainer, model_args
from onenight.wording import duration

MAX_EPOCHS = 4  # more epochs help little: Muennighoff et al., arXiv:2305.16264
# A job is measured this many times or for this many seconds, whichever comes first, but at least
# once.
MEASURED_TIMES = 15
MEASURED_S = 2.0
# On a CPU, instead of a micro-batch of more FLOPs, a single window is measured, not warmed up.
MAX_CPU_FLOPS = 1e12
INT8_GAIN = 1.05  # int8=auto uses int8 if an iteration is at least this many times as fast

FLOAT32_BYTES = 4
# Extra bytes that an eager run saves for the backward pass, for each token, block and channel, on
# a CPU.
EAGER_BYTES = {"gpt2": 0, "qwen3": 30}

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
    """Print what a run of resolved settings is, and whether it fits into the `free` bytes that
    `name` has."""
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
    """Return in words whether the memory suffices, and the largest micro-batch for which it
    does."""
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
        """Return the seconds of an evaluation of both splits, without its checkpoints."""
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
    do so with and without int8, and keep what is faster.

    Must come before the optimizers have a state. Leaves the weights, the optimizers, the random
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
    config = trainer.config
    windows = trainer.micro_batch_size
    compiled_model = trainer.compiled_model
    flops = windows * config.block_size * trainer.model.flops_per_token()
    is_slow = trainer.device.type == "cpu" and flops > MAX_CPU_FLOPS
    if is_slow:
        windows = 1
        trainer.compiled_model = trainer.model  # it would be compiled for this size alone
    random = torch.Generator().manual_seed(0)
    vocab_size = trainer.model.config.vocab_size
    ids = torch.randint(vocab_size, (windows, config.block_size), generator=random)
    sample_s = 0.0
    x = ids.to(trainer.device)
    y = x.clone()  # torch.compile would compile once more for two tensors that are not one
    try:
        trainer.model.train()
        if not is_slow:
            # Once to warm up. After an update the optimizers' state takes its memory, as in the
            # run.
            trainer.micro_step(x, y)
            update(trainer)
        micro_step_s = seconds_of(trainer.device, trainer.micro_step, x, y)
        update_s = seconds_of(trainer.device, update, trainer)
        trainer.model.zero_grad(set_to_none=True)
        trainer.model.eval()
        with torch.no_grad():
            if not is_slow:
                trainer.eval_step(x, y)
            eval_step_s = seconds_of(trainer.device, trainer.eval_step, x, y)
        if not is_slow:
            sample_s = seconds_of(trainer.device, trainer.sample)
    finally:
        trainer.compiled_model = compiled_model
    return Speed(micro_step_s / windows, update_s, eval_step_s / windows, sample_s)


def update(trainer: Trainer):
    """Update the weights with the gradients that there are."""
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    for optimizer in trainer.optimizers.values():
        optimizer.step()


def seconds_of(device: torch.device, job: Callable, *arguments) -> float:
    """Return the median seconds of a job."""
    times = []
    end = time.perf_counter() + MEASURED_S
    while not times or (len(times) < MEASURED_TIMES and time.perf_counter() < end):
        began = time.perf_counter()
        job(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return max(statistics.median(times), SHORTEST_S)


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
    """Return the plan of a run from its start, which has taken `elapsed_s` seconds until now."""
    config = trainer.config
    iteration_s = speed.iteration_s(trainer)
    eval_s = speed.evaluation_s(trainer)
    with_eval_s = iteration_s + eval_s / config.eval_interval
    # The first evaluation, and one at the end, which may be one of those at an interval.
    ends_s = 1.5 * eval_s
    iters = config.max_iters
    seconds = elapsed_s + iters * with_eval_s + ends_s
    if config.hours:
        seconds = config.hours * 3600
        iters = max(1, int((seconds - elapsed_s - ends_s) / with_eval_s))
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
    print(f"time: {duration(plan.seconds)}, evaluations included")


# -----------------------------------------------------------------------------
# Memory


def block_weights(model: GPT) -> int:
    """Return the number of weights in the matrices of the blocks."""
    return sum(p.numel() for p in model.transformer.h.parameters() if p.dim() > 1)


def predict_memory(model: GPT, config: TrainConfig, micro_batch_size: int) -> dict[str, float]:
    """Return the bytes of each part at the peak of a training step: in the head of the second
    micro-batch, when the gradients of the first exist. The activations are the tensors that
    torch.compile saves for the backward pass."""
    shape = model.config
    dtype_bytes = DTYPES[config.dtype].itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = micro_batch_size * shape.block_size
    activations = tokens * shape.n_layer * saved_bytes_per_token(shape, config)
    if dtype_bytes < FLOAT32_BYTES:
        activations += dtype_bytes * block_weights(model)  # the weights as the products read them
    if config.int8 is True and config.compile:
        # What the compiled graphs keep besides, by benchmarks/LOG.md.
        activations += 2 * block_weights(model)
    return {
        "weights": FLOAT32_BYTES * parameters,
        "gradients": FLOAT32_BYTES * parameters,
        "optimizer": FLOAT32_BYTES * state_numbers(model, config),
        "activations": activations,
        "head": head_bytes(shape, config, tokens),
    }


def saved_bytes_per_token(shape: GPTConfig, config: TrainConfig) -> float:
    """Return the bytes that a block saves of each token for the backward pass."""
    dtype_bytes = DTYPES[config.dtype].itemsize
    # The residual stream twice; the outputs of both norms and of attention as the linear layers
    # read them; query, key, value, and attention's output; rotated queries and keys also as they
    # were before.
    copies = 11 if shape.parts.rotary_positions else 9
    # The hidden layer of the MLP before and after the activation, and with a gate the gate.
    mlp_copies = 3 if shape.parts.gated_mlp else 2
    # With int8, none of what the linear layers read is saved: it is computed again from the rest.
    # That takes about as much memory as one of these three copies, by benchmarks/LOG.md.
    if config.int8 is True and config.compile:
        copies -= 2
        mlp_copies -= 1
    bytes_per_channel = copies * dtype_bytes
    bytes_per_channel += mlp_copies * dtype_bytes * shape.mlp_width / shape.n_embd
    # The masks of dropout, one byte for each channel.
    if shape.dropout:
        bytes_per_channel += 2
    if not config.compile:
        bytes_per_channel += EAGER_BYTES[shape.architecture]
    return bytes_per_channel * shape.n_embd


def head_bytes(shape: GPTConfig, config: TrainConfig, tokens: int) -> float:
    """Return the bytes that the head and its loss take: a chunk of logits with their gradient, the
    weight as the products read it with its gradient, and the input of the head with its
    gradient."""
    dtype_bytes = DTYPES[config.dtype].itemsize
    if config.compile:
        rows = min(CHUNK_ROWS, tokens)
        per_logit = 2 * dtype_bytes
    else:
        # Half as many rows at once, also in float32.
        rows = min(CHUNK_ROWS // 2, tokens)
        per_logit = FLOAT32_BYTES
        if dtype_bytes < FLOAT32_BYTES:  # float32 is computed in place
            per_logit += 2 * dtype_bytes
    per_weight = dtype_bytes + FLOAT32_BYTES
    logits = rows * shape.vocab_size * per_logit
    weight = shape.vocab_size * shape.n_embd * per_weight
    inputs = 2 * tokens * shape.n_embd * dtype_bytes
    return logits + weight + inputs
