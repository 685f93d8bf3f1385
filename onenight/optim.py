"""The optimizers: which one updates which parameters, and with which learning rate.

To add one, name it in settings.OPTIMIZERS, make it in make_optimizers(), and count its state in
state_numbers().
"""

import torch

from model import GPT
from onenight.muon import DISPLACEMENTS_PER_RUN, Muon
from onenight.schedule import lr_multiplier
from onenight.settings import TrainConfig

# The groups of parameters, in the order in which checkpoints list them, and the setting that is the
# peak learning rate of each.
GROUPS = {
    "matrices": "learning_rate",
    "vectors": "vector_lr",
    "embedding": "embedding_lr",
    "head": "head_lr",
}


def make_optimizers(
    model: GPT, config: TrainConfig, device: torch.device
) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers by their keys in a checkpoint; AdamW's key is nanoGPT's."""
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw":
        return {"optimizer": make_adamw(groups, config, device)}
    matrices = [group for group in groups if group["name"] == "matrices"]
    others = [group for group in groups if group["name"] != "matrices"]
    return {"muon": make_muon(matrices, config), "optimizer": make_adamw(others, config, device)}


def make_adamw(groups: list[dict], config: TrainConfig, device: torch.device):
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


def make_muon(groups: list[dict], config: TrainConfig) -> Muon:
    iters = config.max_iters  # also with --hours, whose number of iterations is not known
    return Muon(
        groups,
        lr=config.learning_rate,
        row_norm=True,
        cautious=True,
        lookahead=0.0,
        displacement_beta=1 - 1 / max(10, iters / DISPLACEMENTS_PER_RUN),
        slow_share=0.0,
    )


def parameter_groups(model: GPT, config: TrainConfig) -> list[dict]:
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


def group_of(name: str, parameter: torch.nn.Parameter, config: TrainConfig) -> str:
    """Return the group of a parameter. Embeddings and head belong to the matrices unless the
    config gives them a learning rate of their own. A tied head is listed as the embedding."""
    if parameter.dim() < 2:
        return "vectors"
    if config.embedding_lr and ("wte" in name or "wpe" in name):
        return "embedding"
    if config.head_lr and name == "lm_head.weight":
        return "head"
    return "matrices"


def state_numbers(model: GPT, config: TrainConfig) -> int:
    """Return how many float32 numbers of state the optimizers keep for the model."""
    total = 0
    for group in parameter_groups(model, config):
        for parameter in group["params"]:
            if config.optimizer == "muon" and group["name"] == "matrices":
                # three buffers, and NorMuon's number for each row or column
                total += 3 * parameter.numel() + max(parameter.shape)
            else:
                total += 2 * parameter.numel()
    return total


def set_rates(optimizers: dict[str, torch.optim.Optimizer], config: TrainConfig, fraction: float):
    """Set the learning rates of the next iteration, when `fraction` of the run is done."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr_multiplier(config, fraction, group["name"]) * group["peak_lr"]
        if isinstance(optimizer, Muon):
            optimizer.set_progress(fraction, lr_multiplier(config, fraction))


def learning_rates(
    optimizers: dict[str, torch.optim.Optimizer], config: TrainConfig
) -> dict[str, float]:
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
