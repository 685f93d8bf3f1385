"""Helpers for all tests: running the scripts as a user does, small data, small models."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import train as train_script
from onenight.device import set_up_device
from onenight.distributed import Ranks
from onenight.errors import UserError
from onenight.process import StopSignal
from onenight.settings import TrainConfig, resolve
from onenight.trainer import Trainer

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(__file__).parent / "programs"

torch.set_num_threads(1)  # models this small are slower with more

# -----------------------------------------------------------------------------
# Running a script to its end


def run(script, *args, env=None):
    """Run a script of the project, or the program at a path, in a process of its own.

    `env` is added to the environment. Return a CompletedProcess with text.
    """
    command = [sys.executable, ROOT / script, *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def run_here(script, *args, stdin=b""):
    """Run the main() of an imported script in this process. Return what run() returns.

    The changes that the script makes to streams and signal handlers are undone.
    """
    captured = [
        io.TextIOWrapper(io.BytesIO(content), encoding="utf-8") for content in (stdin, b"", b"")
    ]
    streams_before = (sys.stdin, sys.stdout, sys.stderr)
    handlers_before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    returncode = 0
    sys.stdin, sys.stdout, sys.stderr = captured
    try:
        script.main([str(argument) for argument in args])
    except UserError as error:
        returncode = 1
        print(error, file=sys.stderr)
    except SystemExit as end:
        returncode = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if isinstance(end.code, str) else "", end="", file=sys.stderr)
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams_before
        for number, handler in handlers_before.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
    texts = []
    for stream in captured[1:]:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return subprocess.CompletedProcess(args, returncode, *texts)


def assert_one_sentence(result, words):
    """Assert that a script failed with one line on stderr, without a traceback, with `words`."""
    assert result.returncode not in (0, None)
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


# -----------------------------------------------------------------------------
# A small training run

TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_iters": 45,
    "warmup_iters": 5,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "eval_interval": 20,
    "eval_tokens": 16_384,
    "device": "cpu",
    "compile": False,
}
# The settings of a run with Muon.
MUON = {
    "architecture": "qwen3",
    "optimizer": "muon",
    "learning_rate": 0.02,
    "embedding_lr": 0.3,
    "head_lr": 0.004,
    "vector_lr": 0.01,
}


def make_bins(folder):
    """Write train.bin, val.bin and meta.json with data that are easy to learn.

    It is a walk over 250 ids in which the next id depends on the last one, with 10 % noise.
    """
    random = np.random.default_rng(0)
    successor = random.permutation(250)
    for split, n_tokens in (("train", 20_000), ("val", 2500)):
        ids = np.zeros(n_tokens, "<u2")
        for i in range(1, n_tokens):
            ids[i] = successor[ids[i - 1]] if random.random() < 0.9 else random.integers(250)
        ids.tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 250}))
    return folder


def make_random_bins(folder, vocab_size, n_tokens):
    """Write train.bin and val.bin with uniformly random ids."""
    for split in ("train", "val"):
        ids = np.random.default_rng(0).integers(0, vocab_size, n_tokens)
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    return folder


def flags_of(bins, out_dir, changes):
    """Return train.py's arguments for TINY with `changes`."""
    settings = {**TINY, "dataset": bins, "out_dir": out_dir, **changes}
    return [f"--{key}={value}" for key, value in settings.items()]


def train_here(bins, out_dir, **changes):
    """Run train.py with TINY and `changes` in this process, which saves six seconds of imports."""
    return run_here(train_script, *flags_of(bins, out_dir, changes))


def make_trainer(bins, *, ranks=None, **changes):
    """Return the Trainer of train_here(), with its data."""
    config = TrainConfig(**{**TINY, "dtype": "float32", "dataset": str(bins), **changes})
    here = set_up_device(config.device, config.dtype, config.compile)
    config = resolve(config, *here, world_size=1)
    trainer = Trainer(config, ranks or Ranks(), StopSignal())
    trainer.open_data()
    return trainer


def step(trainer):
    """Do one iteration at the peak learning rates. Return the loss and the norm of the gradient."""
    loss = trainer.accumulate()
    grad_norm = trainer.update(loss)
    trainer.count_iteration()
    return loss, grad_norm


@torch.no_grad()
def logits_of_every_position(model, idx):
    """Return the logits of all positions, (B, T, vocab_size); the model itself returns the last."""
    outputs = []
    hook = model.transformer.ln_f.register_forward_hook(lambda *call: outputs.append(call[-1]))
    model(idx)
    hook.remove()
    return model.lm_head(outputs[0])


class SmallMemory:
    """A model that runs out of memory with more than `limit` rows, from the `nth` call on.

    The error is CUDA's. `calls` has the number of rows of each call.
    """

    def __init__(self, model, limit, nth=0):
        self.model = model
        self.limit = limit
        self.nth = nth
        self.calls = []

    def __call__(self, x, y):
        self.calls.append(len(x))
        if len(x) > self.limit and len(self.calls) >= self.nth:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.54 GiB.")
        return self.model(x, y)


# -----------------------------------------------------------------------------
# Processes that a test observes and stops

STARTED = []  # the fixture in conftest.py kills those that are left


def start(script, *args, cwd=None):
    """Start a script of the project, or python with a list of arguments.

    Return a Popen whose output can be read line by line while it runs.
    """
    command = [*script] if isinstance(script, list) else [ROOT / script]
    process = subprocess.Popen(
        [sys.executable, *map(str, [*command, *args])],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals if os.name == "posix" else None,
    )
    STARTED.append(process)
    return process


def heed_signals():
    """In a new process, stop ignoring the signals that nohup or a background job ignores."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def start_training(bins, out_dir, **changes):
    """Start train.py with TINY and `changes`."""
    return start("train.py", *flags_of(bins, out_dir, changes))


def wait_for_line(process, beginning):
    """Read the output of a process up to a line with this beginning."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"ended without '{beginning}': {process.stderr.read()}")


def wait_until(condition, seconds=30):
    """Wait until condition() is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.002)


# -----------------------------------------------------------------------------
# Files


def write_parquet(path, texts, **columns):
    """Write a parquet file with a text column (a list or an Arrow array) and other columns."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": texts, **columns})
    parquet.write_table(table, path, row_group_size=100)
    return path


def write_texts(path, texts, key="text"):
    """Write a file of documents, parquet or JSON lines as its name says."""
    import pyarrow
    from pyarrow import parquet

    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"id": ["-"] * len(texts), key: texts}), path)
        return path
    content = "".join(json.dumps({"id": "-", key: text}) + "\n" for text in texts).encode()
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    path.write_bytes(pyarrow.compress(content, codec, asbytes=True) if codec else content)
    return path


def read_files(folder):
    """Return {name: content} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def metrics(out_dir):
    """Return the records of metrics.jsonl."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def losses(out_dir):
    """Return the records of metrics.jsonl without times, speeds and samples."""
    keys = ("iter", "tokens", "train_loss", "val_loss", "train_loss_eval", "lr")
    return [{key: record[key] for key in keys if key in record} for record in metrics(out_dir)]


def load(out_dir, name="ckpt.pt"):
    """Return a checkpoint."""
    return torch.load(out_dir / name, weights_only=True)


# -----------------------------------------------------------------------------
# The same model in transformers


def gpt2_of(checkpoint):
    """Return transformers' GPT-2 with the weights of a checkpoint of architecture "gpt2"."""
    from transformers import GPT2Config, GPT2LMHeadModel

    args = checkpoint["model_args"]
    config = GPT2Config(
        vocab_size=args["vocab_size"],
        n_positions=args["block_size"],
        n_embd=args["n_embd"],
        n_layer=args["n_layer"],
        n_head=args["n_head"],
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    weights = {}
    for name, parameter in model.state_dict().items():
        no_bias = torch.zeros_like(parameter)  # for a model with bias=False
        value = checkpoint["model"].get(name, no_bias)
        is_transposed = re.search(r"(c_attn|c_proj|c_fc)\.weight", name)
        weights[name] = value.T if is_transposed else value
    model.load_state_dict(weights)
    return model


QWEN3_MODULES = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def qwen3_names(weights):
    """Return the weights of architecture "qwen3" under the names that transformers has for them."""
    renamed = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for name, value in weights.items():
        match = re.match(r"transformer\.h\.(\d+)\.(.*)\.weight", name)
        if not match:
            continue
        layer = f"model.layers.{match[1]}"
        module = match[2]
        if module == "attn.c_attn":
            for projection, rows in zip("qkv", value.chunk(3)):
                renamed[f"{layer}.self_attn.{projection}_proj.weight"] = rows
        else:
            renamed[f"{layer}.{QWEN3_MODULES[module]}.weight"] = value
    return renamed


def qwen3_of(checkpoint):
    """Return transformers' Qwen3 with the weights of a checkpoint of architecture "qwen3"."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    args = checkpoint["model_args"]
    config = Qwen3Config(
        vocab_size=args["vocab_size"],
        max_position_embeddings=args["block_size"],
        hidden_size=args["n_embd"],
        intermediate_size=len(checkpoint["model"]["transformer.h.0.mlp.c_fc.weight"]),
        num_hidden_layers=args["n_layer"],
        num_attention_heads=args["n_head"],
        num_key_value_heads=args["n_head"],
        head_dim=args["n_embd"] // args["n_head"],
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    model.load_state_dict(qwen3_names(checkpoint["model"]))
    return model
