"""Which optimizer updates which parameters, and how the learning rate changes over a run. Muon makes the update of a
matrix orthogonal, so that it changes all directions equally (https://kellerjordan.github.io/posts/muon/): for the
matrices of the blocks. AdamW (arXiv:1711.05101) updates everything else, or everything."""

import math

from onenight.train_config import TrainConfig

import torch

from model import GPT


def make_optimizers(model: GPT, config: TrainConfig, device: torch.device) -> dict[str, torch.optim.Optimizer]:
    """The optimizers by their names in a checkpoint: 'optimizer', nanoGPT's name, is AdamW, 'muon' is Muon."""
    groups, optimizers = parameter_groups(model, config), {}
    if config.optimizer == "muon":
        matrices, *groups = groups
        optimizers["muon"] = torch.optim.Muon([matrices], lr=config.learning_rate, momentum=0.95)
    betas, fused = (config.beta1, config.beta2), device.type in ("cuda", "cpu")
    # The gradient of a rare token's embedding is smaller than AdamW's usual 1e-8, which would stop its updates.
    eps = 1e-10 if config.embedding_lr else 1e-8
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=eps, fused=fused)
    return {"optimizer": adamw, **optimizers}


def parameter_groups(model: GPT, config: TrainConfig) -> list[dict]:
    """The matrices, with weight decay; gains and biases, without; and embeddings and head if they have a learning rate
    of their own. Each group with its name and its peak learning rate."""
    groups = {
        "matrices": {"lr": config.learning_rate, "weight_decay": config.weight_decay},
        "vectors": {"lr": config.vector_lr or config.learning_rate, "weight_decay": 0.0},
        "embedding": {"lr": config.embedding_lr, "weight_decay": 0.0},
        "head": {"lr": config.head_lr, "weight_decay": 0.0},
    }
    for name, group in groups.items():
        group |= {"name": name, "peak_lr": group["lr"], "params": []}
    for name, parameter in model.named_parameters():  # a tied head is listed under the embedding's name
        kind = "matrices" if parameter.dim() >= 2 else "vectors"
        if config.embedding_lr and ("wte" in name or "wpe" in name):
            kind = "embedding"
        if config.head_lr and name == "lm_head.weight":
            kind = "head"
        groups[kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def schedule(config: TrainConfig, iter_num: int) -> float:
    """The learning rate as a share of its peak: linear warmup, then nanoGPT's cosine down to min_lr, or, with
    warmdown_iters, constant and then linear down to it (a trapezoid: arXiv:2405.18392); min_lr after lr_decay_iters."""
    if not config.decay_lr:
        return 1.0
    if iter_num < config.warmup_iters:
        return (iter_num + 1) / (config.warmup_iters + 1)
    lowest = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    if config.warmdown_iters:
        left = (config.lr_decay_iters - iter_num) / config.warmdown_iters
        return lowest + (1 - lowest) * min(1.0, max(0.0, left))
    progress = (iter_num - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def learning_rates(config: TrainConfig, share: float) -> dict[str, float]:
    """The learning rates at that share of their peaks, by their names in the metrics."""
    peaks = {"lr": config.learning_rate, "lr_embedding": config.embedding_lr, "lr_head": config.head_lr}
    peaks["lr_vectors"] = config.vector_lr
    return {name: share * peak for name, peak in peaks.items() if peak or name == "lr"}
