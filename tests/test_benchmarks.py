"""benchmarks/: gpu.py without a GPU, train.py with a very small peer, and rows of proxy.py."""

import importlib
import importlib.util
import json

import numpy as np
import pytest

import sample as sample_script
import train as train_script
from helpers import PROGRAMS, ROOT, TINY, run, run_here, write_parquet
from onenight.errors import UserError
from onenight.tokenizer import read_ranks


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


@pytest.fixture
def proxy(gpu):
    return importlib.import_module("proxy")


# -----------------------------------------------------------------------------
# gpu.py


@pytest.fixture
def run_scripts_here(gpu, monkeypatch):
    """Make gpu.py run the scripts in this process, which saves minutes of imports, and without
    their pictures and samples. The one that a signal stops is a process nevertheless."""
    path = ROOT / "benchmarks" / "train.py"
    spec = importlib.util.spec_from_file_location("benchmarks_train", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    scripts = {
        "train.py": train_script,
        "sample.py": sample_script,
        "benchmarks/train.py": benchmark,
    }
    run_alone = gpu.run

    def run_script(bench, script, arguments, stdin="", stop_after=0):
        if stop_after:
            return run_alone(bench, script, arguments, stdin, stop_after)
        result = run_here(scripts[script], *arguments, stdin=stdin.encode())
        if result.returncode:
            raise UserError(result.stderr)
        return result.stdout + result.stderr

    monkeypatch.setattr(gpu, "run", run_script)
    monkeypatch.setattr("onenight.plan.MEASURED_S", 0.0)
    monkeypatch.setattr("onenight.records.draw_losses", lambda *arguments: None)
    monkeypatch.setattr("onenight.trainer.begin_document", lambda *arguments: "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # also in the one that is stopped


def test_gpu_measures_every_part_with_tiny_models(gpu, run_scripts_here, tmp_path):
    path = tmp_path / "gpu.json"
    result = run_here(gpu, "--device=cpu", f"--peer={PROGRAMS / 'peer'}", f"--save={path}")
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
    assert 0 < resumed.pop("resumed_at") < 20
    assert resumed == {"loss_difference": 0}


def test_a_failed_part_of_gpu_is_a_line_and_the_others_are_measured(gpu, monkeypatch, tmp_path):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "LONG_NIGHT", "config/nowhere.py")
    flags = ["--device=cpu", "--parts=peer,memory", f"--peer={PROGRAMS / 'peer'}"]
    result = run_here(gpu, *flags, f"--save={path}")
    assert result.returncode == 0, result.stderr
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == ["peer", "memory"]
    assert "nowhere" in parts["peer"]["the rest"]["failed"]


def test_gpu_names_the_parts_that_the_minutes_are_too_short_for(gpu, tmp_path):
    path = tmp_path / "gpu.json"
    flags = ["--device=cpu", "--parts=short,resuming", "--minutes=1e-9", f"--save={path}"]
    assert run_here(gpu, *flags).returncode == 0
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == ["short", "resuming"]
    for rows in parts.values():
        assert list(rows["the rest"]) == ["skipped"]


def test_gpu_refuses_an_unknown_part(gpu):
    result = run_here(gpu, "--parts=int8,sound")
    assert result.returncode == 1
    assert "sound" in result.stderr


def test_the_limited_run_has_memory_for_half_of_its_micro_batch(gpu, monkeypatch):
    """With a made-up card, on which a window takes 0.25 GB, and 0.5 more are reserved."""

    def train(bench, file, *changes):
        flags = dict(flag[2:].split("=") for flag in " ".join(changes).split())
        size = int(flags["batch_size"])
        available = float(flags.get("vram_limit_gb", 12)) - 0.7  # what the card keeps
        while size / 4 > available:
            size //= 2
        losses = {0: 3.0, 1: 2.0 + size / 1000, 2: 1.0 + size / 100}
        return {
            "batch_size": size,
            "peak_gb": size / 4,
            "reserved_gb": size / 4 + 0.5,
            "losses": losses,
        }

    monkeypatch.setattr(gpu, "train", train)
    (_, undisturbed), (_, limited) = gpu.memory(gpu.Bench(None, None, is_tiny=False, end=0))
    assert undisturbed == {"loss_difference": pytest.approx(0.08), "differs_from": 1}
    # Between the 4 GB of the whole micro-batch and the 2.5 of half of it.
    assert limited == {"limit_gb": 3.25 + 0.7, "batch_size": 8, "loss_difference": 0}


# -----------------------------------------------------------------------------
# train.py


def test_ours_and_the_peer_are_measured_each_with_what_fits(bins, tmp_path):
    path = tmp_path / "figures.json"
    settings = {**TINY, "dataset": bins, "rounds": 1, "seconds": 0.1, "save": path}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    result = run("benchmarks/train.py", *flags, f"--peer={PROGRAMS / 'peer'}")
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
