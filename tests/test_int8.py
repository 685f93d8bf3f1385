"""Matrix products in int8: what is computed, and when a run uses them."""

import sys
from copy import deepcopy

import pytest
import torch

from helpers import MUON, load, make_trainer, metrics, step, train_here
from model import GPT, GPTConfig
from onenight.errors import UserError
from onenight.int8 import resolve_int8, set_int8
from onenight.plan import gains_enough

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64}
CUDA = torch.device("cuda")


def rounded(matrix, dim):
    """Return the matrix with each row (dim 1) or column (dim 0) rounded to 127 steps on each side
    of zero."""
    scale = matrix.abs().amax(dim, keepdim=True) / 127
    return (matrix / scale).round() * scale


def relative_error(found, expected):
    return (found - expected).norm() / expected.norm()


def make_models():
    """Return a model, and the same with int8 products."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE))
    torch.nn.init.normal_(gpt.transformer.h[0].mlp.c_fc.bias)
    other = deepcopy(gpt)
    set_int8(other, True)
    return gpt, other


def make_layers():
    """Return one of the linear layers of both models."""
    return [gpt.transformer.h[0].mlp.c_fc for gpt in make_models()]


# -----------------------------------------------------------------------------
# The products


def test_outputs_and_gradients_are_products_of_rounded_matrices():
    plain, layer = make_layers()
    x = torch.randn(2, 16, 32, requires_grad=True)
    grad = torch.randn(2, 16, 128)
    y = layer(x)
    y.backward(grad)

    rows, weight, grads = x.detach().flatten(0, 1), plain.weight.detach(), grad.flatten(0, 1)
    expected = rounded(rows, 1) @ rounded(weight, 1).T + plain.bias.detach()
    # float32, whose quotients may lie on the other side of a half: one step of one number.
    assert torch.allclose(y.flatten(0, 1), expected, atol=1e-4)
    assert not torch.allclose(y, plain(x), atol=1e-4)
    expected = rounded(grads, 1) @ rounded(weight, 0)
    assert torch.allclose(x.grad.flatten(0, 1), expected, atol=1e-4)
    # This product sums over tokens, so the scales of x, one for each token, are multiplied into the
    # gradients before these are rounded.
    scales = rows.abs().amax(1, keepdim=True) / 127
    expected = rounded(grads * scales, 0).T @ (rows / scales).round()
    assert torch.allclose(layer.weight.grad, expected, atol=1e-4)
    assert relative_error(layer.weight.grad, grads.T @ rows) < 0.02  # about 0.007 for each operand
    assert torch.allclose(layer.bias.grad, grads.sum(0), atol=1e-5)


def test_gradients_may_be_as_small_as_in_large_batches():
    plain, layer = make_layers()
    x = torch.randn(2, 16, 32, requires_grad=True)
    for scale in (1.0, 1e-9):  # with 262,144 tokens in an iteration, they are about 1e-8
        grad = scale * torch.randn(2, 16, 128)
        gradients = []
        for each in (layer, plain):
            x.grad = each.weight.grad = None
            each(x).backward(grad)
            gradients.append((x.grad, each.weight.grad))
        for found, expected in zip(*gradients):
            assert relative_error(found, expected) < 0.02


def test_evaluations_and_the_head_do_not_use_int8():
    gpt, other = make_models()
    ids = torch.randint(64, (2, 16))
    assert gpt(ids, ids)[1] != other(ids, ids)[1]
    assert type(other.lm_head) is torch.nn.Linear
    assert gpt.eval()(ids, ids)[1] == other.eval()(ids, ids)[1]
    assert other.state_dict().keys() == gpt.state_dict().keys()


def test_compiled_it_is_the_same_up_to_rounding():
    _, layer = make_layers()
    x = torch.randn(2, 16, 32, requires_grad=True)
    grad = torch.randn(2, 16, 128)
    results = []
    for call in (layer, torch.compile(layer, dynamic=False)):
        x.grad = layer.weight.grad = None
        y = call(x)
        y.backward(grad)
        results.append((y.detach(), x.grad, layer.weight.grad))
    for one, other in zip(*results):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_trainer_computes_as_if_it_had_always_had_the_present_setting(bins):
    """To the bit, under torch.compile, which must not take the code of the other setting."""
    settings = {**MUON, "n_layer": 1, "dropout": 0.1}
    trainer, without, with_int8 = (
        make_trainer(bins, **settings, int8=int8) for int8 in (False, False, True)
    )
    for each in (trainer, without, with_int8):
        # Without Inductor, which takes minutes and has no say in this.
        each.compiled_model = torch.compile(each.model, backend="eager", dynamic=False)

    def train_as(other):
        assert trainer.config == other.config
        assert step(trainer) == step(other)
        for value, expected in zip(trainer.model.parameters(), other.model.parameters()):
            assert torch.equal(value, expected)

    for _ in range(4):  # head and outputs start at zero: no gradient passes them before
        train_as(without)
    with_int8.restore(deepcopy(trainer.checkpoint()))
    trainer.set_int8(True)
    train_as(with_int8)
    assert trainer.accumulate() != without.accumulate()
    trainer.set_int8(False)
    trainer.restore(deepcopy(without.checkpoint()))
    for _ in range(2):
        train_as(without)


# -----------------------------------------------------------------------------
# The choice


@pytest.fixture
def pretend(monkeypatch):
    """Return pretend(name, capability), which makes torch describe such a GPU."""

    def pretend(name, capability=(8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


GEFORCE = "NVIDIA GeForce RTX 4070"


@pytest.mark.parametrize(
    "int8, name, capability, dtype, earlier, expected",
    [
        ("auto", GEFORCE, (8, 9), "bfloat16", None, "auto"),  # to be measured
        ("auto", GEFORCE, (8, 9), "float16", None, False),
        ("auto", "NVIDIA GeForce RTX 2080 Ti", (7, 5), "float16", None, False),
        ("auto", "NVIDIA H100 80GB HBM3", (9, 0), "bfloat16", None, False),
        # A resumed run keeps what it had.
        ("auto", "NVIDIA H100 80GB HBM3", (9, 0), "bfloat16", True, True),
        (False, GEFORCE, (8, 9), "bfloat16", True, False),
    ],
)
def test_int8_is_chosen_by_the_card_and_by_what_a_resumed_run_had(
    int8, name, capability, dtype, earlier, expected, pretend
):
    pretend(name, capability)
    assert resolve_int8(int8, CUDA, dtype, earlier) == expected


def test_int8_is_refused_in_float16_whose_range_is_too_small(pretend):
    pretend(GEFORCE)
    with pytest.raises(UserError, match="int8"):
        resolve_int8(True, CUDA, "float16", None)


def test_without_torchao_auto_goes_on_and_true_is_refused(pretend, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    pretend(GEFORCE)
    assert resolve_int8("auto", CUDA, "bfloat16", None) is False
    assert "pip install torchao" in capsys.readouterr().out
    with pytest.raises(UserError, match="pip install torchao"):
        resolve_int8(True, CUDA, "bfloat16", None)


def test_int8_is_used_if_it_gains_five_percent():
    assert gains_enough(1.0, 0.94)
    assert not gains_enough(1.0, 0.96)


# -----------------------------------------------------------------------------
# In whole runs

SETTINGS = {**MUON, "n_layer": 1, "eval_tokens": 2500, "eval_interval": 100}


def test_a_run_learns_as_much_as_without_and_its_checkpoint_is_an_ordinary_one(bins, tmp_path):
    val_losses = []
    for name, int8 in (("int8", True), ("plain", False)):
        result = train_here(bins, tmp_path / name, **SETTINGS, int8=int8, max_iters=25)
        assert result.returncode == 0, result.stderr
        val_losses.append(metrics(tmp_path / name)[-1]["val_loss"])
    assert val_losses[0] != val_losses[1]
    # The loss falls from 5.5 to 4.3.
    assert val_losses[0] == pytest.approx(val_losses[1], abs=0.001)

    changes = {"init_from": tmp_path / "int8" / "ckpt.pt", "max_iters": 1}
    result = train_here(bins, tmp_path / "new", **SETTINGS, **changes)
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "new")[0]["val_loss"] == val_losses[0]


def test_a_run_with_int8_is_resumed_with_it_by_auto(bins, tmp_path):
    """On a CPU, auto means False for a new run."""
    assert train_here(bins, tmp_path, **SETTINGS, int8=True, max_iters=1).returncode == 0
    changes = {"int8": "auto", "init_from": "resume", "max_iters": 2}
    resumed = train_here(bins, tmp_path, **SETTINGS, **changes)
    assert resumed.returncode == 0, resumed.stderr
    assert "changed since: int8" not in resumed.stdout
    assert load(tmp_path)["config"]["int8"] is True
