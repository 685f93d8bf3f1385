"""
Which recipe learns most from the same tokens: one run of a small model, added to benchmarks/recipe.jsonl.

    python benchmarks/recipe.py adamw --dataset=FOLDER --max_iters=1280 --learning_rate=2e-3
    python benchmarks/recipe.py fast --dataset=FOLDER --max_iters=512
    python benchmarks/recipe.py fast --dataset=FOLDER --max_iters=512 --without=qk_norm

FOLDER has train.bin and val.bin. A row begins with one of ROWS; any setting of train.py changes it, and --without=PART
replaces a part of the nanochat architecture by what GPT-2 has there, --plus=PART adds one that others found good:
benchmarks/recipe_parts.py has them. On a CPU the model is 4 layers deep, 256 wide, sees 256 tokens, and takes 4,096 in
an iteration; with --gpu it has the 124M shape, and takes 131,072.
"""

import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# glibc gives the memory of the logits back to the system and fetches it again, which takes longer than the arithmetic.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
if __name__ == "__main__" and "GLIBC_TUNABLES" not in os.environ:
    os.environ |= {**KEEP_MEMORY, "GOMP_SPINCOUNT": "10000"}
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch

sys.path.insert(0, str(ROOT))
import trainer as trainer_module
from backend import choose_device, choose_dtype
from configurator import configure, setting
from machine import commit, cpu_name
from model import GPT
from optimizer import schedule
from ranks import Ranks
from recipe_parts import plus, without
from train_config import TrainConfig

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 16}
LARGE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32}
NANOCHAT = {"architecture": "nanochat", "embedding_lr": 0.1, "head_lr": 6e-3}
TRAPEZOID = {"weight_decay": 0.0, "beta1": 0.8, "beta2": 0.95, "warmdown": 0.7}
MUON = {**TRAPEZOID, "optimizer": "muon", "learning_rate": 2e-2}
ROWS = {
    "seed": {"learning_rate": 5e-4, "beta2": 0.99, "warmup": 1 / 12},  # config/train_fineweb_4070.py
    "adamw": {"learning_rate": 2e-3, "beta2": 0.95, "warmup": 0.05},
    "modern": {**NANOCHAT, **TRAPEZOID, "learning_rate": 2e-3},
    "muon": {**MUON, "embedding_lr": 2e-3},
    "fast": {**NANOCHAT, **MUON},
}
EVALS, EVAL_ITERS, LAST_EVAL_ITERS = 8, 2, 16  # evaluations in a run and their size, the last one larger


@dataclass
class RecipeConfig(TrainConfig):
    without: str = setting("", "a part of the nanochat architecture to replace by GPT-2's")
    plus: str = setting("", "a part to add to the nanochat architecture")
    warmup: float = setting(0.0, "warmup_iters as a share of max_iters")
    warmdown: float = setting(0.0, "warmdown_iters as a share of max_iters; 0: cosine down to a tenth")
    gpu: bool = setting(False, "the 124M shape and 131,072 tokens an iteration")
    save: str = setting(str(ROOT / "benchmarks" / "recipe.jsonl"), "the file that the run is added to")


def main(arguments: list[str]):
    name = arguments[0] if arguments else ""
    if name not in ROWS:
        raise SystemExit(f"the first argument is one of: {', '.join(ROWS)}")
    shape = {**LARGE, "gradient_accumulation_steps": 4} if "--gpu" in arguments else {**SMALL, "dtype": "bfloat16"}
    defaults = {"gradient_accumulation_steps": 1, "max_iters": 1280, **shape, **ROWS[name]}
    config = configure(RecipeConfig, [f"--{key}={value}" for key, value in defaults.items()] + arguments[1:], __doc__)
    config = dataclasses.replace(
        config,
        warmup_iters=round(config.warmup * config.max_iters),
        warmdown_iters=round(config.warmdown * config.max_iters),
        lr_decay_iters=config.max_iters,
        min_lr=0.0 if config.warmdown else config.learning_rate / 10,
    )
    changes = " ".join(a for a in arguments[1:] if not a.startswith(("--dataset", "--max_iters", "--save")))
    result = {"row": name, "changes": changes, "iters": config.max_iters, "tokens_per_iter": config.tokens_per_iter}
    print(json.dumps(result))
    result |= run(config) | {"commit": commit(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    with open(config.save, "a") as file:
        file.write(json.dumps(result) + "\n")


def run(config: RecipeConfig) -> dict:
    """Trains, and returns the val losses by iteration, and the median seconds of an iteration."""
    device = choose_device(config.device)
    trainer_module.GPT = lambda shape: plus(config.plus, without(config.without, GPT(shape)))
    trainer = trainer_module.Trainer(config, device, choose_dtype(config.dtype, device), Ranks())
    losses, seconds, started = [], [], time.monotonic()
    due = {round(share * config.max_iters / EVALS) for share in range(EVALS + 1)}
    for i in range(config.max_iters + 1):
        if i in due:
            config.eval_iters = EVAL_ITERS if i < config.max_iters else LAST_EVAL_ITERS
            losses.append((i, round(trainer.evaluate(trainer.val_tokens), 4)))
            print(f"iter {i}: val loss {losses[-1][1]:.4f}, {time.monotonic() - started:.0f}s", flush=True)
        if i < config.max_iters:
            begun = time.perf_counter()
            trainer.step(schedule(config, i))
            seconds.append(time.perf_counter() - begun)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"val_loss": losses, "s_per_iter": round(statistics.median(seconds), 4), "machine": name}


if __name__ == "__main__":
    main(sys.argv[1:])
