"""
Write a model as a Hugging Face folder, which transformers, llama.cpp and other programs open
without this project's code.

    python export.py --out_dir=out-fineweb-fast --export_dir=my-gpt
    python export.py --init_from=out-fineweb-fast/best.pt --export_dir=my-gpt --dtype=bfloat16
"""

from onenight.startup import run_script

import math
from dataclasses import dataclass
from pathlib import Path

from configurator import configure, setting
from onenight.checkpoint import build_model, open_checkpoint
from onenight.device import DTYPES
from onenight.errors import UserError
from onenight.hf import make_tokenizer, to_transformers, write_folder

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
print(write("Once upon a time", max_new_tokens={new_tokens})[0]["generated_text"])
```

Made with One-night GPT.
"""


@dataclass
class ExportConfig:
    init_from: str = setting(
        "resume",
        "'resume': ckpt.pt in out_dir; or a *.pt file; or a Hugging Face folder or name",
        path=True,
    )
    out_dir: str = setting(
        "", "folder of the ckpt.pt to export; '': the newest out*/ here", path=True
    )
    export_dir: str = setting("", "the folder to write, which must not exist yet", path=True)
    dtype: str = setting("float32", "data type of the weights", choices=tuple(DTYPES))


def main(arguments: list[str]):
    config, _ = configure(ExportConfig, arguments, __doc__)
    if not config.export_dir:
        raise UserError("give the folder to write, with --export_dir=FOLDER")
    target = Path(config.export_dir)
    if target.exists():
        raise UserError(f"{target} already exists; delete it, or choose another --export_dir")

    # The model
    name, checkpoint = open_checkpoint(config.init_from, config.out_dir)
    model = build_model(checkpoint, name)

    # The same in transformers' classes
    theirs = to_transformers(model, DTYPES[config.dtype])
    tokenizer = make_tokenizer(model.config.block_size)
    card = model_card(target.name, theirs, checkpoint)
    write_folder(target, theirs, tokenizer, card)
    print(f"{target}: {', '.join(sorted(file.name for file in target.iterdir()))}")


def model_card(name: str, theirs, checkpoint: dict) -> str:
    """Return README.md: what the model is, how it was trained as far as the checkpoint says, and
    how to load it. `theirs` is transformers' model."""
    shape = checkpoint["model_args"]
    table = {
        "shape": f"{shape['n_layer']} layers, {shape['n_head']} heads, {shape['n_embd']} wide, "
        f"context {shape['block_size']:,} tokens"
    }
    config = checkpoint.get("config", {})
    if "tokens" in checkpoint:
        table["data"] = Path(config["dataset"]).name
        table["training"] = (
            f"{checkpoint['iter_num']:,} iterations, {checkpoint['tokens']:,} tokens"
        )
        table["optimizer"] = f"{config['optimizer']}, learning rate {config['learning_rate']:g}"
    best_val_loss = float(checkpoint.get("best_val_loss", math.inf))
    if math.isfinite(best_val_loss):
        table["best val loss"] = f"{best_val_loss:.4f} nats per token"
        if "best_iter" in checkpoint:  # maybe not the iteration of these weights
            table["best val loss"] += f", at iteration {checkpoint['best_iter']:,}"
    return CARD.format(
        name=name,
        millions=theirs.num_parameters() / 1e6,
        architecture=type(theirs).__name__,
        table="\n".join(f"| {key} | {value} |" for key, value in table.items()),
        new_tokens=max(1, min(100, shape["block_size"] - 4)),  # after a prompt of 4
    )


if __name__ == "__main__":
    run_script(main)
