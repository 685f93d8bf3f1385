"""
Writes a model as a Hugging Face folder, which transformers, llama.cpp and other tools open without this project's code.

    python export.py --out_dir=out-fineweb-single-parquet --export_dir=my-gpt
    python export.py --init_from=out-fineweb-single-parquet/best.pt --export_dir=my-gpt --dtype=bfloat16
"""

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from onenight.checkpoint import build_model, newest_run
from onenight.console import set_up_output
from onenight.device import DTYPES
from onenight.files import duration, first_line, rename
from onenight.huggingface import make_tokenizer, resolve_checkpoint, to_transformers
from onenight.metrics import read_metrics

from configurator import configure, setting

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model of {millions:.0f}M parameters, a {architecture} with GPT-2's tokenizer.

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
SETTINGS = (
    "optimizer", "learning_rate", "embedding_lr", "head_lr", "vector_lr", "min_lr", "warmup_iters", "warmdown_iters",
    "weight_decay", "beta1", "beta2", "dropout",
)  # fmt: skip


@dataclass
class ExportConfig:
    init_from: str = setting("resume", "'resume': out_dir; or a *.pt file; or a Hugging Face folder or name", path=True)
    out_dir: str = setting("", "folder of the ckpt.pt to export; '': the newest out*/ here", path=True)
    export_dir: str = setting("", "the folder to write, which must not exist yet", path=True)
    dtype: str = setting("float32", "number format of the weights", choices=tuple(DTYPES))


def main(arguments: list[str]):
    set_up_output("stdout", "stderr")
    config = configure(ExportConfig, arguments, __doc__)
    if not config.export_dir:
        raise SystemExit("--export_dir=FOLDER is missing: where to write")
    target = Path(config.export_dir)
    if target.exists():
        raise SystemExit(f"{target} exists already; delete it, or choose another --export_dir")
    resume = config.init_from == "resume"
    run_dir = Path(config.out_dir or newest_run()) if resume else Path(config.init_from).parent
    checkpoint = resolve_checkpoint(config.init_from, run_dir)
    model = build_model(checkpoint, str(run_dir) if resume else config.init_from)
    theirs = to_transformers(model, DTYPES[config.dtype])
    card = model_card(target.name, theirs, checkpoint, read_metrics(run_dir / "metrics.jsonl"))
    write_folder(target, theirs, make_tokenizer(model.config.block_size), card)
    print(f"{target}: {', '.join(sorted(file.name for file in target.iterdir()))}")


def model_card(name: str, model, checkpoint: dict, records: list[dict]) -> str:
    """README.md: transformers' model, how it was trained according to checkpoint and metrics, and how to load it."""
    shape, config, iter_num = checkpoint["model_args"], checkpoint.get("config", {}), checkpoint.get("iter_num", 0)
    table = {"shape": "{n_layer} layers, {n_head} heads, {n_embd} wide, context {block_size:,} tokens".format(**shape)}
    if {"dataset", "batch_size", "gradient_accumulation_steps"} <= config.keys():
        per_iter = config["gradient_accumulation_steps"] * config["batch_size"] * shape["block_size"]
        table["data"] = Path(config["dataset"]).name
        table["iterations"] = f"{iter_num:,} of {per_iter:,} tokens, {iter_num * per_iter:,} in all"
        table["settings"] = ", ".join(f"{key} {config[key]}" for key in SETTINGS if config.get(key))  # 0: without it
    evals = [record for record in records if "val_loss" in record and record["iter"] <= iter_num]
    if evals:
        table["val loss"] = f"{evals[-1]['val_loss']:.4f} nats per token at iteration {evals[-1]['iter']:,}"
        table["time"] = duration(evals[-1]["elapsed_s"])
    if math.isfinite(best := float(checkpoint.get("best_val_loss", math.inf))):
        table["best val loss"] = f"{best:.4f}"
    rows = "\n".join(f"| {key} | {value} |" for key, value in table.items())
    millions, architecture = model.num_parameters() / 1e6, type(model).__name__
    return CARD.format(name=name, millions=millions, architecture=architecture, table=rows)


def write_folder(target: Path, model, tokenizer, card: str):
    """Writes transformers' model and tokenizer and the card to another folder, then renames it. Raises SystemExit."""
    temporary = target.with_name(target.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        tokenizer.backend_tokenizer.model.save(str(temporary))  # OpenAI's own two files, for older tools
        (temporary / "README.md").write_text(card, encoding="utf-8")
        rename(temporary, target)
    except Exception as error:  # OSError, and what safetensors and tokenizers have instead
        raise SystemExit(f"{target}: cannot be written ({getattr(error, 'strerror', None) or first_line(error)})")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
