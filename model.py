"""
A GPT in one file, in two architectures. "gpt2" has the shape, names and initialisation of nanoGPT's model.py, which
follow OpenAI's GPT-2 (https://github.com/openai/gpt-2/blob/master/src/model.py), so that checkpoints go both ways.
"nanochat" is what was learnt since, and computes what transformers' NanoChatForCausalLM does: rotary positions
(arXiv:2104.09864), normalised queries and keys (arXiv:2010.04245), ReLU squared (arXiv:2109.08668), RMSNorm without
gains (arXiv:1910.07467), a norm after the embedding, a head of its own, a softcap on the logits (arXiv:2408.00118).
"qwen3" computes what transformers' Qwen3ForCausalLM does: rotary positions, queries and keys normalised with gains,
SwiGLU (arXiv:2002.05202), RMSNorm with gains, a head of its own.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

ARCHITECTURES = ("gpt2", "nanochat", "qwen3")
SOFTCAP = 15.0  # nanochat's logits stay between -15 and 15
ROTARY_BASE = 10000.0
IGNORED = -1  # a target that takes no part in the loss
CHUNK_ROWS = 1024  # x 50,304 logits: 0.2 GB in float32; the fastest of 160 to 2048 rows on a CPU
NORM_EPS = 1e-6  # of RMSNorm, in nanochat and Qwen3


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError for a shape that cannot be."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for the tensor cores
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as in GPT-2; False is a little better and faster
    architecture: str = "gpt2"  # or "nanochat", "qwen3"

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            divisors = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            heads = [h for h in divisors if h < self.n_head][-1:] + [h for h in divisors if h > self.n_head][:1]
            below = self.n_embd // self.n_head * self.n_head
            widths = [n for n in (below, below + self.n_head) if n]
            raise ValueError(
                f"n_embd={self.n_embd} cannot be split over n_head={self.n_head} equal heads; nearest that can: "
                f"n_head={' or '.join(map(str, heads))} at this width, "
                f"n_embd={' or '.join(map(str, widths))} with these heads"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {' or '.join(map(repr, ARCHITECTURES))}, not '{self.architecture}'")
        if self.architecture != "gpt2" and (self.bias or self.n_embd // self.n_head % 2):
            raise ValueError(f"the {self.architecture} architecture needs bias=False and an even width of each head")


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last dimension, with gains in the number format of what it normalises."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, None if self.weight is None else self.weight.type_as(x), self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation with an optional bias; its own class so that the parameter names are GPT-2's."""

    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.architecture == "gpt2":
        return LayerNorm(config.n_embd, bias=config.bias)
    return make_rms_norm(config, config.n_embd)


def make_rms_norm(config: GPTConfig, size: int) -> nn.Module:
    return RMSNorm(size, eps=NORM_EPS, elementwise_affine=config.architecture == "qwen3")


def rotary_angles(positions, head_size: int):
    """Cosines and sines, float32 (T, 1, head_size / 2), of what a token at each position of (T,) is rotated by."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angles = positions[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, angles):
    """x, (B, T, n_head, head_size), each pair of channels i and i + head_size / 2 rotated clockwise by its angle."""
    (cos, sin), (a, b) = angles, x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x)


class KVCache:
    """
    The keys and values of the tokens that a model has read, in memory allocated once: for each layer two tensors
    (B, n_head, slots, head_size). A token's slot is its position.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], positions=None):
        self.layers, self.positions = layers, positions
        if positions is not None:  # (T, slots): each token sees itself and those before
            self.visible = torch.arange(layers[0][0].size(2), device=positions.device) <= positions[:, None]

    @classmethod
    def empty(cls, config: GPTConfig, batch_size: int, slots: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, config.n_head, slots, config.n_embd // config.n_head)
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
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.q_norm = self.k_norm = None
        if config.architecture != "gpt2":
            self.q_norm, self.k_norm = (make_rms_norm(config, config.n_embd // config.n_head) for _ in range(2))
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles=None, cache=None):
        B, T, C = x.size()
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head) for part in self.c_attn(x).split(C, dim=2))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:  # after the norm, which it leaves as it is: one tensor less to keep for the gradient
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # each (B, n_head, T, head_size)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, n_head, T, head_size)
        else:
            keys, values = cache.update(self.layer, k, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=cache.visible)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class GatedMLP(nn.Module):
    """SwiGLU, 8/3 times as wide, so that it has as many parameters as an MLP of four times the width."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = -(-8 * config.n_embd // (3 * 64)) * 64
        self.c_gate = nn.Linear(config.n_embd, width, bias=False)
        self.c_fc = nn.Linear(config.n_embd, width, bias=False)
        self.c_proj = nn.Linear(width, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = F.gelu if config.architecture == "gpt2" else relu_squared
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


def relu_squared(x):
    return F.relu(x).square()


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = GatedMLP(config) if config.architecture == "qwen3" else MLP(config)

    def forward(self, x, angles=None, cache=None):
        x = x + self.attn(self.ln_1(x), angles, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        is_gpt2 = config.architecture == "gpt2"
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                **(
                    dict(wpe=nn.Embedding(config.block_size, config.n_embd))
                    if is_gpt2
                    else dict(ln_0=make_norm(config) if config.architecture == "nanochat" else nn.Identity())
                ),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=make_norm(config),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if is_gpt2:
            self.transformer.wte.weight = self.lm_head.weight  # tied
        self.softcap = SOFTCAP if config.architecture == "nanochat" else 0.0
        self.init_weights()

    def init_weights(self):
        """GPT-2's, smaller with depth where a block adds to the residual stream; for nanochat modded-nanogpt's, whose
        blocks add nothing at first, and whose head has no preference (https://github.com/KellerJordan/modded-nanogpt).
        """
        for name, parameter in self.named_parameters():
            is_output = name.endswith("c_proj.weight")
            if parameter.dim() < 2:
                nn.init.constant_(parameter, name.endswith("weight"))  # gains are one, and biases zero
            elif self.config.architecture == "gpt2":
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if is_output else 0.02)
            elif is_output or name == "lm_head.weight":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=1.0 if "wte" in name else (3 * parameter.size(1)) ** -0.5)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters; by default without the position embeddings, as nanoGPT counts."""
        return sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name or not non_embedding)

    def flops_per_token(self) -> int:
        """Of a training step, forward and backward, as PaLM counts them (arXiv:2204.02311, appendix B): 6 for each
        parameter in a matrix product, 12 for each pair of channel and position in attention."""
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
        blocks = sum(parameter.numel() for parameter in self.transformer.h.parameters())
        return 6 * (blocks + self.lm_head.weight.numel()) + attention

    def forward(self, idx, targets=None, cache=None, positions=None):
        """
        idx: int64 (B, T), T at most block_size. Without targets: the logits of the last position, (B, 1, vocab_size),
        and None. With targets, int64 (B, T): None, and the mean cross entropy in nats over those not IGNORED.
        With a KVCache of B rows, idx stands at `positions`, int64 (T,), after the tokens that the cache holds, and is
        added to them.
        """
        x = self.hidden(idx, cache, positions)
        if targets is None:
            logits = (self.lm_head.weight @ x[:, -1].T).T  # this way round, a CPU is faster with few rows
            return soft_cap(logits[:, None], self.softcap), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.softcap)

    def hidden(self, idx, cache=None, positions=None):
        """What the head reads: (B, T, n_embd) for idx, int64 (B, T). cache and positions: as in forward()."""
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        if positions is None:
            positions = torch.arange(T, device=idx.device)
        x, angles = self.transformer.wte(idx), None  # (B, T, n_embd)
        if self.config.architecture == "gpt2":
            x = x + self.transformer.wpe(positions)
        else:
            x, angles = self.transformer.ln_0(x), rotary_angles(positions, self.config.n_embd // self.config.n_head)
            if self.config.architecture == "qwen3":
                angles = (angles[0], -angles[1])  # it rotates the other way
        x = self.transformer.drop(x)
        if cache is not None:
            cache = cache.at(positions)
        for block in self.transformer.h:
            x = block(x, angles, cache)
        return self.transformer.ln_f(x)


# ---- the loss, without the logits

# For 16 x 1024 tokens and 50,304 ids the logits take 3.3 GB in float32, and their gradient as much again: that is what
# does not fit in 12 GB. Computing the gradient in the forward pass, some rows at a time, needs neither and no extra
# FLOPs. The idea is Liger-Kernel's fused linear cross entropy (arXiv:2410.10989); here it is plain PyTorch.


def linear_cross_entropy(x, weight, targets, softcap: float = 0.0):
    """
    The mean cross entropy, in nats, of logits x @ weight.T against the targets that are not IGNORED; a float32 scalar
    (float64 for float64). x: (N, C), weight: (V, C), targets: int64 (N,). With a softcap the logits are bent by
    softcap * tanh(logits / softcap), as in Gemma 2 (arXiv:2408.00118). Under autocast the products run in its dtype
    and the softmax in float32. Not to be differentiated twice.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return _LinearCrossEntropy.apply(x, weight, targets, softcap, torch.is_grad_enabled())


def soft_cap(logits, softcap: float):
    """The logits bent into (-softcap, softcap), in float32 at least; as they are without a softcap."""
    if not softcap:
        return logits
    # softcap * tanh(logits / softcap), in the form that a CPU computes fastest
    wide = torch.promote_types(logits.dtype, torch.float32)
    return softcap * (2 * torch.sigmoid(logits.to(wide) * (2 / softcap)) - 1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, with_grad):
        w = weight.to(x.dtype)
        kept = targets != IGNORED
        count = kept.sum()
        total = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        grad_weight, grad_x = torch.zeros_like(weight) if with_grad else None, []
        for rows in range(0, len(x), CHUNK_ROWS):
            chunk, keep = x[rows : rows + CHUNK_ROWS], kept[rows : rows + CHUNK_ROWS, None]
            target = targets[rows : rows + CHUNK_ROWS, None].clamp(min=0)
            logits = soft_cap(chunk @ w.T, softcap)  # (CHUNK_ROWS, V)
            largest, of_target = logits.amax(-1, keepdim=True), logits.gather(1, target)
            p = torch.softmax(logits, -1, dtype=total.dtype)
            # log sum exp = largest logit - log of its probability: no second pass of exponentials
            loss = (largest.to(p.dtype) - of_target) - p.amax(-1, keepdim=True).log()
            total += (loss * keep).sum()
            if with_grad:
                p.scatter_add_(1, target, torch.full_like(loss, -1.0))  # p - 1 at the target: the logits' gradient
                if softcap:  # times the derivative of the bend, 1 - tanh ** 2, in the logits' own memory
                    p.addcmul_(p, logits.div_(softcap).square_(), value=-1)
                p = p.to(x.dtype)
                grad_x.append((p @ w) * keep)
                grad_weight += p.T @ (chunk * keep)
        if with_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad / count  # here and not above, where float16 would underflow: grad has the GradScaler's factor
        return grad_x * scale.to(grad_x.dtype), grad_weight * scale.to(grad_weight.dtype), None, None, None
