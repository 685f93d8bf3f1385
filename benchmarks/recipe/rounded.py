"""Matrix products in int8, emulated for their effect on the loss: each product can be tried alone,
and a CPU is faster than with torchao's.

The operands are rounded as torchao rounds them (prototype.quantized_training): each row of the left
one and each column of the right one is divided by its largest absolute value and rounded to a
multiple of 1/127. The products of these integers are then computed in the dtype of the operands:
bfloat16 represents integers up to 256 exactly. Unlike torchao, it also rounds the sums to bfloat16
before they are multiplied by the scales. Unlike int8.py, it rounds the gradients of the weights to
bfloat16, and does not scale them: those of 4,096 tokens per iteration are large enough.

With `reuse`, the gradients of the weights are the product of the integers of the forward pass,
whose scales are those of rows, and of the gradients multiplied by these scales before they are
rounded.
"""

import torch
from torch import nn

from model import GPT, to_autocast_dtype

# What may be computed from int8, in torchao's words.
PRODUCTS = ("output", "grad_input", "grad_weight")


def round_products(model: GPT, products: tuple[str, ...], last_of_mlp: bool, reuse: bool):
    """Compute these PRODUCTS of the linear layers of the blocks from int8; those of the MLP's last
    layer only if `last_of_mlp`. With `reuse`, the integers of the inputs serve twice."""
    for block in model.transformer.h:
        layers = [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_gate]
        if last_of_mlp:
            layers.append(block.mlp.c_proj)
        for layer in layers:
            if layer is not None:
                layer.__class__ = RoundedLinear
                layer.products = products
                layer.reuse = reuse


class RoundedLinear(nn.Linear):
    """A linear layer without a bias, some of whose `products` are computed from int8."""

    products: tuple[str, ...] = ()
    reuse: bool = False

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x = to_autocast_dtype(x)
        y = _RoundedProducts.apply(x.flatten(0, -2), self.weight, self.products, self.reuse)
        return y.view(*x.shape[:-1], -1)


class _RoundedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, products, reuse):
        ctx.save_for_backward(x, weight)
        ctx.products = products
        ctx.reuse = reuse
        return multiply(x, weight.to(x.dtype).T, "output" in products)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = multiply(grad, weight.to(x.dtype), "grad_input" in ctx.products)
        if ctx.reuse:
            grad_weight = multiply_by_inputs(grad, x)
        else:
            grad_weight = multiply(grad.T, x, "grad_weight" in ctx.products)
        return grad_x, grad_weight.to(weight.dtype), None, None


def multiply(a: torch.Tensor, b: torch.Tensor, from_int8: bool) -> torch.Tensor:
    """Return the product of two matrices, optionally with both rounded to int8."""
    if not from_int8:
        return a @ b
    a_integers, a_scale = to_integers(a)
    b_integers, b_scale = to_integers(b.T)
    product = (a_integers @ b_integers.T).float()
    return (product * a_scale[:, None] * b_scale).to(a.dtype)


def multiply_by_inputs(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return grad.T @ x, with x rounded as the forward pass has rounded it."""
    x_integers, x_scale = to_integers(x)
    integers, scale = to_integers((grad * x_scale[:, None]).T)
    product = (integers @ x_integers).float()
    return (product * scale[:, None]).to(x.dtype)


def to_integers(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix with its rows divided by their scales and rounded to integers of at most
    127, in its dtype, and the scales, in its dtype."""
    scale = matrix.abs().amax(1) / 127
    inverse = 1.0 / scale.float().clip(1e-12)
    integers = (matrix.float() * inverse[:, None]).round().clip(-128, 127)
    return integers.to(matrix.dtype), scale
