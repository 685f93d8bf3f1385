"""
GPT-2 in one file: the shape, names and initialisation of nanoGPT's model.py, which follow OpenAI's GPT-2
(https://github.com/openai/gpt-2/blob/master/src/model.py), so that checkpoints go both ways.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from loss import linear_cross_entropy


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


class LayerNorm(nn.Module):
    """Layer normalisation with an optional bias; its own class so that the parameter names are GPT-2's."""

    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class KVCache:
    """
    What attention remembers of the tokens that a model has read, in memory set aside once: for each layer the keys and
    the values, both (B, n_head, slots, head_size). A token's slot is its position.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]):
        self.layers = layers

    @classmethod
    def empty(cls, config: GPTConfig, batch_size: int, slots: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, config.n_head, slots, config.n_embd // config.n_head)
        return cls([tuple(torch.zeros(2, *shape, dtype=dtype, device=device)) for _ in range(config.n_layer)])

    def part(self, rows: int, slots: int) -> "KVCache":
        """Its first rows and slots: the same memory, and less of it to look through."""
        return KVCache([(keys[:rows, :, :slots], values[:rows, :, :slots]) for keys, values in self.layers])

    def at(self, positions) -> list[tuple]:
        """What each layer takes to read tokens at `positions`, int64 (T,): the cache, where to write, what to see."""
        slots = torch.arange(self.layers[0][0].size(2), device=positions.device)
        visible = slots <= positions[:, None]  # (T, slots): each token sees itself and those before
        return [(keys, values, positions, visible) for keys, values in self.layers]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        B, T, C = x.size()
        q, k, v = (  # each (B, n_head, T, head_size)
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2)
        )
        if past is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, n_head, T, head_size)
        else:
            keys, values, positions, visible = past
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, as in GPT-2
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # what is added to the residual stream: smaller with depth
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters; by default without the position embeddings, as nanoGPT counts (the token
        embeddings count, because they are also the head)."""
        count = sum(parameter.numel() for parameter in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding else count

    def flops_per_token(self) -> int:
        """Of a training step, forward and backward, as PaLM counts them (arXiv:2204.02311, appendix B): 6 for each
        parameter in a matrix product, 12 for each pair of channel and position in attention."""
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
        return 6 * self.get_num_params() + attention

    def forward(self, idx, targets=None, cache=None, positions=None):
        """
        idx: int64 (B, T), T at most block_size. Without targets: the logits of the last position, (B, 1, vocab_size),
        and None. With targets, int64 (B, T): None, and the mean cross entropy in nats over those not IGNORED.
        With a KVCache of B rows, idx stands at `positions`, int64 (T,), after the tokens that the cache holds, and is
        added to them.
        """
        x = self.hidden(idx, cache, positions)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def hidden(self, idx, cache=None, positions=None):
        """What the head reads: (B, T, n_embd) for idx, int64 (B, T). cache and positions: as in forward()."""
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        if positions is None:
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))  # (B, T, n_embd)
        pasts = [None] * self.config.n_layer if cache is None else cache.at(positions)
        for block, past in zip(self.transformer.h, pasts):
            x = block(x, past)
        return self.transformer.ln_f(x)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW that decays the matrices and not the vectors, in one fused kernel where PyTorch has it."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))
