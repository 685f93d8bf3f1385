"""What a run will take, before it starts: tokens, memory by part, hours; and what to change if it does not fit."""

import math
import os

from onenight.device import DTYPES, GB, RESERVE, usable_memory
from onenight.files import duration
from onenight.train_config import TrainConfig
from onenight.trainer import model_args

import torch

from configurator import read_config_file
from model import CHUNK_ROWS, GPT, GPTConfig

TOKENS_PER_ITER = ("gradient_accumulation_steps", "batch_size", "block_size")  # the settings whose product it is
# A narrow model has more work beside its matrix products: training reaches about n_embd / (n_embd + NARROW) of their
# speed, fitted to widths of 64 to 512 on a CPU (benchmarks/LOG.md). For 768 in bfloat16 that is 67 %; the CPU reached
# 57 %, and on the RTX 4070, rated at 58 TFLOP/s, nanoGPT was reported to reach 48 % and nanochat 84 %.
NARROW = {"float32": 120, "bfloat16": 370, "float16": 370}
MAX_EPOCHS = 4  # Muennighoff et al., arXiv:2305.16264
EAGER = {"gpt2": 0, "qwen3": 30}  # bytes more for each token, block and channel without torch.compile, on a CPU


def print_plan(config: TrainConfig, device: torch.device, dtype: str, ceiling: float):
    """Prints what the run will take on this device, whose matrix products reach `ceiling` TFLOP/s, or on the one that
    config.plan_vram_gb and config.plan_tflops describe. The bins need not exist yet."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**model_args(config)))
    if config.plan_vram_gb and config.dtype == "auto":
        dtype = "bfloat16"  # whatever this machine has
    speed, source = config.plan_tflops, f"{config.plan_tflops:g} TFLOP/s, as given"
    if not speed:
        share = config.n_embd / (config.n_embd + NARROW[dtype])
        speed, source = ceiling * share, f"{share:.0%} (expected) of {ceiling:.2f} TFLOP/s, measured here"
    s_per_iter = model.flops_per_token() * config.tokens_per_iter / speed / 1e12
    iters = max(1, int(config.hours * 3600 / s_per_iter)) if config.hours else config.max_iters
    total, train_bin = iters * config.tokens_per_iter, config.data_dir / "train.bin"
    epochs = f"no {train_bin} yet"
    if train_bin.exists():
        train_tokens = train_bin.stat().st_size // 2
        epochs = f"{total / max(train_tokens, 1):.2f} epochs of {train_tokens:,}"
        if total > MAX_EPOCHS * train_tokens:
            epochs += f" (over {MAX_EPOCHS} the same text teaches little more: prepare a second file as well)"
    memory = predict_memory(model, config.batch_size, dtype, config.optimizer, config.compile)
    parts = ", ".join(f"{part} {size / GB:.2f}" for part, size in memory.items())
    if not config.plan_vram_gb:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        remark = " (torch finds no GPU: see README)" if (config.device, device.type) == ("auto", "cpu") else ""
        print(f"device: {name}{remark}, {dtype}{', compiled' if config.compile else ''}")
    print(f"parameters: {model.get_num_params() / 1e6:.2f}M, {model.flops_per_token() / 1e6:,.0f} MFLOP per token")
    print(f"tokens: {config.tokens_per_iter:,} per iteration, {iters:,} iterations, {total:,}; {epochs}")
    print(f"memory: {sum(memory.values()) / GB:.1f} GB at the peak ({parts})")
    print(f"fits: {judge_fit(config, model, device, dtype)}")
    print(f"time: {duration(iters * s_per_iter)} at {source}; evaluations come on top")


def recipe_warning(config: TrainConfig, arguments: list[str]) -> str:
    """A line if flags change the tokens of an iteration, by over 2 %, from those of the config files; else ''."""
    from_files = {}
    for argument in arguments:
        if argument.endswith(".py") and not argument.startswith("--"):
            from_files |= read_config_file(argument, TOKENS_PER_ITER)
    intended = math.prod(from_files.get(key, getattr(TrainConfig, key)) for key in TOKENS_PER_ITER)
    if not from_files or abs(config.tokens_per_iter - intended) <= 0.02 * intended:
        return ""
    nearest = max(1, round(intended / (config.batch_size * config.block_size)))
    return (
        f"another recipe: {config.tokens_per_iter:,} tokens per iteration, where the config file has {intended:,}; "
        f"--gradient_accumulation_steps={nearest} comes nearest to it with this batch_size\n"
    )


def predict_memory(model: GPT, batch_size: int, dtype: str, optimizer="adamw", compiled=True) -> dict[str, float]:
    """Bytes by part at the peak of a training step: in the head of the second micro-batch, when there are gradients of
    the first. The activations are the tensors that torch.compile saves for the backward pass."""
    shape, narrow, wide = model.config, DTYPES[dtype].itemsize, 4
    parameters = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(parameter.numel() for parameter in model.transformer.h.parameters() if parameter.dim() > 1)
    # Of each token in each block: the residual stream twice in float32; two norms and attention's output as the linear
    # layers read them, query, key, value and attention's output; rotated ones also as they were before; and the MLP's
    # width before and after the activation, with a gate three times.
    saved = 2 * wide + (3 + 4 + 2 * shape.parts.rotary) * narrow + (2 if shape.dropout else 0)
    saved += (3 if shape.parts.gated else 2) * narrow * shape.mlp_width / shape.n_embd
    saved += 0 if compiled else EAGER[shape.architecture]
    tokens = batch_size * shape.block_size
    # The head's logits with their gradient, and its weight as it is read with its gradient. Without torch.compile half
    # as many rows at once, but also in float32, and a summand of the weight's gradient.
    rows, per_logit, per_weight = min(CHUNK_ROWS, tokens), 2 * narrow, narrow + wide
    if not compiled:
        rows, per_weight = min(CHUNK_ROWS // 2, tokens), 2 * wide
        per_logit = wide + 2 * narrow if narrow < wide else wide  # float32 is computed in place
    return {
        "weights": wide * parameters,
        "gradients": wide * parameters,
        "optimizer": wide * (2 * parameters - (matrices if optimizer == "muon" else 0)),  # Muon has one moment
        "activations": tokens * shape.n_layer * saved * shape.n_embd + (narrow * matrices if narrow < wide else 0),
        "head": shape.vocab_size * (rows * per_logit + shape.n_embd * per_weight) + 2 * tokens * shape.n_embd * narrow,
    }


def judge_fit(config: TrainConfig, model: GPT, device: torch.device, dtype: str) -> str:
    """Whether the memory is sufficient, or else the largest micro-batch for which it is."""
    if config.plan_vram_gb:
        free, name = config.plan_vram_gb * GB - RESERVE, f"a card of {config.plan_vram_gb:g} GB"
    elif device.type == "cuda":
        free, name = usable_memory(device, config.vram_limit_gb), torch.cuda.get_device_name(device)
    elif hasattr(os, "sysconf"):
        free, name = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"
    else:
        return "unknown: this system does not tell its memory"
    windows = config.batch_size * config.gradient_accumulation_steps
    sizes = [size for size in range(1, config.batch_size + 1) if windows % size == 0]
    peak = {size: sum(predict_memory(model, size, dtype, config.optimizer, config.compile).values()) for size in sizes}
    fitting = [size for size in sizes if peak[size] <= free]
    if config.batch_size in fitting:
        return f"yes, in {free / GB:.1f} GB free on {name}"
    if not fitting:
        return f"no, not even with batch_size=1: {name} has {free / GB:.1f} GB free; shrink the model or block_size"
    change = f"--batch_size={fitting[-1]} --gradient_accumulation_steps={windows // fitting[-1]}"
    return f"no: {name} has {free / GB:.1f} GB free; the same training fits with {change}"
