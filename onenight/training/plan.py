"""The plan: what a run will take, estimated before it starts. Tokens, memory by part, hours, and
what to change if it does not fit."""

import math
from dataclasses import dataclass

import torch

from model import CHUNK_ROWS, GPT, GPTConfig
from onenight.data.token_file import token_count
from onenight.system.device import DTYPES, choose_dtype, measure_tflops
from onenight.system.limits import available_memory, container_memory
from onenight.system.memory import GB, RESERVE, usable_memory
from onenight.system.wording import duration
from onenight.training.optimizers import state_numbers
from onenight.training.schedule import describe_schedule, schedule_warnings
from onenight.training.settings import TrainConfig, config_file_values
from onenight.training.trainer import model_args

# The settings whose product is the number of tokens in an iteration.
TOKENS_PER_ITER = ("gradient_accumulation_steps", "batch_size", "block_size")
# The narrower a model, the more work there is beside its matrix products: training reaches about
# n_embd / (n_embd + HALF_SPEED_WIDTH) of their speed, fitted to widths of 64 to 512 on a CPU
# (benchmarks/LOG.md). For 768 in bfloat16 that is 67 %; the CPU reached 57 %, and on the RTX 4070,
# rated at 58 TFLOP/s, nanoGPT was reported to reach 48 % and nanochat 84 %.
HALF_SPEED_WIDTH = {"float32": 120, "bfloat16": 370, "float16": 370}
MAX_EPOCHS = 4  # more epochs help little: Muennighoff et al., arXiv:2305.16264
FLOAT32_BYTES = 4
# Extra bytes that an eager run saves for the backward pass, for each token, block and channel, on
# a CPU.
EAGER_BYTES = {"gpt2": 0, "qwen3": 30}


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take. With several processes, it is the plan of one alone."""

    ceiling: float  # TFLOP/s of matrix products on this machine
    parameters: int
    flops_per_token: int
    tokens_per_s: float
    speed: str  # the TFLOP/s behind tokens_per_s and where they come from, in words
    iters: int
    tokens: int
    seconds: float  # the evaluations come on top, except with --hours
    memory: dict[str, float]  # bytes of each part at the peak: see predict_memory()
    fits: str  # whether the memory suffices, in words

    @property
    def peak_memory_gb(self) -> float:
        return sum(self.memory.values()) / GB


def measure_ceiling(config: TrainConfig) -> float:
    """Return the TFLOP/s of matrix products on this machine, in the number format of the run."""
    device = torch.device(config.device)
    # A plan for another card may have a number format that is slow here.
    dtype = choose_dtype("auto", device) if config.plan_vram_gb else config.dtype
    return measure_tflops(device, dtype)


def make_plan(config: TrainConfig, ceiling: float) -> Plan:
    """Return the plan of a run with resolved settings (see settings.py) on this device, whose
    matrix products reach `ceiling` TFLOP/s, or on the card that config.plan_vram_gb and
    config.plan_tflops describe. The data need not exist yet."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**model_args(config)))
    flops = model.flops_per_token()
    tflops, speed = expected_speed(config, ceiling)
    s_per_iter = flops * config.tokens_per_iter / tflops / 1e12
    iters = config.max_iters
    if config.hours:
        iters = max(1, int(config.hours * 3600 / s_per_iter))
    return Plan(
        ceiling=ceiling,
        parameters=model.get_num_params(),
        flops_per_token=flops,
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
    if not config.plan_vram_gb:
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


def expected_speed(config: TrainConfig, ceiling: float) -> tuple[float, str]:
    """Return the TFLOP/s that training is expected to reach, and where the figure comes from."""
    if config.plan_tflops:
        return config.plan_tflops, f"{config.plan_tflops:g} TFLOP/s, as given"
    efficiency = config.n_embd / (config.n_embd + HALF_SPEED_WIDTH[config.dtype])
    source = f"{efficiency:.0%} (expected) of {ceiling:.2f} TFLOP/s, measured here"
    return efficiency * ceiling, source


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
    """Return, in words, whether the memory suffices, or else the largest micro-batch for which it
    does."""
    free, name = free_memory(config)
    if free is None:
        return "unknown: this system does not report its memory"
    amount = f"{free / GB:.1f} GB free"
    peak = {}
    for size in range(1, config.batch_size + 1):
        if config.windows_per_iter % size == 0:
            peak[size] = sum(predict_memory(model, config, size).values())
    if peak[config.batch_size] <= free:
        return f"yes, in {amount} on {name}"
    fitting = [size for size in peak if peak[size] <= free]
    if not fitting:
        return (
            f"no, not even with batch_size=1: {name} has {amount}; "
            "use a smaller model or block_size"
        )
    size = max(fitting)
    return (
        f"no: {name} has {amount}; the same effective batch fits with "
        f"--batch_size={size} --gradient_accumulation_steps={config.windows_per_iter // size}"
    )


def free_memory(config: TrainConfig) -> tuple[float | None, str]:
    """Return the bytes that a run may use, None if unknown, and the name of what has them."""
    device = torch.device(config.device)
    if config.plan_vram_gb:
        return config.plan_vram_gb * GB - RESERVE, f"a card of {config.plan_vram_gb:g} GB"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return usable_memory(device, config.vram_limit_gb), name
    free = available_memory()
    if math.isinf(free):
        return None, "this machine"
    return free, "this container" if free == container_memory() else "this machine"
