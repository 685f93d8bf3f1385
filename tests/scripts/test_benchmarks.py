"""benchmarks/train.py with a very small peer, and benchmarks/gpu.py without a GPU."""

import importlib
import json
import signal
from pathlib import Path

import pytest
import torch

import train as train_script
from helpers import (
    PROGRAMS,
    ROOT,
    TINY,
    assert_one_sentence,
    run,
    run_here,
    start,
    wait_for_line,
)
from model import CHUNK_ROWS

CIRCUMSTANCES = {"command", "commit", "date", "machine", "torch"}


def test_every_benchmark_can_be_imported():
    result = run(PROGRAMS / "import_benchmarks.py")
    assert result.returncode == 0, result.stderr
    assert "benchmarks/memory.py" in result.stdout.splitlines()


# -----------------------------------------------------------------------------
# benchmarks/train.py


def bench(bins, **changes):
    """Run benchmarks/train.py with tiny models."""
    settings = {**TINY, "dataset": bins, "rounds": 1, "seconds": 0.2, **changes}
    return run("benchmarks/train.py", *(f"--{key}={value}" for key, value in settings.items()))


def test_ours_and_the_peer_are_measured_in_turn_and_saved(bins, tmp_path):
    path = tmp_path / "figures.json"
    result = bench(bins, rounds=2, peer=PROGRAMS / "peer", save=path)
    assert result.returncode == 0, result.stderr
    names = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert names == ["ours", "peer", "ours", "peer", "ours / peer"]

    saved = json.loads(path.read_text())
    assert saved.keys() == CIRCUMSTANCES | {"results", "median_tokens_per_s"}
    for name, batch_size in (("ours", 8), ("peer", 4)):
        for figures in saved["results"][name]:
            assert figures["batch_size"] == batch_size
            assert figures["iterations"] >= 1
            assert figures["tokens_per_s"] > 0
    for figures in saved["results"]["ours"]:
        assert 0 <= figures["reading_share"] < 1
    speeds = saved["median_tokens_per_s"]
    assert f"ours / peer: {speeds['ours'] / speeds['peer']:.2f} times" in result.stdout


def test_a_failed_measurement_is_reported_in_one_sentence(tmp_path):
    assert_one_sentence(bench(tmp_path / "nowhere"), "No such file")


# -----------------------------------------------------------------------------
# benchmarks/gpu.py

PARTS = [
    "card",
    "the long night",
    "the short night",
    "int8",
    "nanoGPT",
    "out of memory",
    "resuming",
    "sampling",
    "the first evening",
    "finetuning",
    "switches",
]


@pytest.fixture
def gpu(monkeypatch):
    """The module benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


@pytest.fixture
def run_bench_here(gpu, monkeypatch):
    """Make a Bench run its scripts in this process, which saves a minute of imports."""
    scripts = {
        ROOT / "train.py": train_script,
        ROOT / "benchmarks" / "gpu_measure.py": importlib.import_module("gpu_measure"),
    }
    run_alone = gpu.Bench.run

    def run_bench(bench, script, *arguments, **environment):
        if script not in scripts:
            return run_alone(bench, script, *arguments, **environment)
        result = run_here(scripts[script], *arguments)
        failed = result.returncode and result.stderr.splitlines()[-1]
        return result.stdout.strip(), failed

    monkeypatch.setattr(gpu.Bench, "run", run_bench)
    monkeypatch.setattr("onenight.system.device.MEASURE_S", 0.0)
    monkeypatch.setattr("model.CHUNK_ROWS", CHUNK_ROWS)  # which gpu_measure.py sets
    monkeypatch.setattr("onenight.training.costs.CHUNK_ROWS", CHUNK_ROWS)


def test_gpu_measures_every_part_without_a_gpu_and_a_failure_is_a_line(
    gpu, run_bench_here, tmp_path
):
    data_before = sorted((ROOT / "data").rglob("*"))
    path = tmp_path / "gpu.json"
    result = run_here(gpu, "--device=cpu", "--peer=nowhere", f"--save={path}")
    assert result.returncode == 0, result.stderr
    assert sorted((ROOT / "data").rglob("*")) == data_before

    saved = json.loads(path.read_text())
    assert saved.keys() >= CIRCUMSTANCES | {"tiny", "tflops", "copy_gb_s", "parts"}
    parts = saved["parts"]
    assert list(parts) == PARTS
    table = path.with_suffix(".md").read_text()
    assert table in result.stdout
    assert table.count("\n| ") == 1 + sum(len(rows) for rows in parts.values())

    assert "nowhere/model.py" in parts["nanoGPT"]["peer, first"].pop("failed")
    for rows in parts.values():
        for figures in rows.values():
            assert "failed" not in figures
            assert figures.get("skipped") in (None, "needs a GPU")
    for name in ("the long night", "the short night", "the first evening", "finetuning"):
        own, largest = parts[name].values()
        assert own["plan_gb"] > 0
        assert 0 < own["mfu"] < 1
        assert largest["batch_size"] == 2 * own["batch_size"]
    assert parts["int8"]["torchao's products of integers"] == {"difference": 0}
    assert "note" in parts["int8"]["what --int8 gains"]
    # On a CPU, a resumed run continues bit for bit.
    resumed = parts["resuming"]["losses after a stop, resumed"]
    assert resumed == {"loss_difference": 0, "iters": 10}
    assert parts["sampling"]["8 samples, eager"]["share_of_copying_speed"] > 0
    compared = [name for name, figures in parts["switches"].items() if "gain" in figures]
    assert compared == [
        "residual stream in float32",
        "as it is, again",
    ]


class MadeUpCard:
    """Answers like a GPU when a Bench runs a script, and records what was asked."""

    def __init__(self):
        self.asked = []  # pairs: the first two arguments, and the flags

    def run(self, script, *arguments, **environment):
        flags = {}
        for argument in arguments:
            if str(argument).startswith("--"):
                key, value = argument[2:].split("=", 1)
                flags[key] = value
        self.asked.append((arguments[:2], flags))
        if script.name == "train.py" and "only" not in flags:
            return self.train(Path(flags["out_dir"]), int(flags["batch_size"]))
        if flags.get("cuda_graphs"):
            return "", "RuntimeError: overwritten | by a later run"
        figures = self.measure(flags)
        if arguments[0] == "card":
            figures["device"] = "cuda"
            figures["tflops"] = {"bfloat16": 50.0}
            figures["copy_gb_s"] = 400.0
            figures["multiprocessors"] = 46
        return json.dumps(figures), ""

    def train(self, out_dir, batch_size):
        """A run of 20 iterations whose losses depend on the micro-batch."""
        out_dir.mkdir(exist_ok=True)
        lines = []
        for i in range(20):
            loss = 3.0
            if batch_size == 8:
                loss += i / 1000
            record = {
                "iter": i,
                "train_loss": loss,
                "peak_memory_gb": batch_size / 4,
                "peak_reserved_gb": batch_size / 4 + 0.5,
            }
            lines.append(json.dumps(record) + "\n")
        (out_dir / "metrics.jsonl").write_text("".join(lines))
        printed = ""
        if out_dir.name == "disturbed":
            printed = "out of memory: continuing with --batch_size=8 ..."
        return printed, ""

    def measure(self, flags):
        """Figures whose speed grows with the micro-batch, of which at most 16 windows fit, and 8 of
        nanoGPT's."""
        fitting = 8 if flags.get("only") == "peer" else 16
        size = min(int(flags.get("batch_size", 16)), fitting)
        speed = 1000.0 * size
        if flags.get("float32_stream"):
            speed *= 1.5
        if flags.get("int8") == "True":
            speed *= 1.25
        return {
            "difference": 0,
            "batch_size": size,
            "tokens_per_s": speed,
            "tflops": 20.0,
            "dtype": "bfloat16",
            "windows": 512,
            "plan_gb": 8.0,
            "allocated_gb": 5.0,
            "larger": {"32": 14.0, "64": 27.0},
            "weights_gb_s": 100.0,
        }


def test_gpu_computes_what_to_measure_next_from_the_figures_so_far(gpu, tmp_path, monkeypatch):
    card = MadeUpCard()
    monkeypatch.setattr(gpu.Bench, "run", card.run)
    bench = gpu.Bench(tmp_path, gpu.GpuConfig(peer="somewhere"))
    bench.card["machine"] = "NVIDIA GeForce RTX 4070"
    assert gpu.file_name(bench, "") == "gpu-nvidia-geforce-rtx-4070"
    # The figures of a few parts do not replace those of all.
    assert gpu.file_name(bench, "int8,card") == "gpu-nvidia-geforce-rtx-4070-int8-card"
    about = {"tiny": False, "machine": "a card", "torch": "", "commit": "", "date": ""}
    report = gpu.Report(tmp_path / "gpu.json", about)
    for part in gpu.PARTS:
        gpu.measure_part(part, bench, report)
    parts = report.parts
    assert list(parts) == PARTS

    # 5 GB of 8 planned: 14 GB planned would take 8.75, and 27 would take 17, more than 11.3.
    night = ("training", "config/train_fineweb_4070.py")
    sizes = [flags.get("batch_size") for what, flags in card.asked if what == night]
    assert sizes == [None, "32"]
    assert parts["the long night"]["the config's micro-batch"]["mfu"] == 0.4

    assert parts["int8"]["what --int8 gains"]["gain"] == 0.25
    assert parts["int8"]["what --int8 gains"]["note"].startswith("--int8 is worth a try")

    assert parts["nanoGPT"]["ours / peer"] == {"times": 2.0}
    sizes = [flags["batch_size"] for _, flags in card.asked if "only" in flags]
    assert sizes == ["16", "16", "16", "8", "8"]

    # The whole micro-batch allocates 4 GB, half of it reserves 2.5, and the card keeps 0.7.
    rows = parts["out of memory"]
    assert rows["losses with memory for half, after running out"] == {
        "limit_gb": 3.25 + 0.7,
        "loss_difference": 0,
        "iters": 20,
        "went_on_with": 8,
    }
    half = rows["losses with half the micro-batch, undisturbed"]
    assert half["loss_difference"] == pytest.approx(0.019)
    assert half["differs_from"] == 1

    assert parts["sampling"]["8 samples, compiled"]["share_of_copying_speed"] == 0.25

    switches = parts["switches"]
    assert switches["residual stream in float32"]["gain"] == 0.5
    line = "| switches | CUDA graphs | failed: RuntimeError: overwritten / by a later run |"
    assert line in report.text
    assert "gain" in switches["as it is, again"]  # which comes after the failed one
    assert "skipped" in switches["max-autotune"]  # the card is too small for it


def test_gpu_measures_only_the_parts_asked_for(tmp_path):
    path = tmp_path / "gpu.json"
    flags = ["--device=cpu", "--minutes=0.01", f"--save={path}"]
    assert run("benchmarks/gpu.py", "--parts=int8,card", *flags).returncode == 0
    assert list(json.loads(path.read_text())["parts"]) == ["int8", "card"]

    result = run("benchmarks/gpu.py", "--parts=int8,sound", *flags)
    assert result.returncode == 1
    assert "not sound" in result.stderr


def test_gpu_names_the_parts_that_the_minutes_are_too_short_for(tmp_path):
    path = tmp_path / "gpu.json"
    result = run("benchmarks/gpu.py", "--device=cpu", "--minutes=0.01", f"--save={path}")
    assert result.returncode == 0, result.stderr
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == PARTS
    for rows in parts.values():
        assert rows == {"all of it": {"skipped": "not reached in 0.01 minutes"}}


def test_an_interrupted_gpu_benchmark_keeps_the_figures_so_far(tmp_path):
    path = tmp_path / "gpu.json"
    process = start("benchmarks/gpu.py", "--device=cpu", f"--save={path}")
    wait_for_line(process, "| the long night | the config's micro-batch")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert len(process.stderr.read().splitlines()) == 1
    parts = json.loads(path.read_text())["parts"]
    assert parts["the long night"]["the config's micro-batch"]["tokens_per_s"] > 0


def test_gpu_refuses_a_file_that_is_not_json():
    assert_one_sentence(run("benchmarks/gpu.py", "--save=figures.txt"), "must end in .json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_refuses_a_gpu_that_is_not_there():
    result = run("benchmarks/gpu.py", "--device=cuda")
    assert_one_sentence(result, "device=cuda is not available here")
