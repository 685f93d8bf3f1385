"""A GPT in one file, with two architectures.

"gpt2" has nanoGPT's shape, parameter names and initialization, which follow OpenAI's GPT-2, so
checkpoints load in both programs. "qwen3" is transformers' Qwen3ForCausalLM: RMSNorm
(arXiv:1910.07467), normalized queries and keys (arXiv:2010.04245), rotary position embeddings
(arXiv:2104.09864), SwiGLU (arXiv:2002.05202), no biases, and an untied output head.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

IGNORED = -1  # targets with this value do not count in the loss
# The head computes this many rows of logits at once: 0.2 GB for 50,304 ids in bfloat16. Without
# torch.compile it also needs them in float32 and takes half as many, which on a CPU was the
# fastest size between 160 and 2,048.
CHUNK_ROWS = 2048
ROTARY_BASE = 10000.0
RMS_NORM_EPS = 1e-6


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError if the shape is impossible."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for the tensor cores
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as in GPT-2; False is slightly better and faster
    architecture: str = "gpt2"  # or "qwen3"

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.parts.rotary_positions and (self.bias or self.head_size % 2):
            raise ValueError(
                f"the {self.architecture} architecture needs bias=False and an even n_embd / n_head"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """The width of the MLP's hidden layer: 4 times n_embd. A gated MLP has three matrices
        instead of two, so 8/3 times n_embd for the same number of parameters, rounded up to a
        multiple of 64."""
        if self.parts.gated_mlp:
            return 64 * math.ceil(8 * self.n_embd / 3 / 64)
        return 4 * self.n_embd

    @property
    def parts(self) -> "Architecture":
        return ARCHITECTURES[self.architecture]


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias; a class of its own for GPT-2's parameter names."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class RMSNorm(nn.Module):
    def __init__(self, width: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), RMS_NORM_EPS)


def rotary_table(block_size: int, head_size: int):
    """Return the cosine and sine of the angle by which each position rotates each pair of
    channels: float32 (2, block_size, 1, head_size / 2)."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, head_size, 2) / head_size)
    angles = torch.arange(block_size)[:, None, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, rotation):
    """Rotate channels i and i + head_size / 2 of x, (B, T, n_head, head_size), as a pair, by
    the cosines and sines in `rotation`, (2, T, 1, head_size / 2)."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.type_as(x)


class KVCache:
    """The keys and values of the tokens that a model has read, in preallocated memory: two tensors
    (B, n_head, slots, head_size) for each layer. The slot of a token is its position."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], positions=None):
        self.layers = layers
        self.positions = positions
        if positions is not None:
            # (T, slots): each token attends to itself and to those before it.
            slots = torch.arange(layers[0][0].size(2), device=positions.device)
            self.visible = slots <= positions[:, None]

    @classmethod
    def empty(cls, config: GPTConfig, batch_size: int, slots: int, dtype, device):
        shape = (2, batch_size, config.n_head, slots, config.head_size)
        layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        return cls([tuple(layer) for layer in layers])

    def view(self, rows: int, slots: int) -> "KVCache":
        """Return the first rows and slots, which share this cache's memory."""
        return KVCache([(k[:rows, :, :slots], v[:rows, :, :slots]) for k, v in self.layers])

    def at(self, positions) -> "KVCache":
        """Return the same memory, for update() with tokens at `positions`, int64 (T,)."""
        return KVCache(self.layers, positions)

    def update(self, layer: int, k, v):
        """Store k and v, (B, n_head, T, head_size), at the positions. Return all keys and all
        values of the layer."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.positions, k)
        values.index_copy_(2, self.positions, v)
        return keys, values


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.layer = layer
        self.dropout = config.dropout
        # query, key and value projections for all heads, in one matrix
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_size) if config.parts.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size) if config.parts.qk_norm else nn.Identity()
        # output projection
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None):
        B, T, C = x.size()  # batch size, sequence length, n_embd

        # queries, keys and values: (B, T, n_head, head_size), then (B, n_head, T, head_size)
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        # From torch 2.12 on, CUDA's autocast would make the norms' outputs float32.
        with torch.autocast(x.device.type, enabled=False):
            q = self.q_norm(q)
            k = self.k_norm(k)
            if rotation is not None:
                q = rotate(q, rotation)
                k = rotate(k, rotation)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)

        # attention over the sequence itself, or over the cache, once the sequence is added.
        # PyTorch chooses the kernel: in training on NVIDIA GPUs, flash attention or cuDNN's.
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            keys, values = cache.update(self.layer, k, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=cache.visible)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.c_gate = None
        if config.parts.gated_mlp:
            self.c_gate = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        if self.c_gate is None:
            h = F.gelu(self.c_fc(x))
        else:
            h = F.silu(self.c_gate(x)) * self.c_fc(x)
        return self.dropout(self.c_proj(h))


def gpt2_std(name: str, fan_in: int, n_layer: int) -> float:
    """GPT-2's initialization: 0.02, and less with more layers for the matrices whose output is
    added to the residual stream."""
    if name.endswith("c_proj.weight"):
        return 0.02 / math.sqrt(2 * n_layer)
    return 0.02


def modern_std(name: str, fan_in: int, n_layer: int) -> float:
    """Embeddings of size 1, and torch's standard deviation for Linear, but zero for projections and
    head, as in modded-nanogpt (github.com/KellerJordan/modded-nanogpt): blocks add nothing at
    first, and all tokens are equally likely."""
    if name.endswith("c_proj.weight") or name == "lm_head.weight":
        return 0.0
    if "wte" in name:
        return 1.0
    return (3 * fan_in) ** -0.5


class Architecture(NamedTuple):
    norm: type[nn.Module]
    gated_mlp: bool  # SwiGLU instead of GELU
    rotary_positions: bool  # instead of position embeddings
    qk_norm: bool  # RMSNorm of queries and keys
    tied_head: bool  # the head is the matrix of the token embeddings
    # standard deviation of a matrix by its name, its inputs and the number of layers
    init_std: Callable[[str, int, int], float]


ARCHITECTURES = {
    "gpt2": Architecture(
        norm=LayerNorm,
        gated_mlp=False,
        rotary_positions=False,
        qk_norm=False,
        tied_head=True,
        init_std=gpt2_std,
    ),
    "qwen3": Architecture(
        norm=RMSNorm,
        gated_mlp=True,
        rotary_positions=True,
        qk_norm=True,
        tied_head=False,
        init_std=modern_std,
    ),
}


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = config.parts.norm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = config.parts.norm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rotation=None, cache=None):
        x = x + self.attn(self.ln_1(x), rotation, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        parts = config.parts
        modules = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if not parts.rotary_positions:
            modules["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        modules["drop"] = nn.Dropout(config.dropout)
        modules["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        modules["ln_f"] = parts.norm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if parts.tied_head:
            self.transformer.wte.weight = self.lm_head.weight
        if parts.rotary_positions:
            table = rotary_table(config.block_size, config.head_size)
            self.register_buffer("rotary", table, persistent=False)
        self.init_weights()

    def init_weights(self):
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter.size(1)
                std = self.config.parts.init_std(name, fan_in, self.config.n_layer)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("weight"):  # the gain of a norm
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Return the number of parameters; by default without the position embeddings, as
        nanoGPT counts."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if non_embedding and "wpe" in self.transformer:
            total -= self.transformer.wpe.weight.numel()
        return total

    def flops_per_token(self) -> int:
        """Return the floating-point operations of a training step, forward and backward, for each
        token, as PaLM counts them (arXiv:2204.02311, appendix B): 6 for each parameter that is part
        of a matrix product, and 12 for each channel of each position that attention reads."""
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
        blocks = sum(parameter.numel() for parameter in self.transformer.h.parameters())
        return 6 * (blocks + self.lm_head.weight.numel()) + attention

    def forward(self, idx, targets=None, cache=None, positions=None):
        """Return the pair (logits, loss), one of which is None.

        idx: int64 (B, T), T at most block_size. Without targets, return the logits of the last
        position, (B, 1, vocab_size). With targets, int64 (B, T), return the mean cross entropy, in
        nats, over the targets that are not IGNORED. `cache`, a KVCache of B rows, holds the tokens
        before idx; idx, at `positions`, int64 (T,), is added to it.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        if positions is None:
            positions = torch.arange(T, device=idx.device)

        # the token embeddings, with positions added here or as a rotation in each attention
        x = self.transformer.wte(idx)  # (B, T, n_embd)
        rotation = None
        if self.config.parts.rotary_positions:
            rotation = self.rotary[:, positions]
        else:
            x = x + self.transformer.wpe(positions)
        # The residual stream in the dtype of the products, as in nanochat and modded-nanogpt: half
        # the bytes of nanoGPT's, which stays in float32.
        x = to_autocast_dtype(self.transformer.drop(x))

        # the blocks
        if cache is not None:
            cache = cache.at(positions)
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        x = self.transformer.ln_f(x)

        # the head: the logits of the last position only, or the loss of all of them
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return None, loss


# ------------------------------------------------------------------------------------------------
# The loss without the logits. For 16 x 1024 tokens and 50,304 ids, the logits and their gradient
# take 3.3 GB each in float32, too much for 12 GB. Computing the gradient in the forward pass, some
# rows at a time, never holds either in full and adds no FLOPs. This is the idea of Liger-Kernel's
# fused linear cross entropy (arXiv:2410.10989), in plain PyTorch.


def linear_cross_entropy(x, weight, targets):
    """Return the mean cross entropy, in nats, of the logits x @ weight.T against the targets that
    are not IGNORED: a float32 scalar (float64 for float64 inputs).

    x: (N, C), weight: (V, C), targets: int64 (N,). Under autocast the products run in its dtype and
    the softmax in float32. Cannot be differentiated twice.
    """
    x = to_autocast_dtype(x)
    if torch.compiler.is_compiling():
        # In the graph Inductor would reorder the loop and keep the gradients of all chunks alive.
        # So the loop stays eager, and only the softmax of a chunk is compiled.
        # (Not a decorator, because that would import the compiler in every script.)
        uncompiled_loss = torch.compiler.disable(loss_in_chunks)
        return uncompiled_loss(x, weight, targets, compiled=True)
    return loss_in_chunks(x, weight, targets, compiled=False)


def to_autocast_dtype(x):
    """Return x in the dtype of matrix products under autocast, or as it is without autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def loss_in_chunks(x, weight, targets, compiled: bool):
    # Inside of forward() gradients are always disabled.
    return _LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled(), compiled)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, with_grad, compiled):
        softmax = cross_entropy_and_gradient
        size = CHUNK_ROWS // 2
        if compiled:
            softmax = compiled_softmax()
            size = CHUNK_ROWS
        w = weight.to(x.dtype)
        is_counted = targets != IGNORED
        n_counted = is_counted.sum()
        accumulate_dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), device=x.device, dtype=accumulate_dtype)
        grad_weight = None
        grad_x = []
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            chunk = x[rows]
            counted = is_counted[rows, None]
            target = targets[rows, None].clamp(min=0)
            loss, grad = softmax(chunk @ w.T, target, accumulate_dtype, with_grad)
            total += (loss * counted).sum()
            if with_grad:
                grad_x.append((grad @ w) * counted)
                grad_weight = add_product(grad_weight, grad.T, chunk * counted, weight.dtype)
            del grad  # the next chunk needs its memory
        if with_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight, n_counted)
        return total / n_counted

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, n_counted = ctx.saved_tensors
        # Divided here and not in forward(), where float16 would underflow: `grad` contains the
        # GradScaler's factor.
        scale = grad / n_counted
        grad_x = grad_x * scale.to(grad_x.dtype)
        grad_weight = grad_weight * scale.to(grad_weight.dtype)
        return grad_x, grad_weight, None, None, None


@functools.cache
def compiled_softmax():
    return torch.compile(cross_entropy_and_gradient, dynamic=False)


def cross_entropy_and_gradient(logits, target, dtype: torch.dtype, with_grad: bool):
    """Return the loss of each row of logits (rows, V): (rows, 1) in `dtype`; and its gradient with
    respect to the logits, (rows, V) in their dtype, or None. target: int64 (rows, 1). The logits
    may be overwritten."""
    target_logits = logits.gather(1, target)
    grad = None
    if torch.compiler.is_compiling():
        # Inductor fuses this: only the logits and their gradient are stored.
        log_sum = logits.to(dtype).logsumexp(-1, keepdim=True)
        if with_grad:
            is_target = torch.arange(logits.size(1), device=logits.device) == target
            grad = ((logits - log_sum).exp() - is_target.to(dtype)).to(logits.dtype)
    else:
        # in place: one matrix in `dtype` at a time
        largest = logits.amax(-1, keepdim=True).to(dtype)
        exps = logits.to(dtype).sub_(largest).exp_()
        sums = exps.sum(-1, keepdim=True)
        log_sum = sums.log() + largest
        if with_grad:
            grad = exps.div_(sums)
            grad = grad.scatter_add_(1, target, torch.full_like(sums, -1.0)).to(logits.dtype)
    return log_sum - target_logits, grad


def add_product(total, a, b, dtype: torch.dtype):
    """Return total + a @ b in `dtype`, which may be wider than that of a and b, and may overwrite
    total. None is a total of zero."""
    if a.is_cuda and a.dtype != dtype:
        # One kernel, which sums in `dtype`.
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    product = (a @ b).to(dtype)
    return product if total is None else total.add_(product)
