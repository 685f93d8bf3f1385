"""Small models with random weights, biases and gains included."""

import torch

from model import GPT, GPTConfig

SHAPE = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 48,
    "dropout": 0.1,
    "vocab_size": 50304,
}
IDS = torch.randint(50257, (2, 48), generator=torch.Generator().manual_seed(0))


def random_checkpoint(bias=True, architecture="gpt2", **more):
    """Return a checkpoint of a random model, with `more` fields."""
    torch.manual_seed(0)
    model_args = {**SHAPE, "bias": bias, "architecture": architecture}
    model = GPT(GPTConfig(**model_args))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return {"model": model.state_dict(), "model_args": model_args, **more}


def save_random_checkpoint(folder, bias=True, architecture="gpt2", **more):
    """Save that checkpoint as ckpt.pt in the folder, and return it."""
    checkpoint = random_checkpoint(bias, architecture, **more)
    torch.save(checkpoint, folder / "ckpt.pt")
    return checkpoint
