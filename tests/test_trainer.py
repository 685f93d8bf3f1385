"""An iteration: the gradients, the update, and what is repeated or skipped."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from helpers import MUON, SmallMemory, gpt2_of, make_trainer, step
from onenight.distributed import Ranks
from onenight.errors import UserError
from onenight.trainer import Progress
from onenight.windows import TrainWindows

CPU = torch.device("cpu")


def make_weights_large(trainer):
    """Multiply the initial weights by 3, so that the gradients are large enough for clipping."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(3)


def assert_weights(trainer, expected, atol=0.0):
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)


def norm_of_gradients(parameters):
    """Return the 2-norm of all gradients together, computed in float64."""
    return math.sqrt(sum(parameter.grad.double().square().sum() for parameter in parameters))


# -----------------------------------------------------------------------------
# The arithmetic


def test_iterations_equal_those_of_a_plain_loop(bins):
    """Transformers' GPT-2, torch's AdamW and cross entropy, with all windows in one batch."""
    trainer = make_trainer(bins, weight_decay=0.3, grad_clip=0.5)
    make_weights_large(trainer)
    checkpoint = {"model_args": trainer.model_args, "model": trainer.model.state_dict()}
    reference = gpt2_of(checkpoint).train()
    # The reference has biases, which stay at zero.
    named = dict(reference.named_parameters())
    trained = [parameter for name, parameter in named.items() if not name.endswith(".bias")]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1]},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.3)
    windows = TrainWindows(trainer.train_tokens, 32, seed=1337)

    for i in range(3):
        x, y = windows.batch(16 * i, 16, CPU)
        expected_loss = F.cross_entropy(reference(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        expected_loss.backward()
        expected_norm = norm_of_gradients(trained)
        assert expected_norm > 0.5  # or clipping would not be tested
        for parameter in trained:
            parameter.grad *= 0.5 / expected_norm
        optimizer.step()

        loss, grad_norm = step(trainer)
        # The sums are in float32, in another order.
        assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
        assert grad_norm == pytest.approx(expected_norm, rel=1e-4)

    ours = trainer.model.state_dict()
    compared = ours.keys() & named.keys()
    assert len(compared) == len(trained)
    for name in compared:
        # OpenAI's matrices are transposed.
        expected = named[name].T if "c_" in name else named[name]
        # AdamW divides by the size of the gradient, so rounding can move a weight by a fraction of
        # the learning rate, 1e-2.
        torch.testing.assert_close(ours[name], expected.detach(), rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_batch_size_does_not_change_what_the_tokens_of_an_iteration_teach(bins, batch_size):
    trainers = [
        make_trainer(bins, tokens_per_iter=512, gradient_accumulation_steps=0, batch_size=size)
        for size in (8, batch_size)
    ]
    for _ in range(3):
        expected, found = (step(trainer) for trainer in trainers)
        assert found == pytest.approx(expected, rel=1e-4)  # float32 sums in another order
    assert trainers[1].progress == trainers[0].progress
    assert_weights(trainers[1], trainers[0].model.state_dict(), atol=2e-4)


def test_without_clipping_the_gradient_is_used_as_it_is(bins):
    trainer = make_trainer(bins, grad_clip=0.0)
    make_weights_large(trainer)
    _, grad_norm = step(trainer)
    assert grad_norm > 1
    assert norm_of_gradients(trainer.model.parameters()) == pytest.approx(grad_norm, rel=1e-5)


def test_dropout_depends_only_on_the_seed_the_iteration_and_the_process(bins):
    """On the same weights and the same windows."""

    def loss(seed=1337, iter_num=3, rank=0):
        torch.rand(100)  # what was drawn before does not matter
        trainer = make_trainer(bins, ranks=Ranks(rank=rank), dropout=0.5)
        trainer.config = replace(trainer.config, seed=seed)
        trainer.progress = Progress(iter_num=iter_num, position=1 - rank)
        return trainer.accumulate()

    first = loss()
    assert loss() == first
    assert len({first, loss(seed=1), loss(iter_num=4), loss(rank=1)}) == 4


# -----------------------------------------------------------------------------
# Memory that runs out


@pytest.mark.parametrize("batch_size, accumulation, limit, left", [(12, 1, 4, 3), (7, 2, 3, 2)])
def test_memory_that_runs_out_makes_the_micro_batches_smaller_and_changes_nothing_else(
    bins, batch_size, accumulation, limit, left
):
    """It runs out in the last micro-batch of the second iteration."""
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    undisturbed = make_trainer(bins, **sizes)
    squeezed = make_trainer(bins, **sizes)
    squeezed.compiled_model = SmallMemory(squeezed.model, limit, nth=2 * accumulation)
    for _ in range(3):
        # float32 sums in another order
        assert step(squeezed) == pytest.approx(step(undisturbed), rel=1e-4)
    assert squeezed.micro_batch_size == left
    assert squeezed.progress == undisturbed.progress
    assert_weights(squeezed, undisturbed.model.state_dict(), atol=2e-4)


def test_one_window_that_does_not_fit_is_the_users_problem(bins):
    trainer = make_trainer(bins)
    trainer.compiled_model = SmallMemory(trainer.model, 0)
    with pytest.raises(UserError, match="out of memory"):
        trainer.accumulate()
    assert trainer.compiled_model.calls == [8, 4, 2, 1]


# -----------------------------------------------------------------------------
# Numbers that are not finite


def test_a_gradient_that_is_not_finite_skips_the_update_of_all_optimizers(bins):
    trainer = make_trainer(bins, **MUON)
    step(trainer)
    before = deepcopy(trainer.model.state_dict())
    hook = trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    for _ in range(2):
        _, grad_norm = step(trainer)
        assert not math.isfinite(grad_norm)
    hook.remove()
    assert_weights(trainer, before)
    assert trainer.skipped_in_row == trainer.progress.skipped_iters == 2
    assert trainer.progress.iter_num == 3
    assert trainer.progress.position == 3 * 16

    step(trainer)
    assert trainer.skipped_in_row == 0
    assert trainer.progress.skipped_iters == 2
    assert not torch.equal(trainer.model.lm_head.weight, before["lm_head.weight"])


def test_under_loss_scaling_the_step_is_the_same(bins):
    """The gradient is divided by the scale before it is clipped."""
    scaled = make_trainer(bins, grad_clip=0.1)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    plain = make_trainer(bins, grad_clip=0.1)
    for _ in range(3):
        assert step(scaled) == pytest.approx(step(plain), rel=1e-6)
    # A power of two changes no digits; the norm that is clipped is rounded differently.
    assert_weights(scaled, plain.model.state_dict(), atol=1e-5)
