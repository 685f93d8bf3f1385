"""optim.py and muon.py: which optimizer updates which parameters, at which rates, and how."""

import pytest
import torch

from helpers import MUON
from model import GPT, GPTConfig
from onenight.muon import Muon
from onenight.optim import learning_rates, make_optimizers, set_rates
from onenight.settings import TrainConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}


def make(**settings):
    """Return a config with `settings`, its model, and its optimizers by name."""
    config = TrainConfig(**SHAPE, **settings)
    model = GPT(GPTConfig(**config.shape, vocab_size=64))
    return config, model, make_optimizers(model, config, torch.device("cpu"))


def groups_of(optimizers):
    """Return the parameter groups of all optimizers by name."""
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    return {group["name"]: group for group in groups}


def names_in(group, model):
    """Return the names of the parameters in a group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def names_with(model, condition):
    """Return the names of the model's parameters for which condition(name, parameter) holds."""
    return {name for name, parameter in model.named_parameters() if condition(name, parameter)}


# -----------------------------------------------------------------------------
# Groups and rates


def test_adamw_decays_matrices_but_not_vectors():
    settings = {"weight_decay": 0.3, "learning_rate": 3e-4, "beta1": 0.8, "beta2": 0.99}
    _, model, optimizers = make(bias=True, **settings)
    assert optimizers.keys() == {"optimizer"}  # nanoGPT's key in a checkpoint
    groups = groups_of(optimizers)
    assert groups.keys() == {"matrices", "vectors"}
    vectors = names_with(model, lambda name, _: ".ln_" in name or name.endswith(".bias"))
    assert names_in(groups["vectors"], model) == vectors
    assert names_in(groups["matrices"], model) == names_with(model, lambda *_: True) - vectors
    assert groups["matrices"]["weight_decay"] == 0.3
    assert groups["vectors"]["weight_decay"] == 0.0
    for group in groups.values():
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.99), 1e-8)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(architecture):
    _, model, optimizers = make(**{**MUON, "architecture": architecture}, weight_decay=0.05)
    assert isinstance(optimizers["muon"], Muon)
    assert isinstance(optimizers["optimizer"], torch.optim.AdamW)
    (matrices,) = optimizers["muon"].param_groups
    is_matrix = names_with(model, lambda name, value: ".h." in name and value.dim() == 2)
    assert names_in(matrices, model) == is_matrix
    assert matrices["weight_decay"] == 0.05

    groups = groups_of({"optimizer": optimizers["optimizer"]})
    is_vector = names_with(model, lambda name, value: value.dim() == 1)
    assert names_in(groups.pop("vectors"), model) == is_vector
    if architecture == "qwen3":
        assert names_in(groups.pop("head"), model) == {"lm_head.weight"}
        assert names_in(groups.pop("embedding"), model) == {"transformer.wte.weight"}
    else:  # the head is the embedding
        embeddings = {"transformer.wte.weight", "transformer.wpe.weight"}
        assert names_in(groups.pop("embedding"), model) == embeddings
    assert not groups
    for group in optimizers["optimizer"].param_groups:
        assert group["weight_decay"] == 0.0
        assert group["eps"] == 1e-10  # the gradients of rare tokens' embeddings are tiny


def test_each_group_has_its_own_rate_and_the_metrics_name_it():
    config, _, optimizers = make(
        **MUON, warmup_iters=3, max_iters=100, warmdown=0.4, matrix_warmdown=0.8, min_lr=0.0
    )
    peaks = {"matrices": 0.02, "vectors": 0.01, "embedding": 0.3, "head": 0.004}
    for fraction, matrices, others in ((0.0, 0.25, 0.25), (0.01, 0.5, 0.5), (0.8, 0.25, 0.5)):
        set_rates(optimizers, config, fraction)  # multiples of the peaks, not of the last ones
        for name, group in groups_of(optimizers).items():
            multiple = matrices if name == "matrices" else others
            assert group["lr"] == pytest.approx(multiple * peaks[name])
    assert learning_rates(optimizers, config) == pytest.approx(
        {"lr": 0.005, "lr_vectors": 0.005, "lr_embedding": 0.15, "lr_head": 0.002}
    )


def test_lookahead_and_slow_momentum_have_their_parts_of_the_run():
    """The lookahead from 500/3150 to 2400/3150, the slow momentum from 1000/3250 on, and the mean
    displacement over a 32nd of the iterations."""
    settings = {"max_iters": 6400, "warmup_iters": 0, "warmdown": 0.5, "min_lr": 0.0}
    config, _, optimizers = make(**MUON, **settings)
    (group,) = optimizers["muon"].param_groups
    assert group["displacement_beta"] == pytest.approx(1 - 1 / 200)
    lookaheads = []
    shares = []
    for fraction in (0, 0.15, 0.16, 0.30, 0.31, 0.5, 0.75, 0.762):
        set_rates(optimizers, config, fraction)
        lookaheads.append(group["lookahead"])
        shares.append(group["slow_share"])
    # The lookahead follows the learning rate.
    assert lookaheads == pytest.approx([0.0, 0.0, 0.6, 0.6, 0.6, 0.6, 0.3, 0.0])
    assert shares == [0.0] * 4 + [0.5615] * 4


# -----------------------------------------------------------------------------
# Muon

# More of one shape than are updated at once, and tall and wide ones between them.
SHAPES = [(16, 16)] * 5 + [(48, 16), (16, 48)] + [(16, 16)] * 9 + [(48, 16)]
LR = 0.02
# The Newton-Schulz iteration multiplies small singular values, and with them the rounding of
# float32 (6e-8), by up to 3.4445 in each of its five steps, together 485.
TOLERANCE = 485 * 4 * 6e-8
# torch.optim.Muon multiplies in bfloat16, which rounds at 2**-9; and how a library rounds a batch
# may differ from a single product by a few units of the last place.
BFLOAT16_TOLERANCE = 4 * 2**-8


def set_bfloat16(monkeypatch, supported):
    monkeypatch.setattr("onenight.muon.supports_bfloat16", lambda device: supported)


def make_weights():
    """Return matrices of several shapes, mixed, as parameters."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator) / 10) for s in SHAPES]


def set_gradients(weights, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def newton_schulz(matrix):
    """The five steps by Muon's author, of one matrix."""
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


class PlainMuon:
    """Muon with its four improvements for one matrix, as they are published: EMA-Nesterov moves
    ahead, takes a step from there, and averages the whole displacement."""

    def __init__(
        self, weight, row_norm=False, cautious=False, weight_decay=0.0, lookahead=0.0, beta=0.9
    ):
        self.weight = weight.clone()
        self.options = (row_norm, cautious, weight_decay, lookahead, beta)
        self.fast = torch.zeros_like(weight)
        self.slow = torch.zeros_like(weight)
        self.displacement = torch.zeros_like(weight)
        self.moment = 0.0

    def ahead(self):
        """Return where the next gradient is computed."""
        return self.weight + self.options[3] * self.displacement

    def step(self, gradient, slow_share):
        row_norm, cautious, weight_decay, _, beta = self.options
        rows, columns = gradient.shape
        ahead = self.ahead()

        fast_beta = 0.85 if slow_share else 0.95
        self.fast = fast_beta * self.fast + (1 - fast_beta) * gradient
        self.slow = 0.98 * self.slow + 0.02 * gradient
        momentum = (1 - slow_share) * self.fast + slow_share * self.slow
        update = newton_schulz(0.95 * momentum + 0.05 * gradient)
        if row_norm:
            squares = (update**2).mean(dim=1 if rows >= columns else 0, keepdim=True)
            self.moment = 0.95 * self.moment + 0.05 * squares
            even = update / self.moment.sqrt()
            update = even * update.norm() / even.norm()
        update = -LR * max(1, rows / columns) ** 0.5 * update
        decay = LR * weight_decay * ahead
        if cautious:
            decay[update * ahead > 0] = 0
        new = ahead + update - decay
        self.displacement = beta * self.displacement + (1 - beta) * (new - self.weight)
        self.weight = new


# The options of Muon, and the share of the slow momentum in each of six iterations.
IMPROVEMENTS = {
    "NorMuon": ({"row_norm": True}, 6 * [0.0]),
    "cautious decay": ({"weight_decay": 0.1, "cautious": True}, 6 * [0.0]),
    "EMA-Nesterov": ({"lookahead": 0.6}, 6 * [0.0]),
    "two speeds": ({}, 3 * [0.0] + 3 * [0.6]),
    "all": (
        {"weight_decay": 0.1, "row_norm": True, "cautious": True, "lookahead": 0.6},
        3 * [0.0] + 3 * [0.6],
    ),
}


@pytest.mark.parametrize("options, slow_shares", IMPROVEMENTS.values(), ids=IMPROVEMENTS)
def test_it_is_a_plain_loop_over_the_matrices(options, slow_shares, monkeypatch):
    set_bfloat16(monkeypatch, False)
    weights = make_weights()
    plain = [PlainMuon(weight.detach(), **options) for weight in weights]
    optimizer = Muon(weights, lr=LR, **options, displacement_beta=0.9, slow_share=0.0)
    for i, slow_share in enumerate(slow_shares):
        optimizer.param_groups[0]["slow_share"] = slow_share
        set_gradients(weights, seed=i)
        optimizer.step()
        for one, weight in zip(plain, weights):
            one.step(weight.grad, slow_share)
            scale = LR * max(1, weight.size(0) / weight.size(1)) ** 0.5
            # Ours has already moved ahead for the next iteration.
            assert (weight - one.ahead()).abs().max() < (i + 1) * scale * TOLERANCE
    for weight, start in zip(weights, make_weights()):
        assert (weight - start).abs().max() > LR  # they have moved


def test_without_the_improvements_it_is_torchs_muon(monkeypatch):
    set_bfloat16(monkeypatch, True)
    ours = make_weights()
    theirs = make_weights()
    optimizers = [
        (Muon(ours, lr=LR, weight_decay=0.1), ours),
        (torch.optim.Muon(theirs, lr=LR, weight_decay=0.1, momentum=0.95), theirs),
    ]
    for i in range(5):
        for optimizer, weights in optimizers:
            set_gradients(weights, seed=i)
            optimizer.step()
    for one, other in zip(ours, theirs):
        scale = max(1, one.size(0) / one.size(1)) ** 0.5
        # The entries of an update are at most about `scale`; five steps.
        assert (one - other).abs().max() < 5 * LR * scale * BFLOAT16_TOLERANCE


def test_without_a_gradient_yet_the_weights_stay():
    """As in the blocks of a new model whose head is zero."""
    weights = make_weights()
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    Muon(weights, lr=LR, row_norm=True, cautious=True, lookahead=0.5, slow_share=0.5).step()
    for weight, start in zip(weights, make_weights()):
        assert torch.equal(weight, start)
