"""A GPT in one file, in two architectures.

"gpt2" has nanoGPT's shape, names and initialisation, which follow OpenAI's GPT-2: checkpoints go both ways. "qwen3" is
transformers' Qwen3ForCausalLM: RMSNorm (arXiv:1910.07467), queries and keys normalised (arXiv:2010.04245) and rotated
by their position (arXiv:2104.09864), SwiGLU (arXiv:2002.05202), no biases, and a head of its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

IGNORED = -1  # a target that does not count in the loss
# Rows of the head at once: x 50,304 logits 0.2 GB in bfloat16. Without torch.compile, whose logits are in float32 as
# well, half as many: on a CPU the fastest of 160 to 2,048.
CHUNK_ROWS = 2048
ROTARY_BASE = 10000.0
RMS_NORM_EPS = 1e-6


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError for an impossible one."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for the tensor cores
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as in GPT-2; False is a little better and faster
    architecture: str = "gpt2"  # or "qwen3"

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            heads = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            near = [h for h in heads if h < self.n_head][-1:] + [h for h in heads if h > self.n_head][:1]
            raise ValueError(
                f"n_embd={self.n_embd} cannot be split into n_head={self.n_head} equal heads; "
                f"n_head={' or '.join(map(str, near))} would do"
            )
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be {' or '.join(ARCHITECTURES)}, not {self.architecture}")
        if self.parts.rotary and (self.bias or self.head_size % 2):
            raise ValueError(f"the {self.architecture} architecture needs bias=False and an even n_embd / n_head")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """4 times n_embd; with a gate 8/3 times, for as many parameters, rounded up to a multiple of 64."""
        return 64 * math.ceil(8 * self.n_embd / 3 / 64) if self.parts.gated else 4 * self.n_embd

    @property
    def parts(self) -> "Architecture":
        return ARCHITECTURES[self.architecture]


class LayerNorm(nn.Module):
    """Layer normalisation with an optional bias; its own class so that the parameter names are GPT-2's."""

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
    """The cosines and sines by which each position rotates each pair of channels: float32 (2, block_size, 1, pairs)."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, head_size, 2) / head_size)
    angles = torch.arange(block_size)[:, None, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, rotation):
    """x, (B, T, n_head, head_size), with channels i and i + head_size / 2 rotated as a pair by (2, T, 1, pairs)."""
    (cos, sin), (a, b) = rotation, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class KVCache:
    """The keys and values of the tokens that a model has read, in memory allocated once: for each layer two tensors (B,
    n_head, slots, head_size). A token's slot is its position."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], positions=None):
        self.layers, self.positions = layers, positions
        if positions is not None:  # (T, slots): each token sees itself and those before
            self.visible = torch.arange(layers[0][0].size(2), device=positions.device) <= positions[:, None]

    @classmethod
    def empty(cls, config: GPTConfig, batch_size: int, slots: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, config.n_head, slots, config.head_size)
        return cls([tuple(torch.zeros(2, *shape, dtype=dtype, device=device)) for _ in range(config.n_layer)])

    def view(self, rows: int, slots: int) -> "KVCache":
        """Its first rows and slots: the same memory, and less of it to attend to."""
        return KVCache([(keys[:rows, :, :slots], values[:rows, :, :slots]) for keys, values in self.layers])

    def at(self, positions) -> "KVCache":
        """The same memory, to be updated with tokens at `positions`, int64 (T,)."""
        return KVCache(self.layers, positions)

    def update(self, layer: int, k, v):
        """Stores k and v, (B, n_head, T, head_size), at the positions. Returns all keys and values of the layer."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.positions, k)
        values.index_copy_(2, self.positions, v)
        return keys, values


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.layer, self.dropout = config.n_head, layer, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value at once
        if config.parts.rotary:
            self.q_norm, self.k_norm = RMSNorm(config.head_size), RMSNorm(config.head_size)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None):
        B, T, C = x.size()
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head) for part in self.c_attn(x).split(C, dim=2))
        if rotation is not None:
            with torch.autocast(x.device.type, enabled=False):  # CUDA's makes norms float32 from torch 2.12 on
                q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # each (B, n_head, T, head_size)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, n_head, T, head_size)
        else:
            keys, values = cache.update(self.layer, k, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=cache.visible)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.c_gate = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias) if config.parts.gated else None
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        h = F.gelu(self.c_fc(x)) if self.c_gate is None else F.silu(self.c_gate(x)) * self.c_fc(x)
        return self.dropout(self.c_proj(h))


def gpt2_std(name: str, fan_in: int, n_layer: int) -> float:
    """GPT-2's initialisation: smaller with depth for a matrix whose output is added to the residual stream."""
    return 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02


def modern_std(name: str, fan_in: int, n_layer: int) -> float:
    """modded-nanogpt's (github.com/KellerJordan/modded-nanogpt): at first blocks add nothing, and the head is zero."""
    if name.endswith("c_proj.weight") or name == "lm_head.weight":
        return 0.0
    return 1.0 if "wte" in name else (3 * fan_in) ** -0.5


class Architecture(NamedTuple):
    norm: type[nn.Module]
    gated: bool  # SwiGLU instead of GELU
    rotary: bool  # positions rotate queries and keys, which are normalised; else they have embeddings
    tied: bool  # the head is the matrix of the token embeddings
    init_std: Callable[[str, int, int], float]  # of a matrix, by its name, its inputs and the number of layers


ARCHITECTURES = {
    "gpt2": Architecture(LayerNorm, gated=False, rotary=False, tied=True, init_std=gpt2_std),
    "qwen3": Architecture(RMSNorm, gated=True, rotary=True, tied=False, init_std=modern_std),
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
        self.config, parts = config, config.parts
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                **({} if parts.rotary else dict(wpe=nn.Embedding(config.block_size, config.n_embd))),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=parts.norm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if parts.tied:
            self.transformer.wte.weight = self.lm_head.weight
        if parts.rotary:
            self.register_buffer("rotary", rotary_table(config.block_size, config.head_size), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, name.endswith("weight"))  # gains are one, biases zero
            else:
                nn.init.normal_(parameter, std=parts.init_std(name, parameter.size(1), config.n_layer))

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; by default without the position embeddings, as nanoGPT counts."""
        return sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name or not non_embedding)

    def flops_per_token(self) -> int:
        """Of a training step, forward and backward, as PaLM counts them (arXiv:2204.02311, appendix B): 6 for each
        parameter in a matrix product, 12 for each pair of channel and position in attention."""
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
        blocks = sum(parameter.numel() for parameter in self.transformer.h.parameters())
        return 6 * (blocks + self.lm_head.weight.numel()) + attention

    def forward(self, idx, targets=None, cache=None, positions=None):
        """idx: int64 (B, T), T at most block_size. Without targets the last position's logits, (B, 1, vocab_size), and
        None; with targets, int64 (B, T), None and the mean cross entropy in nats over those not IGNORED. A KVCache of B
        rows holds the tokens before idx, which is at `positions`, int64 (T,), and is added to it."""
        x = self.hidden(idx, cache, positions)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def hidden(self, idx, cache=None, positions=None):
        """The input of the head: (B, T, n_embd) for idx, int64 (B, T). cache and positions: as in forward()."""
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        if positions is None:
            positions = torch.arange(T, device=idx.device)
        x, rotation = self.transformer.wte(idx), None  # (B, T, n_embd)
        if self.config.parts.rotary:
            rotation = self.rotary[:, positions]
        else:
            x = x + self.transformer.wpe(positions)
        x = self.transformer.drop(x)
        if cache is not None:
            cache = cache.at(positions)
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        return self.transformer.ln_f(x)


# ---- the loss without the logits
# For 16 x 1024 tokens and 50,304 ids logits and gradient take 3.3 GB each in float32, too much for 12 GB. Computing the
# gradient in the forward pass, some rows at a time, needs neither, and no extra FLOPs: the idea of Liger-Kernel's fused
# linear cross entropy (arXiv:2410.10989), in plain PyTorch.


def linear_cross_entropy(x, weight, targets):
    """The mean cross entropy, in nats, of logits x @ weight.T against the targets that are not IGNORED; a float32
    scalar (float64 for float64). x: (N, C), weight: (V, C), targets: int64 (N,). Under autocast the products run in its
    dtype and the softmax in float32. Cannot be differentiated twice."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return _LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


def cross_entropy_and_gradient(logits, target, wide: torch.dtype, with_grad: bool):
    """The loss of each row of logits (rows, V), which are overwritten: (rows, 1) in the dtype `wide`; and its gradient,
    (rows, V) in theirs, or None. target: int64 (rows, 1)."""
    of_target, grad = logits.gather(1, target), None
    if torch.compiler.is_compiling():  # one kernel: of the matrices, only the logits and their gradient are in memory
        log_sum = logits.to(wide).logsumexp(-1, keepdim=True)
        if with_grad:
            is_target = torch.arange(logits.size(1), device=logits.device) == target
            grad = ((logits - log_sum).exp() - is_target.to(wide)).to(logits.dtype)
    else:  # in place
        largest = logits.amax(-1, keepdim=True).to(wide)
        exps = logits.to(wide).sub_(largest).exp_()
        sums = exps.sum(-1, keepdim=True)
        log_sum = sums.log() + largest
        if with_grad:
            grad = exps.div_(sums).scatter_add_(1, target, torch.full_like(sums, -1.0)).to(logits.dtype)
    return log_sum - of_target, grad


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, with_grad):
        w = weight.to(x.dtype)
        kept = targets != IGNORED
        count = kept.sum()
        total = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        grad_weight, grad_x = torch.zeros_like(weight) if with_grad else None, []
        size = CHUNK_ROWS if torch.compiler.is_compiling() else CHUNK_ROWS // 2
        for rows in range(0, len(x), size):
            chunk, keep = x[rows : rows + size], kept[rows : rows + size, None]
            target = targets[rows : rows + size, None].clamp(min=0)
            loss, grad = cross_entropy_and_gradient(chunk @ w.T, target, total.dtype, with_grad)
            total += (loss * keep).sum()
            if with_grad:
                grad_x.append((grad @ w) * keep)
                grad_weight += grad.T @ (chunk * keep)
        if with_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad / count  # not in forward, where float16 would underflow: grad has the GradScaler's factor
        return grad_x * scale.to(grad_x.dtype), grad_weight * scale.to(grad_weight.dtype), None, None
