"""The plan: what a run will take, estimated before it starts. Tokens, memory by part, hours, and
what to change if it does not fit."""

import math
from dataclasses import dataclass

import torch

from model import CHUNK_ROWS, GPT, GPTConfig
from onenight.data.token_file import token_count
from onenight.system.cards import REACHED_PER_RATED, Speed, find_card
from onenight.system.device import DTYPES, choose_dtype, measure_bandwidth, measure_tflops
from onenight.system.limits import available_memory, container_memory
from onenight.system.memory import GB, RESERVE, usable_memory
from onenight.system.wording import duration
from onenight.training.optimizers import MUON, groups_by_optimizer, state_numbers
from onenight.training.schedule import describe_schedule, schedule_warnings
from onenight.training.settings import TrainConfig, config_file_values
from onenight.training.trainer import model_args

# The settings whose product is the number of tokens in an iteration.
TOKENS_PER_ITER = ("gradient_accumulation_steps", "batch_size", "block_size")
MAX_EPOCHS = 4  # more epochs help little: Muennighoff et al., arXiv:2305.16264
FLOAT32_BYTES = 4
NEWTON_SCHULZ_STEPS = 5  # of Muon
# Extra bytes that an eager run saves for the backward pass, for each token, block and channel, on
# a CPU.
EAGER_BYTES = {"gpt2": 0, "qwen3": 30}
# Without torch.compile each operation reads and writes memory by itself, mostly in float32: about
# this many times what the compiled kernels do. The softmax makes 8 passes over the logits, not 2.
EAGER_PASSES = 4


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take. With several processes, it is the plan of one alone."""

    ceiling: float  # TFLOP/s of matrix products on this machine
    parameters: int
    flops_per_token: int
    tokens_per_s: float
    speed: str  # the speeds behind tokens_per_s and where they come from, in words
    iters: int
    tokens: int
    seconds: float  # the evaluations come on top, except with --hours
    memory: dict[str, float]  # bytes of each part at the peak: see predict_memory()
    fits: str  # whether the memory suffices, in words

    @property
    def peak_memory_gb(self) -> float:
        return sum(self.memory.values()) / GB


def measure_ceiling(config: TrainConfig) -> Speed:
    """Return the speeds that bound training on this machine, in the number format of the run."""
    device = torch.device(config.device)
    # A plan for another card may have a number format that is slow here.
    dtype = choose_dtype("auto", device) if config.is_planned_elsewhere else config.dtype
    return Speed(measure_tflops(device, dtype), measure_bandwidth(device))


def make_plan(config: TrainConfig, ceiling: Speed) -> Plan:
    """Return the plan of a run with resolved settings (see settings.py) on this device, which
    reaches the speeds `ceiling`, or on the card that config.plan_card, or config.plan_vram_gb and
    config.plan_tflops, describe. The data need not exist yet."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**model_args(config)))
    s_per_iter, speed = predict_time(model, config, ceiling)
    iters = config.max_iters
    if config.hours:
        iters = max(1, int(config.hours * 3600 / s_per_iter))
    return Plan(
        ceiling=ceiling.tflops,
        parameters=model.get_num_params(),
        flops_per_token=model.flops_per_token(),
        tokens_per_s=config.tokens_per_iter / s_per_iter,
        speed=speed,
        iters=iters,
        tokens=iters * config.tokens_per_iter,
        seconds=iters * s_per_iter,
        memory=predict_memory(model, config, config.batch_size),
        fits=judge_fit(config, model),
    )


def print_plan(plan: Plan, config: TrainConfig, arguments: list[str]):
    """Print a plan and the settings that it is for. `arguments`: the command line, for the
    warnings."""
    if not config.is_planned_elsewhere:
        print(f"device: {describe_device(config)}")
    print(
        f"parameters: {plan.parameters / 1e6:.2f}M, "
        f"{plan.flops_per_token / 1e6:,.0f} MFLOP per token"
    )
    print(
        f"tokens: {config.tokens_per_iter:,} per iteration, {plan.iters:,} iterations, "
        f"{plan.tokens:,}; {describe_epochs(config, plan.tokens)}"
    )
    print(f"learning rate: {describe_schedule(config)}")
    parts = ", ".join(f"{part} {size / GB:.2f}" for part, size in plan.memory.items())
    print(f"memory: {plan.peak_memory_gb:.1f} GB at the peak ({parts})")
    print(f"fits: {plan.fits}")
    evaluation = "evaluation included" if config.hours else "plus evaluation"
    print(f"time: {duration(plan.seconds)} at {plan.speed}; {evaluation}")
    for warning in schedule_warnings(config) + recipe_warnings(config, arguments):
        print(f"warning: {warning}")


def describe_device(config: TrainConfig) -> str:
    device = torch.device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if device.type == "cpu" and not torch.cuda.is_available():
        name += " (torch finds no GPU: see README)"
    compiled = ", compiled" if config.compile else ""
    return f"{name}, {config.dtype}{compiled}"


def describe_epochs(config: TrainConfig, tokens: int) -> str:
    """Return how many passes over train.bin that many tokens are, in words."""
    train_bin = config.data_dir / "train.bin"
    if not train_bin.exists():
        return f"no {train_bin} yet"
    train_tokens = max(1, token_count(train_bin))
    epochs = f"{tokens / train_tokens:.2f} epochs of {train_tokens:,}"
    if tokens > MAX_EPOCHS * train_tokens:
        epochs += f" (more than {MAX_EPOCHS} epochs help little: prepare a second file as well)"
    return epochs


def recipe_warnings(config: TrainConfig, arguments: list[str]) -> list[str]:
    """Return a warning if flags change the tokens of an iteration by over 2 % from those of the
    config files."""
    from_files = config_file_values(arguments, TOKENS_PER_ITER)
    if not from_files:
        return []
    factors = [from_files.get(key, getattr(TrainConfig, key)) for key in TOKENS_PER_ITER]
    intended = math.prod(factors)
    if abs(config.tokens_per_iter - intended) <= 0.02 * intended:
        return []
    nearest = max(1, round(intended / (config.batch_size * config.block_size)))
    return [
        f"another recipe: {config.tokens_per_iter:,} tokens per iteration, where the config file "
        f"has {intended:,}; --gradient_accumulation_steps={nearest} comes nearest to it with this "
        "batch_size"
    ]


def predict_time(model: GPT, config: TrainConfig, ceiling: Speed) -> tuple[float, str]:
    """Return the seconds of an iteration, and the speeds that they follow from, in words."""
    flops = config.tokens_per_iter * model.flops_per_token()
    if config.plan_tflops:
        return flops / config.plan_tflops / 1e12, f"{config.plan_tflops:g} TFLOP/s, as given"
    if config.plan_card:
        card = find_card(config.plan_card)
        seconds = predict_seconds(model, config, card.speed)
        source = (
            f"{REACHED_PER_RATED} times the {card.name}'s rated {card.tflops:g} TFLOP/s and "
            f"{card.gb_per_s:g} GB/s"
        )
    else:
        seconds = predict_seconds(model, config, ceiling)
        source = f"{ceiling.tflops:.2f} TFLOP/s and {ceiling.gb_per_s:.0f} GB/s, measured here"
    tokens_per_s = config.tokens_per_iter / seconds
    return seconds, f"{tokens_per_s:,.0f} tokens/s, calculated from {source}"


def predict_seconds(model: GPT, config: TrainConfig, speed: Speed) -> float:
    """Return the seconds of an iteration: its FLOPs at the speed of matrix products, and the bytes
    that it moves beside them at the speed of copies.

    The FLOPs are PaLM's count. It has 12 for each channel and position that attention reads, of
    which causal attention computes 7, at about 0.6 times the speed of matrix products.
    """
    flops = config.tokens_per_iter * model.flops_per_token() + update_flops(model, config)
    moved = config.tokens_per_iter * moved_per_token(model.config, config)
    moved += weight_bytes(model, config)
    return flops / speed.tflops / 1e12 + moved / speed.gb_per_s / GB


def moved_per_token(shape: GPTConfig, config: TrainConfig) -> float:
    """Return the bytes that are read and written for each token, forward and backward, beside
    matrix products and attention. The passes are counted in the kernels that torch.compile makes
    for an RTX 4070 (benchmarks/LOG.md)."""
    # Both norms, each with the addition before it: 8 passes forward and 8 backward. Joining the
    # gradients of query, key and value: 6.
    passes = 22
    # Normalizing and rotating queries and keys, 11; adding the gradients of the MLP's input, 1.
    if shape.parts.rotary_positions:
        passes += 12
    channels = passes * shape.n_embd
    # The activation of the MLP: 2 forward and 3 backward; with a gate 3 and 5.
    passes = 8 if shape.parts.gated_mlp else 5
    channels += passes * shape.mlp_width
    # The logits are read, and their gradients written.
    numbers = shape.n_layer * channels + 2 * shape.vocab_size
    if not config.compile:
        return EAGER_PASSES * FLOAT32_BYTES * numbers
    return DTYPES[config.dtype].itemsize * numbers


def weight_bytes(model: GPT, config: TrainConfig) -> float:
    """Return the bytes that an iteration moves for the weights, however many tokens its
    micro-batches have: weights and their gradients change their number format, gradients are added
    up, and the update."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    micro_batches = config.gradient_accumulation_steps
    dtype_bytes = DTYPES[config.dtype].itemsize
    moved = 0
    # Weights are read in one format and written in the other, and so are their gradients.
    if dtype_bytes < FLOAT32_BYTES:
        moved += micro_batches * 2 * (FLOAT32_BYTES + dtype_bytes) * parameters
    # The gradients of each micro-batch after the first: two reads and a write.
    moved += (micro_batches - 1) * 3 * FLOAT32_BYTES * parameters
    # The update reads gradients, and reads and writes weights and the optimizer's state.
    numbers = 3 * parameters + 2 * state_numbers(model, config)
    return moved + FLOAT32_BYTES * numbers


def update_flops(model: GPT, config: TrainConfig) -> int:
    """Return the FLOPs of an update: Muon's, as AdamW's are negligible. It multiplies each matrix
    and its transpose, squares the product, and multiplies that by the matrix, five times."""
    flops = 0
    for group in groups_by_optimizer(model, config).get(MUON, []):
        for matrix in group["params"]:
            rows, columns = sorted(matrix.shape)
            flops += NEWTON_SCHULZ_STEPS * (4 * rows**2 * columns + 2 * rows**3)
    return flops


def predict_memory(model: GPT, config: TrainConfig, micro_batch_size: int) -> dict[str, float]:
    """Return the bytes of each part at the peak of a training step: in the head of the second
    micro-batch, when the gradients of the first exist. The activations are the tensors that
    torch.compile saves for the backward pass."""
    shape = model.config
    dtype_bytes = DTYPES[config.dtype].itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() > 1)
    tokens = micro_batch_size * shape.block_size
    activations = tokens * shape.n_layer * saved_bytes_per_token(shape, config)
    if dtype_bytes < FLOAT32_BYTES:
        activations += dtype_bytes * matrices  # the weights as the products read them
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
    bytes_per_channel = copies * dtype_bytes
    # The masks of dropout, one byte for each channel.
    if shape.dropout:
        bytes_per_channel += 2
    # The hidden layer of the MLP before and after the activation, and with a gate the gate.
    copies = 3 if shape.parts.gated_mlp else 2
    bytes_per_channel += copies * dtype_bytes * shape.mlp_width / shape.n_embd
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
        per_weight = dtype_bytes + FLOAT32_BYTES
    else:
        # Half as many rows at once, also in float32, and a summand of the weight's gradient.
        rows = min(CHUNK_ROWS // 2, tokens)
        per_weight = 2 * FLOAT32_BYTES
        per_logit = FLOAT32_BYTES
        if dtype_bytes < FLOAT32_BYTES:  # float32 is computed in place
            per_logit += 2 * dtype_bytes
    logits = rows * shape.vocab_size * per_logit
    weight = shape.vocab_size * shape.n_embd * per_weight
    inputs = 2 * tokens * shape.n_embd * dtype_bytes
    return logits + weight + inputs


def judge_fit(config: TrainConfig, model: GPT) -> str:
    """Return, in words, whether the memory suffices, and the largest micro-batch for which it does
    if that is of interest: for a listed card, or if the config's does not fit."""
    free, name = free_memory(config)
    if free is None:
        return "unknown: this system does not report its memory"
    amount = f"{free / GB:.1f} GB free"
    windows = config.windows_per_iter
    sizes = [size for size in range(1, windows + 1) if windows % size == 0]
    fitting = [size for size in sizes if sum(predict_memory(model, config, size).values()) <= free]
    if not fitting:
        return (
            f"no, not even with batch_size=1: {name} has {amount}; "
            "use a smaller model or block_size"
        )
    size = max(fitting)
    flags = f"--batch_size={size} --gradient_accumulation_steps={windows // size}"
    if config.batch_size > size:
        return f"no: {name} has {amount}; the same effective batch fits with {flags}"
    answer = f"yes, in {amount} on {name}"
    if config.plan_card:
        answer += f"; at most {flags}"
    return answer


def free_memory(config: TrainConfig) -> tuple[float | None, str]:
    """Return the bytes that a run may use, None if unknown, and the name of what has them."""
    device = torch.device(config.device)
    if config.plan_card:
        card = find_card(config.plan_card)
        return card.memory_gb * GB - RESERVE, f"an {card.name}"
    if config.plan_vram_gb:
        return config.plan_vram_gb * GB - RESERVE, f"a card of {config.plan_vram_gb:g} GB"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return usable_memory(device, config.vram_limit_gb), name
    free = available_memory()
    if math.isinf(free):
        return None, "this machine"
    return free, "this container" if free == container_memory() else "this machine"
