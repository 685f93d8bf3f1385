"""
Writes text with a trained model.

    python sample.py --out_dir=out-fineweb-single-parquet --start="Once upon a time"
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=1 --temperature=0
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from backend import autocast, choose_device, choose_dtype, compile_model, use_tf32
from checkpoint import load_checkpoint
from configurator import configure, setting
from model import GPT, GPTConfig
from tokenizer import EOT, VOCAB_SIZE, get_encoding
from words import first_line


@dataclass
class SampleConfig:
    out_dir: str = setting("out", "folder of the ckpt.pt to sample from")
    start: str = setting("\n", "the prompt; FILE:prompt.txt reads it from a file; '' starts a new document")
    num_samples: int = setting(10, "samples to draw")
    max_new_tokens: int = setting(500, "tokens in each sample")
    temperature: float = setting(0.8, "0 always takes the likeliest token, 1 samples the model as it is")
    top_k: int = setting(200, "sample from the k likeliest tokens only; 0: from all")
    seed: int = setting(1337, "the same seed, the same text")
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = setting("auto", "'auto', 'float32', 'bfloat16', 'float16'")
    compile: bool = setting(False, "torch.compile: slow to start, then faster")

    def __post_init__(self):
        problems = [f"{key} must be at least 1" for key in ("num_samples", "max_new_tokens") if getattr(self, key) < 1]
        problems += [f"{key} must not be negative" for key in ("temperature", "top_k") if getattr(self, key) < 0]
        if problems:
            raise ValueError("\n".join(problems))


def main(arguments: list[str]):
    config = configure(SampleConfig, arguments, __doc__)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    use_tf32(device)
    prompt = torch.tensor([encode_prompt(config.start)], device=device)
    model = load_model(Path(config.out_dir) / "ckpt.pt").to(device)
    forward = compile_model(model, device) if config.compile else model
    torch.manual_seed(config.seed)
    try:
        for _ in range(config.num_samples):
            with torch.no_grad(), autocast(dtype, device):
                ids = generate(forward, prompt, config)
            print(get_encoding().decode(ids))
            print("---------------")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def encode_prompt(start: str) -> list[int]:
    """The ids of the prompt; "<|endoftext|>" in it is the token. Raises SystemExit if its file cannot be read."""
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"{start[5:]}: the prompt cannot be read ({error})") from None
    return get_encoding().encode(start, allowed_special={"<|endoftext|>"}) or [EOT]


def load_model(path: Path) -> GPT:
    """The model of a checkpoint, ready to sample from. Raises SystemExit if it cannot be read or does not fit."""
    checkpoint = load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{path}: its weights do not fit its model_args ({first_line(error)})")
    if model.config.vocab_size < VOCAB_SIZE:
        raise SystemExit(f"{path}: was trained on {model.config.vocab_size} ids, which are not GPT-2's {VOCAB_SIZE}")
    return model.eval()


def generate(forward, prompt, config: SampleConfig) -> list[int]:
    """Continues the prompt, int64 (1, T), by up to max_new_tokens ids, each drawn by draw(). All ids, (tokens,)."""
    block_size = forward.config.block_size
    ids = prompt
    for _ in range(config.max_new_tokens):
        logits, _ = forward(ids[:, -block_size:])
        ids = torch.cat([ids, draw(logits[:, -1, :], config.temperature, config.top_k)], dim=1)
    return ids[0].tolist()


def draw(logits, temperature: float, top_k: int):
    """One id for each row of logits (B, vocab_size): int64 (B, 1). Ids that only pad the vocabulary are never drawn."""
    logits = logits[:, :VOCAB_SIZE].float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(dim=-1), num_samples=1)


if __name__ == "__main__":
    main(sys.argv[1:])
