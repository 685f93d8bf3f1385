"""
Write a model as a Hugging Face folder, which transformers, llama.cpp and other programs open
without this project's code.

    python export.py --out_dir=out-fineweb-fast --export_dir=my-gpt
    python export.py --init_from=out-fineweb-fast/best.pt --export_dir=my-gpt --dtype=bfloat16
"""

try:
    import onenight.startup  # isort: skip  (first: see there)  # noqa: F401
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}: keep this script next to onenight/, and run it without -P, -I or PYTHONSAFEPATH"
    ) from None

import math
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, configure, setting
from onenight.models.checkpoint import build_model, newest_run
from onenight.models.hf_model import to_transformers
from onenight.models.hf_tokenizer import make_tokenizer
from onenight.models.huggingface import resolve_checkpoint, write_folder
from onenight.system.console import run_script, set_up_output
from onenight.system.device import DTYPES
from onenight.system.wording import duration
from onenight.training import optimizers, schedule
from onenight.training.metrics import read_metrics

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model with {millions:.0f}M parameters: a {architecture} with GPT-2's tokenizer.

| | |
|---|---|
{table}

```python
from transformers import pipeline

write = pipeline("text-generation", model="{name}")  # the path of this folder
print(write("Once upon a time", max_new_tokens=100)[0]["generated_text"])
```

Made with One-night GPT.
"""
# The settings of a run that its card lists.
CARD_SETTINGS = (*optimizers.SETTINGS, *schedule.SETTINGS, "dropout")


@dataclass
class ExportConfig:
    init_from: str = setting(
        "resume",
        "'resume': ckpt.pt in out_dir; or a *.pt file; or a Hugging Face folder or name",
        path=True,
    )
    out_dir: str = setting(
        "", "folder of the ckpt.pt to export; '': the newest out*/ here", folder=True
    )
    export_dir: str = setting("", "the folder to write, which must not exist yet", path=True)
    dtype: str = setting("float32", "data type of the weights", choices=tuple(DTYPES))


def main(arguments: list[str]):
    set_up_output("stdout", "stderr")
    config = configure(ExportConfig, arguments, __doc__)
    if not config.export_dir:
        raise UserError("give the folder to write, with --export_dir=FOLDER")
    target = Path(config.export_dir)
    if target.exists():
        raise UserError(f"{target} already exists; delete it, or choose another --export_dir")

    # the checkpoint, and the folder in which its run has left metrics.jsonl
    if config.init_from == "resume":
        run_dir = Path(config.out_dir or newest_run())
        name = str(run_dir)
    else:
        run_dir = Path(config.init_from).parent
        name = config.init_from
    checkpoint = resolve_checkpoint(config.init_from, run_dir)
    model = build_model(checkpoint, name)

    # the same in transformers' classes
    theirs = to_transformers(model, DTYPES[config.dtype])
    tokenizer = make_tokenizer(model.config.block_size)
    records = read_metrics(run_dir / "metrics.jsonl")
    card = model_card(target.name, theirs, checkpoint, records)
    write_folder(target, theirs, tokenizer, card)
    print(f"{target}: {', '.join(sorted(file.name for file in target.iterdir()))}")


def model_card(name: str, theirs, checkpoint: dict, records: list[dict]) -> str:
    """Return README.md: what the model is, how it was trained, and how to load it.

    `theirs` is transformers' model. How it was trained is known from the config in the checkpoint,
    if there is one, and from the records of metrics.jsonl.
    """
    shape = checkpoint["model_args"]
    config = checkpoint.get("config", {})
    iter_num = checkpoint.get("iter_num", 0)

    table = {}
    table["shape"] = (
        f"{shape['n_layer']} layers, {shape['n_head']} heads, {shape['n_embd']} wide, "
        f"context {shape['block_size']:,} tokens"
    )
    if {"dataset", "batch_size", "gradient_accumulation_steps"} <= config.keys():
        tokens_per_iter = (
            config["gradient_accumulation_steps"] * config["batch_size"] * shape["block_size"]
        )
        table["data"] = Path(config["dataset"]).name
        # Checkpoints of nanoGPT do not count the tokens.
        tokens = checkpoint.get("tokens", iter_num * tokens_per_iter)
        of_one = f" of {tokens_per_iter:,} tokens"
        if tokens != iter_num * tokens_per_iter:  # the run was resumed with another batch size
            of_one = f", the last{of_one}"
        table["iterations"] = f"{iter_num:,}{of_one}, {tokens:,} in total"
        # Settings of 0 are off.
        used = [f"{key} {config[key]}" for key in CARD_SETTINGS if config.get(key)]
        table["settings"] = ", ".join(used)
    evals = [record for record in records if "val_loss" in record and record["iter"] <= iter_num]
    if evals:
        last = evals[-1]
        table["val loss"] = f"{last['val_loss']:.4f} nats per token at iteration {last['iter']:,}"
        table["time"] = duration(last["elapsed_s"])
    best_val_loss = float(checkpoint.get("best_val_loss", math.inf))
    if math.isfinite(best_val_loss):
        table["best val loss"] = f"{best_val_loss:.4f}"

    return CARD.format(
        name=name,
        millions=theirs.num_parameters() / 1e6,
        architecture=type(theirs).__name__,
        table="\n".join(f"| {key} | {value} |" for key, value in table.items()),
    )


if __name__ == "__main__":
    run_script(main)
