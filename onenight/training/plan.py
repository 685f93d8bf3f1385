"""The plan: what a run will take, estimated before it starts. Tokens, memory by part, hours, and
what to change if it does not fit."""

import math
from dataclasses import dataclass

import torch

from model import GPT, GPTConfig
from onenight.data.token_file import token_count
from onenight.system.cards import REACHED_PER_RATED, Speed, find_card
from onenight.system.device import choose_dtype, measure_bandwidth, measure_tflops
from onenight.system.limits import available_memory, container_memory
from onenight.system.memory import GB, RESERVE, usable_memory
from onenight.system.wording import duration
from onenight.training.costs import INT8_SPEED, int8_gain, predict_memory, predict_seconds
from onenight.training.schedule import describe_schedule, expected_eval_s, schedule_warnings
from onenight.training.settings import TrainConfig, config_file_values
from onenight.training.trainer import EVAL_TOKENS, model_args

# The settings whose product is the number of tokens in an iteration.
TOKENS_PER_ITER = ("gradient_accumulation_steps", "batch_size", "block_size")
MAX_EPOCHS = 4  # more epochs help little: Muennighoff et al., arXiv:2305.16264


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
    """Return the speeds that bound training on this machine, in the number format of the run, or on
    the card that the plan is for."""
    if config.plan_card:
        return find_card(config.plan_card).speed
    device = torch.device(config.device)
    # A plan for another card may have a number format that is slow here.
    dtype = choose_dtype("auto", device) if config.is_planned_elsewhere else config.dtype
    return Speed(measure_tflops(device, dtype), measure_bandwidth(device))


def make_plan(config: TrainConfig, ceiling: Speed) -> Plan:
    """Return the plan of a run with resolved settings (see settings.py) on the device or card that
    they name, which reaches the speeds `ceiling`. The data need not exist yet."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**model_args(config)))
    s_per_iter, speed = predict_time(model, config, ceiling)
    iters = config.max_iters
    seconds = iters * s_per_iter
    if config.hours:
        seconds = config.hours * 3600
        eval_s = expected_eval_s(config, 2 * config.eval_iters * EVAL_TOKENS, s_per_iter)
        iters = max(1, int(seconds / (s_per_iter + eval_s / config.eval_interval)))
    return Plan(
        ceiling=ceiling.tflops,
        parameters=model.get_num_params(),
        flops_per_token=model.flops_per_token(),
        tokens_per_s=config.tokens_per_iter / s_per_iter,
        speed=speed,
        iters=iters,
        tokens=iters * config.tokens_per_iter,
        seconds=seconds,
        memory=predict_memory(model, config, config.batch_size),
        fits=judge_fit(config, model),
    )


def print_plan(plan: Plan, config: TrainConfig, arguments: list[str], world_size: int):
    """Print a plan and the settings that it is for. `arguments`: the command line, for the
    warnings. `world_size`: the processes of the run."""
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
    if world_size > 1:
        print(f"this plan is for one process; {world_size} processes share the windows")
    for warning in schedule_warnings(config) + recipe_warnings(config, arguments):
        print(f"warning: {warning}")


def describe_device(config: TrainConfig) -> str:
    device = torch.device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if device.type == "cpu" and not torch.cuda.is_available():
        name += " (torch finds no GPU: see README)"
    int8 = ", int8" if config.int8 else ""
    compiled = ", compiled" if config.compile else ""
    return f"{name}, {config.dtype}{int8}{compiled}"


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
    seconds = predict_seconds(model, config, ceiling)
    tokens_per_s = config.tokens_per_iter / seconds
    source = f"{ceiling.tflops:.2f} TFLOP/s and {ceiling.gb_per_s:.0f} GB/s, measured here"
    if config.plan_card:
        card = find_card(config.plan_card)
        source = (
            f"{REACHED_PER_RATED} times the {card.name}'s rated {card.tflops:g} TFLOP/s and "
            f"{card.gb_per_s:g} GB/s"
        )
    if int8_gain(model, config):
        source += f" (int8 products: {INT8_SPEED} times as fast)"
    return seconds, f"{tokens_per_s:,.0f} tokens/s, calculated from {source}"


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
