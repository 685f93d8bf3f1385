"""
Parts of the nanochat architecture that benchmarks/recipe.py removes, and parts that it adds.
"""

import torch
from torch import nn
from torch.nn import functional as F

import model as model_module
from model import GPT, GPTConfig, LayerNorm


def without(part: str, model: GPT) -> GPT:
    """The nanochat model with one part replaced by GPT-2's."""
    blocks, n_embd = model.transformer.h, model.config.n_embd
    if part == "rotary":
        model_module.rotate = lambda x, angles: x
        model.transformer.ln_0 = nn.Sequential(LearnedPositions(model.config), model.transformer.ln_0)
    elif part == "qk_norm":
        for block in blocks:
            block.attn.q_norm = block.attn.k_norm = None
    elif part == "relu_squared":
        for block in blocks:
            block.mlp.activation = F.gelu
    elif part == "rms_norm":
        for block in blocks:
            block.ln_1, block.ln_2 = (LayerNorm(n_embd, bias=False) for _ in range(2))
        model.transformer.ln_f = LayerNorm(n_embd, bias=False)
    elif part == "embedding_norm":
        model.transformer.ln_0 = nn.Identity()
    elif part == "own_head":
        model.transformer.wte.weight = model.lm_head.weight
        nn.init.normal_(model.lm_head.weight, std=0.02)
    elif part == "softcap":
        model.softcap = 0.0
    elif part == "zero_init":
        for block in blocks:
            for linear in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(linear.weight, std=0.02 / (2 * len(blocks)) ** 0.5)
        nn.init.normal_(model.lm_head.weight, std=0.02)
    elif part == "joint_qkv":
        for block in blocks:
            block.attn.c_attn = Split(block.attn.c_attn)
    elif part:
        raise SystemExit(f"--without={part}: there is no such part")
    return model


class LearnedPositions(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        nn.init.normal_(self.wpe.weight)

    def forward(self, x):
        return x + self.wpe.weight[: x.size(1)]


class Split(nn.Module):
    """Query, key and value each a matrix of its own, that Muon makes orthogonal by itself."""

    def __init__(self, joint: nn.Linear):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(joint.in_features, joint.in_features, bias=False) for _ in range(3))
        for part, weight in zip(self.parts, joint.weight.chunk(3)):
            part.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], dim=-1)


def plus(part: str, model: GPT) -> GPT:
    """The nanochat model with a part that modded-nanogpt and nanochat have beside those of NanoChatForCausalLM."""
    blocks, read = model.transformer.h, Read()
    if part == "value_embeddings":  # in every second block, the last one among them
        model.register_forward_pre_hook(read.tokens)
        for block in blocks[1::2]:
            block.attn.c_attn = ValueEmbedding(block.attn.c_attn, model.config, read)
    elif part == "half_rotary":
        model_module.rotary_angles = half_rotary_angles
    elif part == "skips":
        read.first = blocks[0]
        model.transformer.h = nn.ModuleList(FromTheEmbedding(block, read) for block in blocks)
    elif part:
        raise SystemExit(f"--plus={part}: there is no such part")
    return model


class Read:
    """What the model has in hand, for the blocks that look back at it."""

    def tokens(self, model, arguments):
        self.idx = arguments[0]


class ValueEmbedding(nn.Module):
    """Query, key and value, the value half from a table of its own of the tokens (modded-nanogpt's records 9 to 14)."""

    def __init__(self, joint: nn.Linear, config: GPTConfig, read: Read):
        super().__init__()
        self.joint, self.read = joint, read
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # named so, it has the embeddings' learning rate
        self.shares = nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, x):
        q, k, v = self.joint(x).chunk(3, dim=-1)
        return torch.cat([q, k, self.shares[0] * v + self.shares[1] * self.wte(self.read.idx)], dim=-1).type_as(q)


def half_rotary_angles(positions, head_size: int):
    """rotary_angles() with the slower half of the frequencies standing still, the others down to 1/1024."""
    frequencies = (1 / 1024) ** torch.linspace(0, 1, head_size // 4, device=positions.device)
    angles = positions[:, None, None] * torch.cat([frequencies, torch.zeros_like(frequencies)])
    return angles.cos(), angles.sin()


class FromTheEmbedding(nn.Module):
    """A block that sees a share of the first block's input as well."""

    def __init__(self, block: nn.Module, read: Read):
        super().__init__()
        self.block, self.read = block, read
        self.shares = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x, angles=None, past=None):
        if self.block is self.read.first:
            self.read.x0 = x
        return self.block(self.shares[0] * x + self.shares[1] * self.read.x0, angles, past)
