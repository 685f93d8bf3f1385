"""A very small stand-in for nanoGPT's model.py, which runs out of memory with over 4 windows."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

LARGEST_BATCH = 4


@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    bias: bool
    vocab_size: int
    dropout: float


class GPT(torch.nn.Module):
    """Predicts each token from the one before it."""

    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(
            self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay
        )

    def forward(self, idx, targets):
        if len(idx) > LARGEST_BATCH:
            raise torch.OutOfMemoryError
        logits = self.head(self.table(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
