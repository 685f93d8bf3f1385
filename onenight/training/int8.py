"""Matrix products in int8, by torchao (torchao.prototype.quantized_training).

In a training step, the linear layers of the blocks compute their outputs and the gradients of
their inputs from int8: each row of the left matrix and each column of the right one is divided by
its largest absolute value, rounded to a multiple of 1/127, and multiplied by it again after the
product. Everything else is as without: the gradients of the weights, attention itself, the head,
the optimizers, evaluations, and checkpoints.
"""

import torch
from torch import nn

from configurator import UserError
from model import GPT, to_autocast_dtype
from onenight.system.console import quiet_torchao
from onenight.system.wording import first_line

TORCHAO = "torchao==0.18.0"  # tried on CPUs, and compiled for an RTX 4070
AMPERE = (8, 0)  # compute capability of the A100, the first with bfloat16; the RTX 30 has 8.6


def check_int8(device: torch.device):
    """Raise UserError if this machine cannot train with int8 products. Print a line if it can, but
    slowly."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"int8 needs an RTX 30 or newer, and this GPU is {name}: use --int8=False")
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"int8 needs an NVIDIA GPU, not {device.type}: use --int8=False")
    load_product()
    if device.type == "cpu":
        print("int8 is meant for NVIDIA GPUs: on a CPU, training is slower with it")


def load_product():
    """Return torchao's function that rounds two matrices to int8 and multiplies them. Raises
    UserError if torchao is missing."""
    quiet_torchao()
    try:
        from torchao.prototype.quantized_training.int8_mixed_precision import _dynamic_int8_mm
    except ImportError as error:
        reason = first_line(error)
        raise UserError(f"int8 needs torchao ({reason}): pip install {TORCHAO}")
    return _dynamic_int8_mm


def use_int8(model: GPT):
    """Make the linear layers of the blocks multiply in int8 when they are trained."""
    multiply = load_product()
    for layer in model.transformer.h.modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = Int8Linear
            layer.multiply = multiply


class Int8Linear(nn.Linear):
    """A linear layer that computes its output and the gradient of its input by `multiply` while it
    is trained."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        # In two dimensions, so that Inductor rounds in the kernel that computes x.
        rows = to_autocast_dtype(x).flatten(0, -2)
        y = _Int8Products.apply(rows, self.weight, self.multiply)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1)


class _Int8Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, multiply):
        ctx.save_for_backward(x, weight)
        ctx.multiply = multiply
        return multiply(x, weight.to(x.dtype).T)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = ctx.multiply(grad, weight.to(x.dtype))
        return grad_x, (grad.T @ x).to(weight.dtype), None
