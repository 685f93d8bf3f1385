"""muon.py, against torch.optim.Muon and against the formulas of its four improvements."""

from copy import deepcopy

import pytest
import torch

from onenight.training.muon import (
    FAST_MOMENTUM,
    MATRICES_AT_ONCE,
    MOMENTUM,
    ROW_BETA,
    SLOW_MOMENTUM,
    Muon,
    orthogonal,
)

SHAPES = [(48, 48), (48, 48), (96, 48), (48, 96), (48, 48), (96, 48)]
LR = 0.02
# The products of the Newton-Schulz iteration are rounded to bfloat16, which has 8 bits. How a
# library rounds a batch may differ from a single product, by a few units of the last place.
ROUNDING = 4 * 2**-8


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Multiply in bfloat16, as torch.optim.Muon does, on every machine."""
    monkeypatch.setattr("onenight.training.muon.supports_bfloat16", lambda device: True)


def make_weights(seed=0):
    """Return matrices of several shapes, mixed, as parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator) / 10) for s in SHAPES]


def set_gradients(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def run(optimizer, weights, steps=5):
    for i in range(steps):
        set_gradients(weights, seed=100 + i)
        optimizer.step()


def one_step(**options):
    """Return each matrix before and after one step with these options."""
    weights = make_weights()
    before = [weight.detach().clone() for weight in weights]
    run(Muon(weights, lr=LR, **options), weights, steps=1)
    return list(zip(before, [weight.detach() for weight in weights]))


def scale(matrix):
    """Return what Muon's author multiplies the update of a matrix by."""
    rows, columns = matrix.shape
    return max(1, rows / columns) ** 0.5


def test_without_the_improvements_it_is_torchs_muon():
    ours = make_weights()
    theirs = make_weights()
    run(Muon(ours, lr=LR, weight_decay=0.1), ours)
    run(torch.optim.Muon(theirs, lr=LR, weight_decay=0.1, momentum=MOMENTUM), theirs)
    for one, other, start in zip(ours, theirs, make_weights()):
        assert (other - start).abs().max() > LR  # they have moved
        # The entries of an update are at most about scale(); five steps.
        assert (one - other).abs().max() < 5 * LR * scale(one) * ROUNDING


def test_every_matrix_of_a_deep_model_is_updated():
    def many():
        return [torch.nn.Parameter(torch.ones(8, 16)) for _ in range(3 * MATRICES_AT_ONCE + 1)]

    together = many()
    run(Muon(together, lr=LR), together, steps=1)
    alone = many()
    set_gradients(alone, seed=100)
    for weight in alone:
        Muon([weight], lr=LR).step()
    for one, other in zip(together, alone):
        assert (one - other).abs().max() < LR * ROUNDING
        assert (one - 1).abs().max() > LR / 10


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_orthogonal_makes_all_singular_values_alike_and_keeps_the_directions(
    has_bfloat16, monkeypatch
):
    monkeypatch.setattr("onenight.training.muon.supports_bfloat16", lambda device: has_bfloat16)
    for shape in {*SHAPES}:
        u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
        matrix = u @ torch.diag(torch.linspace(0.1, 1, min(shape))) @ v
        result = orthogonal(matrix)
        assert result.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
        result = result.float()
        # Muon's author gives 0.7 to 1.2 for these coefficients; bfloat16 adds its rounding.
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6
        assert values.max() < 1.25
        # The same singular vectors, with the same signs
        assert torch.diagonal(u.mT @ result @ v.mT, dim1=-2, dim2=-1).min() > 0.6


@pytest.mark.parametrize("steps", [1, 3])
def test_row_norm_divides_rows_by_the_root_of_their_moment_and_keeps_the_norm(steps):
    weights = make_weights()
    optimizer = Muon(weights, lr=LR, row_norm=True)
    moments = [0] * len(weights)
    momenta = [0] * len(weights)
    for i in range(steps):
        set_gradients(weights, seed=i)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        for n, weight in enumerate(weights):
            momenta[n] = MOMENTUM * momenta[n] + (1 - MOMENTUM) * weight.grad
            direction = MOMENTUM * momenta[n] + (1 - MOMENTUM) * weight.grad
            update = orthogonal(direction[None])[0].float()
            rows, columns = update.shape
            squares = (update**2).mean(dim=1 if rows >= columns else 0, keepdim=True)
            moments[n] = ROW_BETA * moments[n] + (1 - ROW_BETA) * squares
            even = update / moments[n].sqrt()
            even = even * update.norm() / even.norm()
            expected = -LR * scale(weight) * even
            change = weight.detach() - before[n]
            assert torch.allclose(change, expected, rtol=ROUNDING, atol=LR * ROUNDING / 4)


def test_cautious_decays_only_weights_that_the_update_moves_towards_zero():
    decay = 0.1
    for (start, plain), (_, cautious) in zip(
        one_step(), one_step(weight_decay=decay, cautious=True)
    ):
        moves_towards_zero = (plain - start) * start < 0
        expected = plain - LR * decay * start * moves_towards_zero
        assert torch.allclose(cautious, expected, atol=1e-6)
        assert 0 < moves_towards_zero.float().mean() < 1


def test_lookahead_moves_before_each_iteration_along_the_mean_displacement():
    """The reference is the form in which EMA-Nesterov is published: move ahead, take the step from
    there, and average the whole displacement."""
    distance = 0.6
    beta = 0.9
    ours = make_weights()
    theirs = make_weights()
    optimizer = Muon(ours, lr=LR, lookahead=distance, displacement_beta=beta)
    inner = Muon(theirs, lr=LR)
    mean = [torch.zeros_like(weight) for weight in theirs]
    for i in range(6):
        set_gradients(ours, seed=i)
        optimizer.step()
        before = [weight.detach().clone() for weight in theirs]
        with torch.no_grad():
            for weight, displacement in zip(theirs, mean):
                weight.add_(displacement, alpha=distance)
        set_gradients(theirs, seed=i)
        inner.step()
        for n, weight in enumerate(theirs):
            mean[n] = beta * mean[n] + (1 - beta) * (weight.detach() - before[n])
    # Ours has already moved ahead for the next iteration.
    for one, other, displacement in zip(ours, theirs, mean):
        assert torch.allclose(one, other + distance * displacement, atol=1e-6)
        assert displacement.abs().max() > 1e-3


def test_from_some_iteration_on_the_momentum_is_the_mean_of_a_fast_and_a_slow_average():
    weights = make_weights()
    optimizer = Muon(weights, lr=LR, slow_share=0.0)
    (group,) = optimizer.param_groups
    fast = [0] * len(weights)
    slow = [0] * len(weights)
    for i in range(6):
        share = 0.6 if i >= 3 else 0.0
        beta = FAST_MOMENTUM if i >= 3 else MOMENTUM
        group["slow_share"] = share
        set_gradients(weights, seed=i)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        for n, weight in enumerate(weights):
            fast[n] = beta * fast[n] + (1 - beta) * weight.grad
            slow[n] = SLOW_MOMENTUM * slow[n] + (1 - SLOW_MOMENTUM) * weight.grad
            momentum = (1 - share) * fast[n] + share * slow[n]
            direction = MOMENTUM * momentum + (1 - MOMENTUM) * weight.grad
            expected = -LR * scale(weight) * orthogonal(direction[None])[0].float()
            change = weight.detach() - before[n]
            assert torch.allclose(change, expected, rtol=ROUNDING, atol=LR * ROUNDING / 4)


def test_its_state_can_be_saved_and_loaded():
    options = {"lr": LR, "row_norm": True, "cautious": True, "lookahead": 0.5, "slow_share": 0.5}
    straight = make_weights()
    run(Muon(straight, **options), straight)

    weights = make_weights()
    optimizer = Muon(weights, **options)
    for i in range(5):
        if i == 2:
            state = optimizer.state_dict()
            optimizer = Muon(weights, **options)
            optimizer.load_state_dict(state)
        set_gradients(weights, seed=100 + i)
        optimizer.step()
    for one, other in zip(straight, weights):
        assert torch.equal(one, other)


def test_the_momentum_of_torchs_muon_carries_over():
    theirs = make_weights()
    before = torch.optim.Muon(theirs, lr=LR, momentum=MOMENTUM, weight_decay=0.0)
    run(before, theirs, steps=3)
    ours = [torch.nn.Parameter(weight.detach().clone()) for weight in theirs]
    after = Muon(ours, lr=LR)
    state = {**after.state_dict(), "state": deepcopy(before.state_dict()["state"])}
    after.load_state_dict(state)
    for optimizer, weights in ((before, theirs), (after, ours)):
        set_gradients(weights, seed=7)
        optimizer.step()
    for one, other in zip(ours, theirs):
        assert (one - other).abs().max() < LR * scale(one) * ROUNDING
        assert torch.allclose(
            after.state[one]["momentum_buffer"], before.state[other]["momentum_buffer"]
        )


def test_matrices_without_a_gradient_stay():
    weights = make_weights()
    set_gradients(weights[:2], seed=0)
    optimizer = Muon(weights, lr=LR, weight_decay=0.1, row_norm=True, cautious=True, lookahead=0.5)
    optimizer.step()
    for weight, start in zip(weights[2:], make_weights()[2:]):
        assert torch.equal(weight, start)
