"""
Trains one row of the recipe proxy to its end, and appends the result to results.jsonl.

    python benchmarks/recipe/run.py muon-qwen3 --dataset=FOLDER
    python benchmarks/recipe/run.py muon-qwen3 --dataset=FOLDER --learning_rate=0.01 --seed=1338
    python benchmarks/recipe/run.py adamw-gpt2 --dataset=FOLDER --tokens=4000000
    python benchmarks/recipe/run.py stack-qwen3 --dataset=FOLDER --cautious=False

FOLDER is what benchmarks/recipe/data.py has written. A row is a model with 4 layers, width 128 and
256 tokens per window, trained on 4,096 tokens per iteration in bfloat16 (use --dtype=float32 on a
CPU without its instructions). Any setting of train.py changes it.
"""

import json
import os
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__" and "GLIBC_TUNABLES" not in os.environ:
    # A tenth faster. It is read before Python starts, so start again.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.argv])

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from changed_run import ChangedConfig, ChangedRun, with_length
from common import circumstances, use_float32_stream
from configurator import UserError, configure, setting
from diagnose import diagnose
from onenight.system.console import run_script
from onenight.system.distributed import Ranks
from onenight.training.optimizers import GROUPS
from onenight.training.schedule import LOOKAHEAD
from onenight.training.settings import resolve
from onenight.training.trainer import Trainer

SHAPE = {
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 128,
    "block_size": 256,
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "dtype": "bfloat16",
}
MODERN = {
    "architecture": "qwen3",
    "embedding_lr": 0.1,
    "head_lr": 6e-3,
    "beta1": 0.8,
    "weight_decay": 0.0,
}
TRAPEZOID = {"warmdown": 0.7}
ADAMW = {"learning_rate": 2e-3, "vector_lr": 0.0}
MUON = {"optimizer": "muon", "learning_rate": 0.02, "vector_lr": 0.015}
# Muon as config/train_fineweb_4070_fast.py has it, but without two-speed momentum.
# NorMuon's rate is 1.4 times Muon's, as in modded-nanogpt's track 3.
STACK = {
    "learning_rate": 0.028,
    "weight_decay": 0.025,
    "normuon": True,
    "cautious": True,
    "lookahead": LOOKAHEAD,
    "matrix_warmdown": 0.8,
    "warmdown": 0.4,
}
ROWS = {
    "adamw-gpt2": {**ADAMW, "warmup": 0.05, "weight_decay": 0.1},
    "muon-gpt2": {**MUON, **TRAPEZOID, "embedding_lr": 2e-3, "weight_decay": 0.0},
    "adamw-qwen3": {**MODERN, **TRAPEZOID, **ADAMW},
    "muon-qwen3": {**MODERN, **TRAPEZOID, **MUON},
    "stack-qwen3": {**MODERN, **MUON, **STACK},
}
# The sizes of the evaluations, in units of 16,384 tokens: after each eighth, and at the end.
EVAL_ITERS = 4
LAST_EVAL_ITERS = 32
# The settings that are not changes: each row has several seeds, lengths and data.
NOT_CHANGES = ("--dataset", "--tokens", "--save", "--seed")


@dataclass
class RecipeConfig(ChangedConfig):
    tokens: int = setting(16_000_000, "tokens to train on: 20 for each parameter of the blocks")
    rates: float = setting(1.0, "factor of all peak learning rates")
    save: str = setting(
        str(Path(__file__).with_name("results.jsonl")),
        "file to which the result is appended",
        path=True,
    )


def main(arguments: list[str]):
    row = arguments[0] if arguments else ""
    if row not in ROWS:
        raise UserError(f"the first argument must be one of: {', '.join(ROWS)}")
    defaults = [f"--{key}={value}" for key, value in {**SHAPE, **ROWS[row]}.items()]
    config = configure(RecipeConfig, defaults + arguments[1:], __doc__)
    config = with_schedule(config)
    changes = [flag for flag in arguments[1:] if not flag.startswith(NOT_CHANGES)]
    result = {
        "row": row,
        "changes": " ".join(changes),
        "seed": config.seed,
        "tokens": config.max_iters * config.tokens_per_iter,
    }
    print(json.dumps(result), flush=True)
    result.update(train(config))
    with open(config.save, "a") as file:
        file.write(json.dumps(result) + "\n")


def with_schedule(config: RecipeConfig) -> RecipeConfig:
    """Return the settings with the length and the learning rates that follow from others."""
    rates = {name: config.rates * getattr(config, name) for name in GROUPS.values()}
    # A cosine ends at a tenth of the peak, a trapezoid at zero.
    min_lr = 0.0 if config.warmdown else rates["learning_rate"] / 10
    config = replace(config, **rates, min_lr=min_lr)
    return with_length(config, config.tokens // config.tokens_per_iter)


def train(config: RecipeConfig) -> dict:
    """Train, and return the val loss at each number of tokens, what else the model has learned, and
    the median seconds of an iteration."""
    trainer = Trainer(resolve(config, config.device), Ranks())
    if config.float32_stream:
        use_float32_stream(trainer.model)
    evaluations, seconds = ChangedRun(trainer).train(EVAL_ITERS, LAST_EVAL_ITERS)
    return {
        "val_loss": evaluations,
        **diagnose(trainer),
        "s_per_iter": round(statistics.median(seconds), 4),
        "threads": torch.get_num_threads(),
        **circumstances(trainer.device),
    }


if __name__ == "__main__":
    run_script(main)
