"""What a proxy has learned besides its mean loss: the loss by position in the window, and how well
it copies text that it has just read."""

import torch
from torch.nn import functional as F

from onenight.data.windows import read_windows
from onenight.system.device import autocast
from onenight.training.trainer import Trainer

MAX_WINDOWS = 128  # from the beginning of the validation split
PARTS = 8  # of a window


@torch.no_grad()
def diagnose(trainer: Trainer) -> dict:
    """Return the loss of each eighth of a window ("loss_by_position"), and the losses of half
    windows of text at their first and at their second occurrence in a row ("repeated_text")."""
    trainer.model.eval()
    block_size = trainer.config.block_size
    n_windows = min(MAX_WINDOWS, (len(trainer.val_tokens) - 1) // block_size)
    starts = [i * block_size for i in range(n_windows)]
    x, y = read_windows(trainer.val_tokens, starts, block_size, trainer.device)
    x = x.to(trainer.device)
    y = y.to(trainer.device)
    by_part = losses(trainer, x, y).view(n_windows, PARTS, -1).mean(dim=(0, 2))

    half = x[:, : block_size // 2]
    repeated = torch.cat([half, half], dim=1)
    by_half = losses(trainer, repeated[:, :-1], repeated[:, 1:])
    first = by_half[:, : block_size // 2 - 1].mean().item()
    second = by_half[:, block_size // 2 :].mean().item()
    return {
        "loss_by_position": [round(loss, 4) for loss in by_part.tolist()],
        "repeated_text": [round(first, 4), round(second, 4)],
    }


def losses(trainer: Trainer, x, y):
    """Return the loss of every position, float32 (windows, positions)."""
    captured = []
    model = trainer.model
    handle = model.transformer.ln_f.register_forward_hook(
        lambda module, inputs, output: captured.append(output)
    )
    with autocast(trainer.config.dtype, trainer.device):
        model(x)
        handle.remove()
        logits = model.lm_head(captured[0])
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view(
        y.shape
    )
