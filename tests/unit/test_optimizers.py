"""optimizers.py: which optimizer updates which parameters, at which rate, with what state."""

import pytest
import torch

from helpers import MUON, make_trainer, step
from model import GPT, GPTConfig
from onenight.training.muon import Muon
from onenight.training.optimizers import (
    CHOICES,
    learning_rates,
    make_optimizers,
    state_numbers,
)
from onenight.training.schedule import set_rates
from onenight.training.settings import TrainConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}


def make(**settings):
    """Return a config with `settings`, its model, and its optimizers by name."""
    config = TrainConfig(**SHAPE, **settings)
    model = GPT(GPTConfig(**config.shape, vocab_size=64))
    return config, model, make_optimizers(model, config, torch.device("cpu"))


def groups_of(optimizer):
    """Return the optimizer's parameter groups by name."""
    return {group["name"]: group for group in optimizer.param_groups}


def names_in(group, model):
    """Return the names of the parameters in a group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def names_with(model, condition):
    """Return the names of the model's parameters for which condition(name, parameter) holds."""
    return {name for name, parameter in model.named_parameters() if condition(name, parameter)}


# -----------------------------------------------------------------------------
# Groups


def test_adamw_decays_matrices_but_not_vectors():
    settings = {"weight_decay": 0.3, "learning_rate": 3e-4, "beta1": 0.8, "beta2": 0.99}
    _, model, optimizers = make(bias=True, **settings)
    assert optimizers.keys() == {"optimizer"}
    groups = groups_of(optimizers["optimizer"])
    assert groups.keys() == {"matrices", "vectors"}
    vectors = names_with(model, lambda name, _: ".ln_" in name or name.endswith(".bias"))
    assert names_in(groups["vectors"], model) == vectors
    assert names_in(groups["matrices"], model) == names_with(model, lambda *_: True) - vectors
    assert groups["matrices"]["weight_decay"] == 0.3
    assert groups["vectors"]["weight_decay"] == 0.0
    for group in groups.values():
        assert group["lr"] == 3e-4
        assert group["betas"] == (0.8, 0.99)
        assert group["eps"] == 1e-8


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest():
    _, model, optimizers = make(**MUON, weight_decay=0.05)
    assert isinstance(optimizers["muon"], Muon)
    assert isinstance(optimizers["optimizer"], torch.optim.AdamW)

    (matrices,) = optimizers["muon"].param_groups
    is_matrix = names_with(model, lambda name, value: ".h." in name and value.dim() == 2)
    assert names_in(matrices, model) == is_matrix
    assert matrices["lr"] == 0.02
    assert matrices["weight_decay"] == 0.05
    assert matrices["row_norm"]
    assert matrices["cautious"]

    groups = groups_of(optimizers["optimizer"])
    assert groups.keys() == {"vectors", "embedding", "head"}
    is_vector = names_with(model, lambda name, value: value.dim() == 1)
    assert names_in(groups["vectors"], model) == is_vector
    assert names_in(groups["embedding"], model) == {"transformer.wte.weight"}
    assert names_in(groups["head"], model) == {"lm_head.weight"}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "vectors": 0.01,
        "embedding": 0.3,
        "head": 0.004,
    }
    for group in groups.values():
        assert group["weight_decay"] == 0.0
        assert group["eps"] == 1e-10  # the gradients of rare tokens' embeddings are tiny


def test_with_muon_adamw_updates_gpt2s_embeddings_and_vectors():
    _, model, optimizers = make(**{**MUON, "architecture": "gpt2", "head_lr": 0.0})
    (matrices,) = optimizers["muon"].param_groups
    groups = groups_of(optimizers["optimizer"])
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight"}
    vectors = names_with(model, lambda name, _: ".ln_" in name)
    assert names_in(groups["embedding"], model) == embeddings
    assert names_in(groups["vectors"], model) == vectors
    rest = names_with(model, lambda *_: True) - embeddings - vectors
    assert names_in(matrices, model) == rest


# -----------------------------------------------------------------------------
# Updates


def test_the_mean_displacement_follows_the_schedule_and_not_an_extended_run():
    for max_iters in (6400, 9000):
        _, _, optimizers = make(**MUON, max_iters=max_iters, lr_decay_iters=6400)
        (matrices,) = optimizers["muon"].param_groups
        assert matrices["displacement_beta"] == pytest.approx(1 - 1 / 200)


def test_each_update_of_muon_has_the_size_of_its_learning_rate(bins):
    """Muon's updates do not depend on the size of the gradient, unlike those of plain SGD."""
    trainer = make_trainer(bins, **MUON, grad_clip=0.0, weight_decay=0.0)
    weight = trainer.model.transformer.h[0].attn.c_proj.weight
    # The head starts at zero, and passes no gradient to the blocks before its first update.
    step(trainer)
    before = weight.detach().clone()
    step(trainer, lr_multiplier=0.5)
    change = torch.linalg.svdvals(weight.detach() - before)
    # The singular values of an orthogonal matrix are 1. Muon's author gives 0.5 to 1.5 for his
    # approximation.
    assert 0.5 * 0.01 < change.median() < 1.5 * 0.01


def test_the_learning_rates_are_a_multiple_of_their_peaks():
    config, _, optimizers = make(**MUON, warmup_iters=3, max_iters=100)
    set_rates(optimizers, config, 0)
    set_rates(optimizers, config, 1)  # half of the peaks, not of the last ones
    rates = {}
    for optimizer in optimizers.values():
        for name, group in groups_of(optimizer).items():
            rates[name] = group["lr"]
    assert rates == {"matrices": 0.01, "vectors": 0.005, "embedding": 0.15, "head": 0.002}
    assert learning_rates(optimizers, config) == {
        "lr": 0.01,
        "lr_vectors": 0.005,
        "lr_embedding": 0.15,
        "lr_head": 0.002,
    }


def test_only_the_rates_that_are_set_are_recorded():
    config, _, optimizers = make(learning_rate=1e-3, embedding_lr=1e-2)
    assert learning_rates(optimizers, config) == {"lr": 1e-3, "lr_embedding": 1e-2}


# -----------------------------------------------------------------------------
# State


@pytest.mark.parametrize("settings", [{}, MUON], ids=["adamw", "muon"])
def test_the_predicted_state_is_what_the_optimizers_keep(settings, bins):
    trainer = make_trainer(bins, **settings)
    step(trainer)
    numbers = 0
    for optimizer in trainer.optimizers.values():
        for state in optimizer.state.values():
            numbers += sum(value.numel() for value in state.values() if value.dim() > 0)
    assert state_numbers(trainer.model, trainer.config) == numbers


def test_an_optimizer_needs_only_its_row_in_the_table(bins, monkeypatch):
    """A third optimizer is trained with and saved without a change anywhere else."""
    from onenight.training.optimizers import GROUPS, OptimizerKind

    def build(groups, config, device):
        return torch.optim.SGD(groups, momentum=0.9)

    sgd = OptimizerKind("sgd", build, state_per_weight=1, has_own_scale=False)
    monkeypatch.setitem(CHOICES, "sgd", dict.fromkeys(GROUPS, sgd))
    trainer = make_trainer(bins, optimizer="sgd")
    before = trainer.model.lm_head.weight.detach().clone()
    step(trainer)
    assert not torch.equal(trainer.model.lm_head.weight, before)
    saved = trainer.checkpoint()
    assert saved.keys() >= {"model", "sgd"}
    assert state_numbers(trainer.model, trainer.config) == trainer.model.get_num_params(False)
    resumed = make_trainer(bins, optimizer="sgd")
    resumed.restore(saved)
    assert step(resumed) == step(trainer)
