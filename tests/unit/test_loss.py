"""model.linear_cross_entropy() against torch's cross_entropy of the whole logits."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import CHUNK_ROWS, IGNORED, linear_cross_entropy
from onenight.system.device import compile_works

C = 16
V = 53
BFLOAT16_EPS = 2**-8  # the distance from 1 to the next bfloat16


def example(rows, ignored=None, dtype=torch.float64):
    """Return random inputs, weights and targets; those in the slice `ignored` are IGNORED."""
    torch.manual_seed(rows)
    x = torch.randn(rows, C, dtype=dtype)
    weight = torch.randn(V, C, dtype=dtype) / 2
    targets = torch.randint(V, (rows,))
    if ignored:
        targets[ignored] = IGNORED
    return x, weight, targets


def plain_cross_entropy(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=IGNORED)


def loss_and_gradients(loss_function, x, weight, targets, scale=1.0):
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    loss = loss_function(x, weight, targets)
    (loss * scale).backward()
    return loss.detach(), x.grad, weight.grad


def autocast(loss_function):
    def under_autocast(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_function(*arguments)

    return under_autocast


def relative_error(value, truth):
    """Return the norm of the difference, relative to that of the truth, in float64."""
    return ((value.double() - truth).norm() / truth.norm()).item()


# -----------------------------------------------------------------------------
# In float64


@pytest.mark.parametrize(
    "rows, ignored",
    [
        (1, None),
        (CHUNK_ROWS - 1, None),
        (CHUNK_ROWS, slice(0, None, 3)),
        (CHUNK_ROWS + 1, slice(-1, None)),  # the whole last chunk
        (2 * CHUNK_ROWS + 77, None),
        (2 * CHUNK_ROWS + 77, slice(5, CHUNK_ROWS + 500)),
        (2 * CHUNK_ROWS + 77, slice(0, CHUNK_ROWS)),  # the whole first chunks
    ],
)
def test_loss_and_gradients_equal_cross_entropy(rows, ignored):
    arguments = example(rows, ignored)
    expected = loss_and_gradients(plain_cross_entropy, *arguments)
    for ours, theirs in zip(loss_and_gradients(linear_cross_entropy, *arguments), expected):
        assert ours.dtype == torch.float64
        assert relative_error(ours, theirs) < 1e-10  # some thousand sums, each rounded at 1e-16


def test_large_logits_do_not_overflow():
    x, weight, targets = example(100)
    arguments = (x * 100, weight * 100, targets)
    expected = loss_and_gradients(plain_cross_entropy, *arguments)
    for ours, theirs in zip(loss_and_gradients(linear_cross_entropy, *arguments), expected):
        assert relative_error(ours, theirs) < 1e-10


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
    expected = loss_and_gradients(plain_cross_entropy, x, weight, targets)
    x.requires_grad_()
    weight.requires_grad_()
    for part in (slice(0, None, 2), slice(1, None, 2)):
        (linear_cross_entropy(x[part], weight, targets[part]) / 2).backward()
    assert relative_error(x.grad, expected[1]) < 1e-10
    assert relative_error(weight.grad, expected[2]) < 1e-10


@pytest.mark.parametrize("scale", [2.0**16, 1 / 40], ids=["GradScaler", "40 micro-batches"])
def test_gradients_scale_with_the_loss(scale):
    arguments = example(300)
    _, *expected = loss_and_gradients(plain_cross_entropy, *arguments, scale)
    _, *gradients = loss_and_gradients(linear_cross_entropy, *arguments, scale)
    for ours, theirs in zip(gradients, expected):
        assert relative_error(ours, theirs) < 1e-10


# -----------------------------------------------------------------------------
# In bfloat16, as accurate as torch's


@pytest.mark.parametrize("rows", [CHUNK_ROWS, 16 * CHUNK_ROWS + 100], ids=["2 chunks", "33 chunks"])
def test_in_bfloat16_it_is_as_accurate_as_cross_entropy(rows):
    x, weight, targets = example(rows, slice(0, None, 7), dtype=torch.float32)
    truth = loss_and_gradients(plain_cross_entropy, x.double(), weight.double(), targets)
    theirs = loss_and_gradients(autocast(plain_cross_entropy), x, weight, targets)
    ours = loss_and_gradients(autocast(linear_cross_entropy), x, weight, targets)
    for value, expected in zip(ours, truth):
        assert value.dtype == torch.float32
        # Inputs, logits, probabilities and products are each rounded by at most half an epsilon.
        assert relative_error(value, expected) < 2 * BFLOAT16_EPS
    # The gradients; the next test is about the loss.
    for value, other, expected in zip(ours[1:], theirs[1:], truth[1:]):
        assert relative_error(value, expected) < 1.5 * relative_error(other, expected)


def test_in_bfloat16_the_loss_of_a_single_row_is_as_accurate_as_cross_entropy():
    """The errors of many rows would cancel out in their mean."""
    x, weight, targets = example(400, dtype=torch.float32)

    def losses(loss_function, x, weight):
        rows = range(len(x))
        return torch.stack([loss_function(x[[row]], weight, targets[[row]]) for row in rows])

    truth = losses(plain_cross_entropy, x.double(), weight.double())
    theirs = losses(autocast(plain_cross_entropy), x, weight)
    ours = losses(autocast(linear_cross_entropy), x, weight)
    # Both round the same logits once, and nothing else.
    assert relative_error(ours, truth) < 1.1 * relative_error(theirs, truth)


# -----------------------------------------------------------------------------
# Memory and torch.compile


def test_the_whole_logits_never_exist():
    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    def largest(loss_function):
        with LargestTensor() as mode:
            loss_and_gradients(loss_function, *example(3 * CHUNK_ROWS // 2))
        return mode.numel

    assert largest(plain_cross_entropy) == 3 * CHUNK_ROWS // 2 * V
    assert largest(linear_cross_entropy) == CHUNK_ROWS // 2 * V


def test_more_chunks_need_no_more_memory():
    """Beside their gradients, which are small here: 0.1 GB of logits, of 0.5 MB of inputs."""

    def peak_bytes(rows):
        with FakeTensorMode(), MemTracker() as tracker, torch.autocast("cpu", torch.bfloat16):
            x = torch.zeros(rows, C, requires_grad=True)
            weight = torch.zeros(50304, C, requires_grad=True)
            linear_cross_entropy(x, weight, torch.zeros(rows, dtype=torch.long))
        return max(size["Total"] for size in tracker.get_tracker_snapshot("peak").values())

    one = peak_bytes(CHUNK_ROWS // 2)
    assert one > 2e8
    assert peak_bytes(3 * CHUNK_ROWS // 2) < 1.05 * one


def test_compiled_it_has_the_same_results():
    if not compile_works(torch.device("cpu")):
        pytest.skip("torch.compile does not work on this machine")
    compiled = torch.compile(linear_cross_entropy, dynamic=False)
    arguments = example(CHUNK_ROWS + 10, slice(0, 20))
    eager = loss_and_gradients(linear_cross_entropy, *arguments)
    for ours, theirs in zip(loss_and_gradients(compiled, *arguments), eager):
        assert relative_error(ours, theirs) < 1e-10


def test_traced_for_the_compiler_it_is_the_same_in_bfloat16_and_without_gradients(monkeypatch):
    trace = functools.partial(torch.compile, dynamic=False, backend="aot_eager")
    traced_softmax = trace(model.cross_entropy_and_gradient)
    monkeypatch.setattr(model, "compiled_softmax", lambda: traced_softmax)
    traced = trace(linear_cross_entropy)
    arguments = example(CHUNK_ROWS + 10, slice(0, 20), dtype=torch.float32)
    eager = loss_and_gradients(autocast(linear_cross_entropy), *arguments)
    for ours, theirs in zip(loss_and_gradients(autocast(traced), *arguments), eager):
        assert ours.dtype == torch.float32
        # The gradient of the weight is a sum over chunks, here of another size, whose products are
        # rounded to bfloat16.
        tolerance = BFLOAT16_EPS if ours.dim() else 1e-6
        assert relative_error(ours, theirs) < tolerance
    with torch.no_grad():
        assert relative_error(autocast(traced)(*arguments), eager[0]) < 1e-6
