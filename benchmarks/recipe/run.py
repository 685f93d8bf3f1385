"""
Trains one row of the recipe proxy to its end, and appends what it measured to benchmarks/recipe/results.jsonl.

    python benchmarks/recipe/run.py muon-qwen3 --dataset=FOLDER
    python benchmarks/recipe/run.py muon-qwen3 --dataset=FOLDER --learning_rate=0.01 --seed=1338
    python benchmarks/recipe/run.py adamw-gpt2 --dataset=FOLDER --tokens=4000000

    python benchmarks/recipe/run.py muon-qwen3 --dataset=FOLDER --normuon           # with a change of changes.py

FOLDER is what benchmarks/recipe/data.py made. A row is a model of 4 layers, 128 wide, that sees 256 tokens, trained on
4,096 tokens an iteration, in bfloat16 (--dtype=float32 for a CPU without its instructions). Any setting of train.py
changes it.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # a tenth faster, and read before Python starts
    os.execv(sys.executable, [sys.executable, *sys.argv])

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import circumstances
from onenight.device import Ranks, choose_device, choose_dtype
from onenight.optimizer import schedule
from onenight.train_config import TrainConfig
from onenight.trainer import Trainer

import torch

from changes import Lookahead, Muon, TailAverage
from configurator import configure, setting

SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 128, "block_size": 256, "batch_size": 16, "dtype": "bfloat16"}
MODERN = {"architecture": "qwen3", "embedding_lr": 0.1, "head_lr": 6e-3, "beta1": 0.8, "weight_decay": 0.0}
TRAPEZOID = {"warmdown": 0.7}
ADAMW = {"learning_rate": 2e-3, "vector_lr": 0.0}
MUON = {"optimizer": "muon", "learning_rate": 0.02, "vector_lr": 0.015}
ROWS = {
    "adamw-gpt2": {**ADAMW, "warmup": 0.05, "weight_decay": 0.1},
    "muon-gpt2": {**MUON, **TRAPEZOID, "embedding_lr": 2e-3, "weight_decay": 0.0},
    "adamw-qwen3": {**MODERN, **TRAPEZOID, **ADAMW},
    "muon-qwen3": {**MODERN, **TRAPEZOID, **MUON},
}
RATES = ("learning_rate", "embedding_lr", "head_lr", "vector_lr")
EVALS, EVAL_ITERS, LAST_EVAL_ITERS = 8, 4, 32  # evaluations in a run and their size, the last one larger


@dataclass
class RecipeConfig(TrainConfig):
    tokens: int = setting(16_000_000, "tokens to train on: 20 for each parameter of the blocks")
    rates: float = setting(1.0, "factor of all peak learning rates")
    warmup: float = setting(0.0, "warmup_iters as a share of max_iters")
    warmdown: float = setting(0.0, "warmdown_iters as a share of max_iters; 0: cosine down to a tenth")
    normuon: bool = setting(False, "each row of Muon's update divided by the root of its second moment")
    cautious: bool = setting(False, "weight decay only where Muon's update agrees")
    lookahead: bool = setting(False, "EMA-Nesterov round both optimizers")
    tail_average: bool = setting(False, "at the end, weights blended with their average over the last 12 %")
    matrix_warmdown: float = setting(0.0, "the matrices' warmdown as a share of max_iters; 0: as the others'")
    save: str = setting(str(Path(__file__).with_name("results.jsonl")), "the file that the run is added to", path=True)

    def __post_init__(self):
        super().__post_init__()
        if (self.normuon or self.cautious) and self.optimizer != "muon":
            raise ValueError("normuon and cautious change Muon: take a row whose optimizer it is")


def main(arguments: list[str]):
    name = arguments[0] if arguments else ""
    if name not in ROWS:
        raise SystemExit(f"the first argument is one of: {', '.join(ROWS)}")
    defaults = {"gradient_accumulation_steps": 1, "beta2": 0.95, **SHAPE, **ROWS[name]}
    config = configure(RecipeConfig, [f"--{key}={value}" for key, value in defaults.items()] + arguments[1:], __doc__)
    iters = config.tokens // config.tokens_per_iter
    config = dataclasses.replace(
        config,
        **{key: config.rates * getattr(config, key) for key in RATES},
        max_iters=iters,
        lr_decay_iters=iters,
        warmup_iters=round(config.warmup * iters),
        warmdown_iters=round(config.warmdown * iters),
        min_lr=0.0 if config.warmdown else config.rates * config.learning_rate / 10,
    )
    changes = " ".join(a for a in arguments[1:] if not a.startswith(("--dataset", "--tokens", "--save", "--seed")))
    result = {"row": name, "changes": changes, "seed": config.seed, "tokens": iters * config.tokens_per_iter}
    print(json.dumps(result), flush=True)
    result |= run(config)
    with open(config.save, "a") as file:
        file.write(json.dumps(result) + "\n")


def run(config: RecipeConfig) -> dict:
    """Trains, and returns the val loss at each number of tokens, and the median seconds of an iteration."""
    device = choose_device(config.device)
    trainer = Trainer(config, device, choose_dtype(config.dtype, device), Ranks())
    if config.normuon or config.cautious:
        groups = trainer.optimizers["muon"].param_groups
        trainer.optimizers["muon"] = Muon(groups, row_norm=config.normuon, cautious=config.cautious)
    groups = (group for optimizer in trainer.optimizers.values() for group in optimizer.param_groups)
    matrices = next(group for group in groups if group["name"] == "matrices")
    ahead = Lookahead(trainer.model.parameters(), config.max_iters) if config.lookahead else None
    average = TailAverage(trainer.model.named_parameters(), config.max_iters) if config.tail_average else None
    losses, seconds, started, peak_lr = [], [], time.monotonic(), matrices["peak_lr"]
    slower = dataclasses.replace(config, warmdown_iters=round(config.matrix_warmdown * config.max_iters))
    due = {round(share * config.max_iters / EVALS) for share in range(1, EVALS + 1)}
    for i in range(1, config.max_iters + 1):
        begun, lr_share = time.perf_counter(), schedule(config, i - 1)
        if config.matrix_warmdown:
            matrices["peak_lr"] = peak_lr * schedule(slower, i - 1) / lr_share
        if ahead:
            ahead.move(i - 1, lr_share)
        trainer.step(lr_share)
        if ahead:
            ahead.note()
        if average:
            average.note(i)
        seconds.append(time.perf_counter() - begun)
        if i in due:
            config.eval_iters = EVAL_ITERS if i < config.max_iters else LAST_EVAL_ITERS
            losses.append((i * config.tokens_per_iter, round(trainer.evaluate(trainer.val_tokens), 4)))
            print(f"iter {i}: val loss {losses[-1][1]:.4f}, {time.monotonic() - started:.0f}s", flush=True)
    s_per_iter = round(statistics.median(seconds), 4)
    return {"val_loss": losses, "s_per_iter": s_per_iter, "threads": torch.get_num_threads(), **circumstances(device)}


if __name__ == "__main__":
    main(sys.argv[1:])
