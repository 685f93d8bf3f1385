"""linear_cross_entropy against F.cross_entropy of the whole logits."""

from onenight.device import compile_works

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import CHUNK_ROWS, IGNORED, linear_cross_entropy

C, V = 16, 53
CPU = torch.device("cpu")
BF16 = 2**-8  # the gap between 1 and the next bfloat16


def example(rows: int, ignored: slice | None = None, dtype=torch.float64):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, C, dtype=dtype), torch.randn(V, C, dtype=dtype) / 2
    targets = torch.randint(V, (rows,))
    if ignored:
        targets[ignored] = IGNORED
    return x, weight, targets


def ordinary(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=IGNORED)


def loss_and_gradients(loss_function, x, weight, targets, scale=1.0):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_function(x, weight, targets)
    (loss * scale).backward()
    return loss.detach(), x.grad, weight.grad


def in_float64(x, weight, targets):
    return x.double(), weight.double(), targets


def autocast(loss_function):
    def under_autocast(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_function(*arguments)

    return under_autocast


def error(value, truth) -> float:
    """The size of the difference, relative to the truth, in float64."""
    return ((value.double() - truth).norm() / truth.norm()).item()


# ---- in float64: the same function


@pytest.mark.parametrize(
    "rows, ignored",
    [
        (1, None),
        (CHUNK_ROWS - 1, None),
        (CHUNK_ROWS, slice(0, None, 3)),
        (CHUNK_ROWS + 1, slice(-1, None)),  # all of the last chunk
        (2 * CHUNK_ROWS + 77, None),
        (2 * CHUNK_ROWS + 77, slice(5, CHUNK_ROWS + 500)),
        (2 * CHUNK_ROWS + 77, slice(0, CHUNK_ROWS)),  # all of the first chunk
    ],
)
def test_loss_and_gradients_equal_cross_entropy(rows, ignored):
    arguments = example(rows, ignored)
    expected = loss_and_gradients(ordinary, *arguments)
    for ours, theirs in zip(loss_and_gradients(linear_cross_entropy, *arguments), expected):
        assert ours.dtype == torch.float64
        assert error(ours, theirs) < 1e-10  # float64 rounds at 1e-16; some thousand additions


def test_large_logits_do_not_overflow():
    x, weight, targets = example(100)
    arguments = (x * 100, weight * 100, targets)
    expected = loss_and_gradients(ordinary, *arguments)
    for ours, theirs in zip(loss_and_gradients(linear_cross_entropy, *arguments), expected):
        assert error(ours, theirs) < 1e-10


def test_without_gradients_the_loss_is_the_same():
    x, weight, targets = example(CHUNK_ROWS + 100, slice(0, 50))
    expected = linear_cross_entropy(x.requires_grad_(), weight, targets)
    assert expected.requires_grad
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets)
    assert not loss.requires_grad
    assert loss.item() == expected.item()


def test_gradients_accumulate_over_micro_batches():
    x, weight, targets = example(CHUNK_ROWS + 100)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    for part in (slice(0, None, 2), slice(1, None, 2)):
        (linear_cross_entropy(x[part], weight, targets[part]) / 2).backward()
    _, x_grad, weight_grad = loss_and_gradients(ordinary, x.detach(), weight.detach(), targets)
    assert error(x.grad, x_grad) < 1e-10
    assert error(weight.grad, weight_grad) < 1e-10


@pytest.mark.parametrize("scale", [2.0**16, 1 / 40])  # a GradScaler's, and 40 micro-batches'
def test_gradients_follow_the_scale_of_the_loss(scale):
    arguments = example(300)
    _, *expected = loss_and_gradients(ordinary, *arguments, scale)
    _, *gradients = loss_and_gradients(linear_cross_entropy, *arguments, scale)
    assert all(error(ours, theirs) < 1e-10 for ours, theirs in zip(gradients, expected))


# ---- in bfloat16: as good as the ordinary way


@pytest.mark.parametrize("rows", [CHUNK_ROWS, 16 * CHUNK_ROWS + 100])  # one chunk, and as many as in training
def test_bfloat16_is_as_accurate_as_cross_entropy(rows):
    arguments = example(rows, slice(0, None, 7), dtype=torch.float32)
    truth = loss_and_gradients(ordinary, *in_float64(*arguments))
    theirs = loss_and_gradients(autocast(ordinary), *arguments)
    ours = loss_and_gradients(autocast(linear_cross_entropy), *arguments)
    assert all(value.dtype == torch.float32 for value in ours)
    # inputs, logits, probabilities and products are each rounded, by at most half a BF16
    assert all(error(mine, true) < 2 * BF16 for mine, true in zip(ours, truth))
    for mine, other, true in zip(ours[1:], theirs[1:], truth[1:]):  # the gradients; the loss has a test of its own
        assert error(mine, true) < 1.5 * error(other, true)


def test_bfloat16_of_a_single_row_is_as_accurate_as_cross_entropy():
    x, weight, targets = example(400, dtype=torch.float32)

    def losses(loss_function, x, weight):  # of one row each: the errors of many would cancel in their mean
        return torch.stack([loss_function(x[[i]], weight, targets[[i]]) for i in range(len(x))])

    truth = losses(ordinary, x.double(), weight.double())
    theirs, ours = losses(autocast(ordinary), x, weight), losses(autocast(linear_cross_entropy), x, weight)
    assert error(ours, truth) < 1.1 * error(theirs, truth)  # both round the same logits once, and nothing else


# ---- the reason for it all


def test_the_logits_never_exist_as_a_whole():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    def largest(loss_function):
        with Largest() as mode:
            loss_and_gradients(loss_function, *example(3 * CHUNK_ROWS // 2))
        return mode.numel

    assert largest(ordinary) == 3 * CHUNK_ROWS // 2 * V
    assert largest(linear_cross_entropy) == CHUNK_ROWS // 2 * V


# ---- compiled: into one graph, since a break in it would cost the model its speed


def test_compiled_it_is_the_same():
    if not compile_works(CPU):
        pytest.skip("torch.compile does not work here")
    compiled = torch.compile(linear_cross_entropy, dynamic=False, fullgraph=True)
    arguments = example(CHUNK_ROWS + 10, slice(0, 20))
    eager = loss_and_gradients(linear_cross_entropy, *arguments)
    for ours, theirs in zip(loss_and_gradients(compiled, *arguments), eager):
        assert error(ours, theirs) < 1e-10


def test_traced_for_the_compiler_it_is_the_same_in_bfloat16_and_without_gradients():
    traced = torch.compile(linear_cross_entropy, dynamic=False, fullgraph=True, backend="aot_eager")
    arguments = example(CHUNK_ROWS + 10, slice(0, 20), dtype=torch.float32)
    eager = loss_and_gradients(autocast(linear_cross_entropy), *arguments)
    for ours, theirs in zip(loss_and_gradients(autocast(traced), *arguments), eager):
        assert ours.dtype == torch.float32
        # The weight's gradient is a sum of products rounded to bfloat16, here of chunks of another size.
        assert error(ours, theirs) < (BF16 if ours.dim() else 1e-6)
    with torch.no_grad():
        assert error(autocast(traced)(*arguments), eager[0]) < 1e-6
