"""
What changes the weights: which optimizer has which parameters, and how its learning rate goes over a run.

Muon (https://kellerjordan.github.io/posts/muon/) makes the update of a matrix orthogonal, so that it moves all its
directions alike: for the matrices of the blocks. AdamW (arXiv:1711.05101) has everything else, or everything.
"""

import math

import torch

from model import GPT
from train_config import TrainConfig

MOMENTUM = 0.95  # Muon's, as in its author's runs


def make_optimizers(model: GPT, config: TrainConfig, device: torch.device) -> dict[str, torch.optim.Optimizer]:
    """The optimizers by the names that they have in a checkpoint: 'optimizer', nanoGPT's, is AdamW, 'muon' Muon."""
    groups, optimizers = parameter_groups(model, config), {}
    if config.optimizer == "muon":
        matrices, *groups = groups
        optimizers["muon"] = torch.optim.Muon([matrices], lr=config.learning_rate, momentum=MOMENTUM)
    betas, fused = (config.beta1, config.beta2), device.type in ("cuda", "cpu")
    # The gradient of an embedding that is rarely seen is smaller than AdamW's usual 1e-8, which would stop it.
    eps = 1e-10 if config.embedding_lr else 1e-8
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=eps, fused=fused)
    return {"optimizer": adamw, **optimizers}


def parameter_groups(model: GPT, config: TrainConfig) -> list[dict]:
    """
    The matrices, which decay; the vectors, which do not; and embeddings and head where they have a learning rate of
    their own. Each group with its name and its peak learning rate.
    """
    groups = {
        "matrices": {"lr": config.learning_rate, "weight_decay": config.weight_decay},
        "vectors": {"lr": config.vector_lr or config.learning_rate, "weight_decay": 0.0},
        "embedding": {"lr": config.embedding_lr, "weight_decay": 0.0},
        "head": {"lr": config.head_lr, "weight_decay": 0.0},
    }
    for name, group in groups.items():
        group |= {"name": name, "peak_lr": group["lr"], "params": []}
    for name, parameter in model.named_parameters():  # a head that is tied has the embedding's name
        kind = "matrices" if parameter.dim() >= 2 else "vectors"
        if config.embedding_lr and ("wte" in name or "wpe" in name):
            kind = "embedding"
        if config.head_lr and name == "lm_head.weight":
            kind = "head"
        groups[kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def schedule(config: TrainConfig, iter_num: int) -> float:
    """
    The learning rate as a share of its peak: linear warmup, then nanoGPT's cosine down to min_lr, or, with
    warmdown_iters, constant and at last linear down to it (a trapezoid: arXiv:2405.18392); after lr_decay_iters min_lr.
    """
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
    """At that share of their peaks, by their names in the metrics."""
    peaks = {"lr": config.learning_rate, "lr_embedding": config.embedding_lr, "lr_head": config.head_lr}
    return {name: share * peak for name, peak in peaks.items() if peak or name == "lr"}
