"""
The small model on which a change of the recipe is judged.

    python benchmarks/proxy.py data --train=FILE.parquet --val=FILE.parquet --dataset=FOLDER
    python benchmarks/proxy.py row --dataset=FOLDER
    python benchmarks/proxy.py row --dataset=FOLDER --learning_rate=0.02 --seed=1338
    python benchmarks/proxy.py row --dataset=FOLDER --without=cautious
    python benchmarks/proxy.py table

A row is a run to its end: 4 layers of width 128, 256 tokens in a window, 16 million tokens, half an
hour on two CPU cores. Without changes it has the short night's recipe. Any setting of train.py
changes it; name a change of the code with --change. The result is appended to
benchmarks/results/proxy.jsonl. Judge a change by at least three seeds of each row: the losses of
two seeds differ by 0.005.

It is so quiet because of its data. The vocabulary has 4,096 ids, so that the embeddings do not
outweigh the blocks, and every fourth block of 64 training tokens occurs twice in a row, so that
every model learns early to copy what it has just read. In ordinary text a small model learns that
sooner or later by chance, and then the seed matters more than the recipe.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from onenight.startup import run_script

import json
import math
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace

import numpy as np
import tiktoken
import torch
from gpu import describe_machine

from configurator import configure, setting
from onenight.device import set_up_device
from onenight.distributed import Ranks
from onenight.errors import UserError
from onenight.optim import GROUPS, set_rates
from onenight.process import StopSignal
from onenight.settings import TrainConfig, resolve
from onenight.text import read_batches
from onenight.tokenizer import PATTERN, read_ranks
from onenight.trainer import Trainer

RESULTS = str(Path(__file__).parent / "results" / "proxy.jsonl")


def main(arguments: list[str]):
    commands = {"data": make_data, "row": train_row, "table": print_table}
    command = arguments[0] if arguments else "--help"
    if command == "--help":
        print(__doc__)
    elif command in commands:
        commands[command](arguments[1:])
    else:
        raise UserError(f"there is no {command}: the first argument is {', '.join(commands)}")


# -----------------------------------------------------------------------------
# The data

# GPT-2's first ranks, which are themselves a byte pair encoding, and end-of-text.
VOCAB_SIZE = 4096
END_OF_TEXT = VOCAB_SIZE - 1
BLOCK = 64  # tokens
GROUP = 4 * BLOCK  # whose last block is repeated


@dataclass
class DataConfig:
    train: str = setting("", "file to train on: .parquet, .jsonl or .txt", path=True)
    val: str = setting("", "file to validate on", path=True)
    dataset: str = setting("", "folder for train.bin, val.bin and meta.json", path=True)


def make_data(arguments: list[str]):
    config, _ = configure(DataConfig, arguments, __doc__)
    folder = Path(config.dataset)
    folder.mkdir(parents=True, exist_ok=True)
    for split, source in (("train", config.train), ("val", config.val)):
        ids = encode(Path(source))
        if split == "train":
            ids = repeat_blocks(ids)
        ids.tofile(folder / f"{split}.bin")
        print(f"{folder / split}.bin: {len(ids):,} tokens")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}) + "\n")


def encode(path: Path) -> np.ndarray:
    """Return the ids of a file's documents, each followed by end-of-text, as the token files have
    them. Raises UserError if the file cannot be read."""
    ranks = {token: rank for token, rank in read_ranks().items() if rank < END_OF_TEXT}
    encoding = tiktoken.Encoding(
        "gpt2-4096", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    parts = []
    for batch in read_batches(path, "text"):
        for document in batch.documents:
            ids = encoding.encode_to_numpy(document.decode(errors="replace"))
            parts.append(np.append(ids, END_OF_TEXT).astype("<u2"))
    return np.concatenate(parts)


def repeat_blocks(ids: np.ndarray) -> np.ndarray:
    """Return the ids with the last block of each group written twice. An incomplete group at the
    end is left out."""
    n_groups = len(ids) // GROUP
    blocks = ids[: n_groups * GROUP].reshape(n_groups, -1, BLOCK)
    return np.concatenate([blocks, blocks[:, -1:]], axis=1).reshape(-1)


# -----------------------------------------------------------------------------
# A row

SHAPE = {
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 128,
    "block_size": 256,
    "batch_size": 16,
    "tokens_per_iter": 4096,
    "dtype": "bfloat16",  # use --dtype=float32 on a CPU that lacks it
}
# The short night's recipe. The rates are lower than there, for a batch that is so much smaller.
RECIPE = {
    "architecture": "qwen3",
    "optimizer": "muon",
    "learning_rate": 0.028,
    "embedding_lr": 0.1,
    "head_lr": 6e-3,
    "vector_lr": 0.015,
    "weight_decay": 0.025,
    "beta1": 0.8,
    "warmup_iters": 0,
    "warmdown": 0.4,
    "matrix_warmdown": 0.8,
    "min_lr": 0.0,
}
# What can be left out of Muon, and its value then.
PARTS = {"row_norm": False, "cautious": False, "lookahead": None, "slow_share": None}
EVALS = 8  # at equal distances, on 65,536 tokens; the last one on LAST_EVAL_TOKENS
EVAL_TOKENS = 65_536
LAST_EVAL_TOKENS = 524_288
# The settings in which the runs of a row may differ.
NO_CHANGE = ("dataset", "tokens", "seed", "results", "device", "compile")


@dataclass
class RowConfig(TrainConfig):
    tokens: int = setting(16_000_000, "tokens to train on: 20 for each parameter of the blocks")
    rates: float = setting(1.0, "factor of all peak learning rates", above=0)
    without: str = setting("", f"parts of Muon to leave out, some of {','.join(PARTS)}")
    change: str = setting("", "name of a change of the code")
    results: str = setting(RESULTS, "file to which the result is appended", path=True)


def train_row(arguments: list[str]):
    defaults = [f"--{key}={value}" for key, value in {**SHAPE, **RECIPE}.items()]
    config, _ = configure(RowConfig, defaults + arguments, __doc__)
    unchanged, _ = configure(RowConfig, defaults, __doc__)
    changes = [
        f"--{key}={value}"
        for key, value in asdict(config).items()
        if value != getattr(unchanged, key) and key not in NO_CHANGE
    ]
    here = set_up_device(config.device, config.dtype, config.compile)
    config = resolve(config, *here, world_size=1)
    iters = config.tokens // config.tokens_per_iter
    rates = {name: config.rates * getattr(config, name) for name in GROUPS.values()}
    config = replace(config, **rates, max_iters=iters, eval_tokens=EVAL_TOKENS)

    result = {
        "row": "recipe",
        "changes": " ".join(changes),
        "seed": config.seed,
        "tokens": iters * config.tokens_per_iter,
        **train(config),
        **describe_machine(config.device),
    }
    Path(config.results).parent.mkdir(parents=True, exist_ok=True)
    with open(config.results, "a") as file:
        file.write(json.dumps(result) + "\n")


def train(config: RowConfig) -> dict:
    """Train, and return the val loss at each eighth, and the median seconds of an iteration."""
    trainer = Trainer(config, Ranks(), StopSignal())
    trainer.open_data()
    leave_out(trainer, config.without)
    due = {round(n * config.max_iters / EVALS) for n in range(1, EVALS + 1)}
    losses = []
    seconds = []
    for iteration in range(config.max_iters):
        began = time.perf_counter()
        set_rates(trainer.optimizers, config, iteration / config.max_iters)
        trainer.update(trainer.accumulate())
        trainer.count_iteration()
        seconds.append(time.perf_counter() - began)
        if iteration + 1 == config.max_iters:
            trainer.config = replace(config, eval_tokens=LAST_EVAL_TOKENS)
        if iteration + 1 in due:
            loss = trainer.mean_loss(trainer.val_tokens)
            losses.append((trainer.progress.tokens, round(loss, 4)))
            print(f"iter {iteration + 1}: val loss {loss:.4f}")
    s_per_iter = round(statistics.median(seconds), 4)
    return {"val_loss": losses, "s_per_iter": s_per_iter, "threads": torch.get_num_threads()}


def leave_out(trainer: Trainer, without: str):
    """Switch off parts of Muon. Raises UserError if there are none of that name."""
    for part in without.split(",") if without else []:
        if part not in PARTS or "muon" not in trainer.optimizers:
            raise UserError(f"--without={part}: must be some of {','.join(PARTS)}, of Muon")
        for group in trainer.optimizers["muon"].param_groups:
            group[part] = PARTS[part]


# -----------------------------------------------------------------------------
# The table


@dataclass
class TableConfig:
    results: str = setting(RESULTS, "file with the results", path=True)
    base: str = setting("recipe", "row to compare with, with its changes")


def print_table(arguments: list[str]):
    """Print the last val losses of the rows, the best first, for each number of tokens, and the
    differences of the means to the base, with standard errors where both have several seeds."""
    config, _ = configure(TableConfig, arguments, __doc__)
    tables = defaultdict(lambda: defaultdict(dict))
    for line in Path(config.results).read_text().splitlines():
        row = json.loads(line)
        name = f"{row['row']} {row['changes'].replace('--', '')}".strip()
        # Not exactly those asked for, but a multiple of an iteration's
        tables[round(row["tokens"], -5)][name][row["seed"]] = row["val_loss"][-1][1]
    for tokens, rows in sorted(tables.items(), reverse=True):
        head = f"| {tokens / 1e6:.1f} million tokens | val loss, by seed | to {config.base} |"
        print(f"\n{head}\n|---|---|---|")
        for name, losses in sorted(rows.items(), key=lambda row: statistics.mean(row[1].values())):
            by_seed = ", ".join(f"{loss:.4f}" for _, loss in sorted(losses.items()))
            print(f"| {name} | {by_seed} | {difference(losses, rows.get(config.base))} |")


def difference(losses: dict, base: dict | None) -> str:
    """Return the difference of the mean of these losses, by seed, to that of the base."""
    if base is None or losses is base:
        return ""
    words = f"{statistics.mean(losses.values()) - statistics.mean(base.values()):+.4f}"
    if min(len(losses), len(base)) > 1:
        variances = [statistics.variance(row.values()) / len(row) for row in (losses, base)]
        words += f" ± {math.sqrt(sum(variances)):.4f}"
    return words


if __name__ == "__main__":
    run_script(main)
