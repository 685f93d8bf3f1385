"""benchmarks/: gpu.py without a GPU, train.py with a very small peer, and rows of proxy.py."""

import importlib
import importlib.util
import json
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import sample as sample_script
import train as train_script
from helpers import PROGRAMS, ROOT, flags_of, run_here, write_parquet
from onenight.errors import UserError
from onenight.tokenizer import read_ranks
from onenight.trainer import Trainer

PEER = f"--peer={PROGRAMS / 'peer'}"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


@pytest.fixture
def proxy(gpu):
    return importlib.import_module("proxy")


@pytest.fixture
def benchmark(gpu):
    """benchmarks/train.py, under another name than the train.py of the project."""
    path = ROOT / "benchmarks" / "train.py"
    spec = importlib.util.spec_from_file_location("benchmarks_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -----------------------------------------------------------------------------
# gpu.py


@pytest.fixture
def run_scripts_here(gpu, benchmark, monkeypatch):
    """Make gpu.py work in this process, which saves minutes of imports, and the scripts without
    pictures and samples."""
    scripts = {
        "train.py": train_script,
        "sample.py": sample_script,
        "benchmarks/train.py": benchmark,
    }
    accumulate = Trainer.accumulate

    def run_script(bench, script, arguments, stdin="", stop_after=0):
        def accumulate_or_stop(trainer):
            if stop_after and trainer.progress.iter_num == stop_after:
                signal.raise_signal(signal.SIGTERM)
            return accumulate(trainer)

        monkeypatch.setattr(Trainer, "accumulate", accumulate_or_stop)
        result = run_here(scripts[script], *arguments, stdin=stdin.encode())
        if result.returncode and not stop_after:
            raise UserError(result.stderr)
        return result.stdout + result.stderr

    def make_pool(workers, context):
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(gpu, "run", run_script)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", make_pool)
    monkeypatch.setattr("onenight.records.draw_losses", lambda *arguments: None)
    monkeypatch.setattr("onenight.trainer.begin_document", lambda *arguments: "")


def test_gpu_measures_every_part_with_tiny_models(gpu, run_scripts_here, tmp_path):
    path = tmp_path / "gpu.json"
    result = run_here(gpu, "--device=cpu", PEER, f"--save={path}")
    assert result.returncode == 0, result.stderr
    saved = json.loads(path.read_text())
    assert saved.keys() >= {"command", "commit", "date", "machine", "torch"}
    parts = saved["parts"]
    assert list(parts) == list(gpu.PARTS)
    skipped = [part for part, rows in parts.items() for row in rows.values() if "skipped" in row]
    assert skipped == ["memory"]  # which needs a GPU
    table = path.with_suffix(".md").read_text()
    assert "failed" not in table
    for line in table.splitlines()[-5:]:
        assert line in result.stdout

    for part in ("short", "long"):
        (figures,) = parts[part].values()
        assert list(figures["losses"]) == ["0", "1", "2", "3", "4", "5"]
        for name in ("tokens_per_s", "planned_tokens_per_s", "tflops", "planned_gb"):
            assert figures[name] > 0
    # Rounding changes the losses, but 6 updates of this model hardly do.
    assert 0 < parts["int8"]["with int8 / without"]["loss_difference"] < 0.01
    assert parts["peer"]["ours / peer"]["times"] > 0
    assert parts["sampling"]["8 samples"]["tokens_per_s"] > 0
    # On a CPU, a run that is stopped and resumed is exactly an uninterrupted one.
    resumed = parts["resuming"]["stopped and resumed"]
    assert resumed == {"resumed_at": 10, "loss_difference": 0}


def test_a_part_of_gpu_that_fails_or_is_not_reached_is_a_line(gpu, tmp_path, monkeypatch):
    bench = gpu.Bench(tmp_path, SimpleNamespace(minutes=1), is_tiny=True, end=0.0)
    assert [figures.keys() for _, figures in gpu.measure("short", bench)] == [{"skipped"}]
    bench.end = math.inf
    monkeypatch.setattr(gpu, "run", lambda *arguments, **options: 1 / 0)
    assert [figures.keys() for _, figures in gpu.measure("short", bench)] == [{"failed"}]


# -----------------------------------------------------------------------------
# train.py


def test_ours_and_the_peer_are_measured_each_with_what_fits(benchmark, bins, tmp_path, monkeypatch):
    def measure_here(arguments, name):
        result = run_here(benchmark, *arguments, f"--only={name}")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    monkeypatch.setattr(benchmark, "measure_alone", measure_here)
    path = tmp_path / "figures.json"
    flags = flags_of(bins, tmp_path, {"rounds": 1, "seconds": 0.1, "save": path})
    result = run_here(benchmark, *flags, PEER)
    assert result.returncode == 0, result.stderr
    names = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert names == ["ours", "peer", "ours / peer"]
    saved = json.loads(path.read_text())
    for name, batch_size in (("ours", 8), ("peer", 4)):
        (figures,) = saved["results"][name]
        assert figures["batch_size"] == batch_size
        assert figures["iterations"] >= 1
        assert saved["median_tokens_per_s"][name] == figures["tokens_per_s"] > 0


# -----------------------------------------------------------------------------
# proxy.py


def test_the_data_of_the_proxy_are_the_texts_with_every_fourth_block_twice(proxy, tmp_path):
    texts = {
        "train": ["Once upon a time. " * 300, "é 中文 and the end"],
        "val": ["A wolf.", "", "B"],
    }
    flags = [
        f"--{split}={write_parquet(tmp_path / f'{split}.parquet', texts[split])}" for split in texts
    ]
    result = run_here(proxy, "data", *flags, f"--dataset={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "meta.json").read_text()) == {"vocab_size": 4096}
    tokens = {rank: token for token, rank in read_ranks().items() if rank < 4095}
    tokens[4095] = b"|"

    def decode(ids):
        return b"".join(tokens[int(i)] for i in ids)

    assert decode(np.fromfile(tmp_path / "val.bin", "<u2")) == b"A wolf.|B|"
    blocks = np.fromfile(tmp_path / "train.bin", "<u2").reshape(-1, 5, 64)
    assert (blocks[:, 3] == blocks[:, 4]).all()
    text = "|".join([*texts["train"], ""]).encode()
    read = decode(blocks[:, :4].reshape(-1))
    assert len(read) > 1000
    assert text.startswith(read)


def test_rows_of_the_proxy_are_trained_and_compared(proxy, bins, tmp_path):
    results = tmp_path / "rows.jsonl"
    settings = {
        "n_layer": 1,
        "n_embd": 32,
        "block_size": 32,
        "tokens_per_iter": 512,
        "tokens": 512 * 40,
        "compile": False,
        "dtype": "float32",
        "dataset": bins,
        "results": results,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    for changes in ([], ["--without=row_norm,cautious,lookahead,slow_share"]):
        result = run_here(proxy, "row", *flags, *changes)
        assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [512 * 40] * 2
    assert "without" in rows[1]["changes"]
    losses = [row["val_loss"][-1][1] for row in rows]
    assert max(losses) < 5  # 5.5 is that of guessing among 250 ids
    assert losses[0] != losses[1]
    assert run_here(proxy, "row", *flags, "--without=sound").returncode == 1


def test_the_table_has_differences_of_means_and_their_standard_errors(proxy, tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for changes, seed, loss in (("", 1, 4.0), ("", 2, 4.2), ("--a", 1, 4.1), ("--a", 2, 4.3)):
            row = {"row": "recipe", "changes": changes, "seed": seed, "tokens": 1_000_000}
            file.write(json.dumps({**row, "val_loss": [[500_000, 9.0], [1_000_000, loss]]}) + "\n")
    result = run_here(proxy, "table", f"--results={path}")
    *_, base, other = result.stdout.splitlines()
    assert base == "| recipe | 4.0000, 4.2000 |  |"
    # Each mean of two has a variance of 0.02 / 2.
    assert other == "| recipe a | 4.1000, 4.3000 | +0.1000 ± 0.1414 |"
