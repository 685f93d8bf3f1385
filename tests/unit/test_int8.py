"""int8.py: matrix products of rounded numbers, and where they are refused."""

import sys
from copy import deepcopy

import pytest
import torch

from configurator import UserError
from model import GPT, GPTConfig
from onenight.training.int8 import Int8Linear, check_int8, use_int8
from onenight.training.settings import TrainConfig

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64}
CPU = torch.device("cpu")


def rounded(matrix, dim):
    """Return the matrix with each row (dim 1) or column (dim 0) rounded to 127 steps on each side
    of zero."""
    scale = matrix.abs().amax(dim, keepdim=True) / 127
    return (matrix / scale).round() * scale


def relative_error(found, expected):
    return (found - expected).norm() / expected.norm()


def make_layer(bias):
    """Return an ordinary layer of a block, and the same with int8 products."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE, bias=bias))
    other = deepcopy(gpt)
    use_int8(other)
    plain = gpt.transformer.h[0].mlp.c_fc
    if bias:
        torch.nn.init.normal_(plain.bias)
    layer = other.transformer.h[0].mlp.c_fc
    layer.load_state_dict(plain.state_dict())
    return plain, layer


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_products_of_rounded_matrices(bias):
    plain, layer = make_layer(bias)
    x = torch.randn(2, 16, 32, requires_grad=True)
    grad = torch.randn(2, 16, 128)
    y = layer(x)
    y.backward(grad)

    rows, weight, grads = x.detach().flatten(0, 1), plain.weight.detach(), grad.flatten(0, 1)
    expected = rounded(rows, 1) @ rounded(weight, 1).T
    if bias:
        expected += plain.bias.detach()
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
    if bias:
        assert torch.allclose(layer.bias.grad, grads.sum(0), atol=1e-5)


def test_gradients_may_be_as_small_as_in_large_batches():
    plain, layer = make_layer(bias=False)
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
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE, bias=False))
    other = deepcopy(gpt)
    use_int8(other)
    ids = torch.randint(64, (2, 16))
    assert gpt(ids, ids)[1] != other(ids, ids)[1]
    assert type(other.lm_head) is torch.nn.Linear
    assert sum(type(layer) is Int8Linear for layer in other.modules()) == 4
    assert gpt.eval()(ids, ids)[1] == other.eval()(ids, ids)[1]
    assert other.state_dict().keys() == gpt.state_dict().keys()


@pytest.mark.parametrize(
    "device, name, is_slow",
    [
        ("cpu", "a CPU", True),
        ("cuda", "NVIDIA H200", True),
        ("cuda", "NVIDIA GeForce RTX 4070", False),
    ],
)
def test_a_device_that_is_slow_in_int8_is_named(device, name, is_slow, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    check_int8(torch.device(device))
    message = f"int8 is meant for GeForce cards: {name} is likely to be slower with it\n"
    assert capsys.readouterr().out == (message if is_slow else "")


def test_devices_and_formats_without_int8_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="needs the range of bfloat16"):
        TrainConfig(int8=True, dtype="float16")
    with pytest.raises(UserError, match="NVIDIA GPU, not mps"):
        check_int8(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="this GPU is Tesla T4: use --int8=False"):
        check_int8(torch.device("cuda"))


def test_without_torchao_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="needs torchao .*: pip install torchao==0.18.0"):
        check_int8(CPU)


def test_compiled_it_is_the_same_up_to_rounding():
    _, layer = make_layer(bias=False)
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
