"""The optimizers: which one updates which parameters, with which learning rate and what state.

To add one, describe it as an OptimizerKind, and say in CHOICES which groups of parameters it
updates. The settings' choices and checks, the plan, checkpoints, metrics and the model card follow
from these tables.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from model import GPT
from onenight.training.muon import Muon

# The groups of parameters, in the order in which checkpoints list them, and the setting that is the
# peak learning rate of each.
GROUPS = {
    "matrices": "learning_rate",
    "vectors": "vector_lr",
    "embedding": "embedding_lr",
    "head": "head_lr",
}
# Muon's mean displacement reaches back over about 1/32 of the schedule's iterations: in result 39
# of modded-nanogpt's track 3, over 100 of 3,150. A run with --hours has these, not its own number.
DISPLACEMENTS_PER_SCHEDULE = 32
# The settings that describe an optimizer, for the model card.
SETTINGS = ("optimizer", *GROUPS.values(), "weight_decay", "beta1", "beta2")


class OptimizerKind(NamedTuple):
    """How to build an optimizer, and what it needs."""

    checkpoint_key: str  # under which a checkpoint has its state
    build: Callable  # (parameter groups, config, device) -> torch.optim.Optimizer
    state_per_weight: int  # float32 numbers that it keeps for each weight
    has_own_scale: bool  # its learning rate suits no parameters that another optimizer updates
    state_per_row: int = 0  # and for each row of a matrix, or each column if there are more


def build_adamw(groups: list[dict], config, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101)."""
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        # Recipes with a rate for the embedding are modded-nanogpt's, which has 1e-10: the gradient
        # of a rare token is smaller than the usual 1e-8, which would suppress its updates.
        eps=1e-10 if config.embedding_lr else 1e-8,
        fused=device.type in ("cuda", "cpu"),
    )


def build_muon(groups: list[dict], config, device: torch.device) -> torch.optim.Optimizer:
    """Muon: see muon.py. schedule.py sets its lookahead and its slow momentum along the run."""
    return Muon(
        groups,
        lr=config.learning_rate,
        row_norm=True,
        cautious=True,
        lookahead=0.0,
        displacement_beta=1 - 1 / max(10, config.lr_decay_iters / DISPLACEMENTS_PER_SCHEDULE),
        slow_share=0.0,
    )


# AdamW's key is nanoGPT's.
ADAMW = OptimizerKind("optimizer", build_adamw, state_per_weight=2, has_own_scale=False)
MUON = OptimizerKind("muon", build_muon, state_per_weight=3, has_own_scale=True, state_per_row=1)

# What --optimizer=NAME means: the optimizer of each group.
CHOICES = {
    "adamw": dict.fromkeys(GROUPS, ADAMW),
    "muon": {**dict.fromkeys(GROUPS, ADAMW), "matrices": MUON},
}


def rates_missing(config) -> list[str]:
    """Return the learning rates that `config`, a TrainConfig, must set and does not: those of the
    embedding and of an untied head, if the matrices' optimizer has a scale of its own."""
    if not CHOICES[config.optimizer]["matrices"].has_own_scale:
        return []
    needed = ["embedding_lr"]
    if not config.tied_head:
        needed.append("head_lr")
    return [name for name in needed if not getattr(config, name)]


def group_of(name: str, parameter: torch.nn.Parameter, config) -> str:
    """Return the group of a parameter. Embeddings and head belong to the matrices unless the
    config gives them a learning rate of their own. A tied head is listed as the embedding."""
    if parameter.dim() < 2:
        return "vectors"
    if config.embedding_lr and ("wte" in name or "wpe" in name):
        return "embedding"
    if config.head_lr and name == "lm_head.weight":
        return "head"
    return "matrices"


def parameter_groups(model: GPT, config) -> list[dict]:
    """Return the model's parameters as torch's optimizers take them: each group with its name, its
    peak learning rate (peak_lr) and its weight decay, which only matrices have."""
    groups = {}
    for group, rate in GROUPS.items():
        peak_lr = getattr(config, rate) or config.learning_rate
        groups[group] = {
            "name": group,
            "params": [],
            "lr": peak_lr,
            "peak_lr": peak_lr,
            "weight_decay": config.weight_decay if group == "matrices" else 0.0,
        }
    for name, parameter in model.named_parameters():
        groups[group_of(name, parameter, config)]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def groups_by_optimizer(model: GPT, config) -> dict[OptimizerKind, list[dict]]:
    """Return the parameter groups that each optimizer of the config updates."""
    choice = CHOICES[config.optimizer]
    by_optimizer = {}
    for group in parameter_groups(model, config):
        by_optimizer.setdefault(choice[group["name"]], []).append(group)
    return by_optimizer


def make_optimizers(model: GPT, config, device: torch.device) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers by their keys in a checkpoint."""
    return {
        kind.checkpoint_key: kind.build(groups, config, device)
        for kind, groups in groups_by_optimizer(model, config).items()
    }


def state_numbers(model: GPT, config) -> int:
    """Return how many float32 numbers of state the optimizers keep for the model."""
    total = 0
    for kind, groups in groups_by_optimizer(model, config).items():
        for parameter in (parameter for group in groups for parameter in group["params"]):
            total += kind.state_per_weight * parameter.numel()
            total += kind.state_per_row * max(parameter.shape)
    return total


def learning_rates(optimizers: dict[str, torch.optim.Optimizer], config) -> dict[str, float]:
    """Return the present learning rates by their names in the metrics: that of the matrices, and
    those that the config sets for other groups."""
    rates = {}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            name = group["name"]
            if name == "matrices":
                rates["lr"] = group["lr"]
            elif getattr(config, GROUPS[name]):
                rates[f"lr_{name}"] = group["lr"]
    return rates
