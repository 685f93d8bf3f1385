"""What the tests share: running the stage scripts as a user does, small data, small models."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from onenight.device import Ranks
from onenight.train_config import TrainConfig
from onenight.trainer import Trainer

import numpy as np
import pytest
import torch

import train as train_script

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # more only wait for one another in models this small


def run(script, *args, cwd=None, env=None):
    """Runs a script of the project to its end; env changes the environment (None removes). Returns text output."""
    command = [sys.executable, ROOT / script, *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    env = {key: value for key, value in env.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def assert_one_sentence(result, words):
    """A refusal: not zero, one line on stderr with these words in it, no traceback."""
    assert result.returncode not in (0, None)
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def write_parquet(path, texts, row_group_size=100, **columns):
    """A parquet file with a text column (a list or an Arrow array) and others."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts, **columns}), path, row_group_size=row_group_size)
    return path


def gpt2_of(checkpoint):
    """transformers' GPT-2 with the weights of one of our checkpoints."""
    from transformers import GPT2Config, GPT2LMHeadModel

    args = checkpoint["model_args"]
    config = GPT2Config(
        vocab_size=args["vocab_size"], n_positions=args["block_size"], n_embd=args["n_embd"], n_layer=args["n_layer"],
        n_head=args["n_head"], activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    weights = {}
    for name, like in model.state_dict().items():
        value = checkpoint["model"].get(name, torch.zeros_like(like))  # the biases that bias=False lacks
        weights[name] = value.T if re.search(r"(c_attn|c_proj|c_fc)\.weight", name) else value
    model.load_state_dict(weights)
    return model


def qwen3_names(weights):
    """Our qwen3 tensors by the names that transformers has for them."""
    named = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    theirs = {
        "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm", "attn.c_proj": "self_attn.o_proj", "mlp.c_gate": "mlp.gate_proj",
        "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    }  # fmt: skip
    for name, value in weights.items():
        layer = re.match(r"transformer\.h\.(\d+)\.(.*)\.weight", name)
        if layer and layer[2] == "attn.c_attn":
            for part, rows in zip("qkv", value.chunk(3)):
                named[f"model.layers.{layer[1]}.self_attn.{part}_proj.weight"] = rows
        elif layer:
            named[f"model.layers.{layer[1]}.{theirs[layer[2]]}.weight"] = value
    return named


def qwen3_of(checkpoint):
    """transformers' Qwen3 with the weights of one of our checkpoints."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    args = checkpoint["model_args"]
    config = Qwen3Config(
        vocab_size=args["vocab_size"], max_position_embeddings=args["block_size"], hidden_size=args["n_embd"],
        intermediate_size=len(checkpoint["model"]["transformer.h.0.mlp.c_fc.weight"]),
        num_hidden_layers=args["n_layer"], num_attention_heads=args["n_head"], num_key_value_heads=args["n_head"],
        head_dim=args["n_embd"] // args["n_head"], rms_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.load_state_dict(qwen3_names(checkpoint["model"]))
    return model


TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "gradient_accumulation_steps": 2,
    "max_iters": 45, "lr_decay_iters": 45, "warmup_iters": 5, "learning_rate": 1e-2, "min_lr": 1e-3,
    "eval_interval": 20, "eval_iters": 1, "device": "cpu", "compile": False,
}  # fmt: skip
VOCAB_SIZE = 250  # padded to 256 by train.py


def make_bins(folder, vocab_size=VOCAB_SIZE, train_tokens=20_000, val_tokens=2500):
    """Bins that are easy to learn: a walk over the ids whose next step depends on the last id, with noise."""
    random = np.random.default_rng(0)
    successor = random.permutation(vocab_size)
    for split, n_tokens in (("train", train_tokens), ("val", val_tokens)):
        ids = np.zeros(n_tokens, np.uint16)
        for i in range(1, n_tokens):
            ids[i] = successor[ids[i - 1]] if random.random() < 0.9 else random.integers(vocab_size)
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return folder


@pytest.fixture(scope="session")
def bins(tmp_path_factory):
    return make_bins(tmp_path_factory.mktemp("bins"))


def flags_of(bins, out_dir, changes):
    settings = {**TINY, "dataset": bins, "out_dir": out_dir, **changes}
    return [f"--{key}={value}" for key, value in settings.items()]


def train(bins, out_dir, *, env=None, **changes):
    return run("train.py", *flags_of(bins, out_dir, changes), env=env)


def train_here(bins, out_dir, **changes):
    """As train(), but in this process, which saves three seconds of imports and measurements."""
    with mock.patch.object(train_script, "measure_tflops", return_value=1.0):
        return run_here(train_script, *flags_of(bins, out_dir, changes))


def run_here(script, *args, stdin=b""):
    """As run(), of a script that has been imported; what it does to streams and signals is undone."""
    streams = [io.TextIOWrapper(io.BytesIO(content), encoding="utf-8") for content in (stdin, b"", b"")]
    before, returncode = (sys.stdin, sys.stdout, sys.stderr), 0
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    sys.stdin, sys.stdout, sys.stderr = streams
    try:
        script.main([str(argument) for argument in args])
    except SystemExit as end:
        returncode = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if isinstance(end.code, str) else "", end="", file=sys.stderr)
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
    for stream in streams[1:]:
        stream.flush()
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in streams[1:])
    return subprocess.CompletedProcess(args, returncode, stdout, stderr)


def make_trainer(bins, **changes):
    """The Trainer of train_here()."""
    config = TrainConfig(**{**TINY, "dataset": str(bins), **changes})
    return Trainer(config, torch.device("cpu"), "float32", Ranks())


STARTED = []


def start_training(bins, out_dir, **changes):
    return start("train.py", *flags_of(bins, out_dir, changes))


def start(script, *args, cwd=None, stdin=None):
    """Starts a script of the project, or another program (a list): a Popen whose lines come as they are printed."""
    command = [*script] if isinstance(script, list) else [ROOT / script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *map(str, [*command, *args])]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env, "cwd": cwd}
    process = subprocess.Popen(command, stdin=stdin, **options, preexec_fn=hear_signals if os.name == "posix" else None)
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Kills what a failed test has left running."""
    yield
    while STARTED:
        STARTED.pop().kill()


def hear_signals():
    """In a new process: the signals that nohup, or a shell's background, may have told the tests to ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def stop(process, number=signal.SIGINT):
    """Sends the signal; returns what was printed after it, and the seconds until the end."""
    sent = time.monotonic()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    return stdout, time.monotonic() - sent


def wait_for_line(process, beginning):
    """Reads the output up to a line that begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"ended without '{beginning}': {process.stderr.read()}")


def wait_for_iter(process, number):
    """Reads the output of train.py up to iteration `number`, or the first one after it that is printed."""
    for line in process.stdout:
        iteration = re.match(r"iter (\d+):", line)
        if iteration and int(iteration[1]) >= number:
            return
    raise AssertionError(f"ended before iter {number}: {process.stderr.read()}")


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.002)


def copy_project(folder):
    """A copy of the project without what the stages wrote, to be changed by a test."""
    leave = shutil.ignore_patterns(".*", "__pycache__", "out*", "wandb", "*.bin", "*.parquet")
    return shutil.copytree(ROOT, folder, ignore=leave)


class SmallMemory:
    """A model that runs out of memory, as CUDA says it, with over `limit` rows, from the `nth` call on."""

    def __init__(self, model, limit, nth=0):
        self.model, self.limit, self.nth, self.calls = model, limit, nth, []
        self.config, self.lm_head = model.config, model.lm_head

    def __call__(self, ids, *arguments, **more):
        self.calls.append(len(ids))
        if len(ids) > self.limit and len(self.calls) >= self.nth:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.54 GiB.")
        return self.model(ids, *arguments, **more)


def metrics(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def load(out_dir, name="ckpt.pt"):
    return torch.load(out_dir / name, weights_only=True)


def losses(out_dir):
    """The metrics without the times."""
    kept = ("iter", "tokens", "train_loss", "val_loss", "train_loss_eval", "lr")
    return [{key: record[key] for key in kept if key in record} for record in metrics(out_dir)]
