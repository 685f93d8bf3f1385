"""Matrix products in int8, by torchao (torchao.prototype.quantized_training).

In a training step, the linear layers of the blocks compute their outputs, and the gradients of
their inputs and weights, from int8. Each row of the left matrix and each column of the right one is
divided by its scale, which is its largest absolute value / 127, and rounded to integers; their
product is multiplied by both scales. Only the gradients of the weights differ a little: see
backward(). Everything else is as without: attention itself, the head, the optimizers, evaluations,
and checkpoints.
"""

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from model import GPT, to_autocast_dtype
from onenight.errors import UserError, first_line

TORCHAO = "torchao==0.18.0"  # tried on CPUs and an H200, and compiled for an RTX 4070
# torchao divides by at least 1e-12, even if the scale is smaller; then the product is too small.
# The scales of gradients are about 1e-10 with 262,144 tokens per iteration. Multiplied by those of
# inputs, about 0.01, they would be near that limit. So the gradients of the weights are computed
# 128 times as large.
GRADIENT_SCALE = 128.0
AMPERE = (8, 0)  # compute capability of the A100, the first with bfloat16; the RTX 30 has 8.6


def resolve_int8(
    int8: bool | str, device: torch.device, dtype: str, earlier: bool | None
) -> bool | str:
    """Return the setting as it is on a device: "auto" only if both ways are to be measured, with a
    line if they are not for lack of torchao. `earlier` is the setting of a run that is resumed.
    Raises UserError if int8 is asked for and cannot be had."""
    if int8 == "auto" and earlier is not None:
        int8 = earlier
    is_able = device.type == "cpu"
    is_geforce = False
    if device.type == "cuda":
        is_able = torch.cuda.get_device_capability(device) >= AMPERE
        is_geforce = "GeForce" in torch.cuda.get_device_name(device)
    # In float16 the scales, 1/127 of the largest number of a row, would underflow.
    is_able = is_able and dtype != "float16"
    if int8 is True:
        if not is_able:
            raise UserError("int8 needs bfloat16 on an RTX 30 or newer: use --int8=False")
        load_torchao()
    # GeForce cards are rated four times as fast in int8, others twice; an H200 was slower.
    elif int8 == "auto" and is_able and is_geforce:
        try:
            load_torchao()
        except UserError as error:
            print(error)
            int8 = False
    else:
        int8 = False
    return int8


class Torchao(NamedTuple):
    """What is used of torchao."""

    round_rows: Callable  # a matrix -> the integers of its rows in int8, and the rows' scales
    scaled_int8_mm: Callable  # a and b in int8, the scales of a's rows and b's columns -> a @ b

    def product(self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return a @ b.T from the integers and the scales of the rows of both."""
        a_int8, a_scale = a
        b_int8, b_scale = b
        # The kernel is fastest if what it sums over is contiguous in both.
        return self.scaled_int8_mm(a_int8.contiguous(), b_int8.contiguous().T, a_scale, b_scale)


def load_torchao() -> Torchao:
    """Import torchao. Raises UserError if it is missing."""
    # It warns about parts that are not used here, and torch about the types that it registers.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Triton measures 27 variants of torchao's kernel for each shape. With this, it saves what it
    # has measured, and the next start is faster.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    try:
        from torchao.prototype.quantized_training.int8 import quantize_int8_rowwise
        from torchao.prototype.quantized_training.int8_mixed_precision import scaled_int8_mm
    except ImportError as error:
        raise UserError(f"int8 needs torchao: pip install {TORCHAO} ({first_line(error)})")
    return Torchao(quantize_int8_rowwise, scaled_int8_mm)


def set_int8(model: GPT, int8: bool):
    """Make the linear layers of the blocks multiply in int8 when they are trained, or as usual."""
    torchao = load_torchao() if int8 else None
    for layer in model.transformer.h.modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = Int8Linear if int8 else nn.Linear
            layer.torchao = torchao


class Int8Linear(nn.Linear):
    """A linear layer that computes in int8 while it is trained."""

    torchao: Torchao

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        # In two dimensions, so that Inductor rounds in the kernel that computes x.
        rows = to_autocast_dtype(x).flatten(0, -2)
        y = _Int8Products.apply(rows, self.weight, self.torchao)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1)


class _Int8Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, torchao):
        x_int8, x_scale = torchao.round_rows(x)
        ctx.save_for_backward(x_int8, x_scale, weight)
        ctx.torchao = torchao
        return torchao.product((x_int8, x_scale), torchao.round_rows(weight.to(x.dtype)))

    @staticmethod
    def backward(ctx, grad):
        x_int8, x_scale, weight = ctx.saved_tensors
        torchao = ctx.torchao
        weight_columns = torchao.round_rows(weight.to(grad.dtype).T)
        grad_x = torchao.product(torchao.round_rows(grad), weight_columns)
        # The gradient of the weight is grad.T @ x, a sum over tokens. The integers of x have a
        # scale for each token, which cannot be taken out of that sum: multiply it into grad before
        # that is rounded. Then x is rounded only once, and need not be saved. (Compiled, not even
        # its integers are saved: Inductor computes them again.)
        scaled = grad.float() * (GRADIENT_SCALE * x_scale.float()[:, None])
        grad_columns = torchao.round_rows(scaled.T)
        x_scales = torch.full_like(x_int8[0], 1 / GRADIENT_SCALE, dtype=torch.float32)
        grad_weight = torchao.product(grad_columns, (x_int8.T, x_scales))
        return grad_x, grad_weight, None  # in float32, as the weight
