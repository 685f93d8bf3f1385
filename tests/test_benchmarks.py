"""benchmarks/train.py as a process, with a very small peer, and the recipe proxy's own optimizer and runs."""

import json
import runpy
import signal
from pathlib import Path

import torch
from conftest import ROOT, TINY, assert_one_sentence, run, wait_for_line
from conftest import start as start_script

PEER = '''
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    bias: bool
    vocab_size: int
    dropout: float

class GPT(torch.nn.Module):
    """Predicts a token from the one before it; has no room for more than 4 windows."""
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets):
        if len(idx) > 4:
            raise torch.OutOfMemoryError
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''


def bench(bins, **changes):
    settings = {**TINY, "dataset": bins, "rounds": 1, "seconds": 0.2, **changes}
    return run("benchmarks/train.py", *(f"--{key}={value}" for key, value in settings.items()))


def test_both_are_measured_and_the_figures_saved(bins, tmp_path):
    (tmp_path / "model.py").write_text(PEER)
    result = bench(bins, rounds=2, peer=tmp_path, save=tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "ours",
        "peer",
        "ours",
        "peer",
        "ours / peer",
    ]
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert saved.keys() >= {"command", "commit", "date", "machine", "torch", "results", "median_tokens_per_s"}
    for name, batch_size in (("ours", 8), ("peer", 4)):
        for figures in saved["results"][name]:
            assert figures["batch_size"] == batch_size
            assert figures["iterations"] >= 1 and figures["tokens_per_s"] > 0
    assert all(0 <= figures["reading_share"] < 1 for figures in saved["results"]["ours"])
    ours, peer = (saved["median_tokens_per_s"][name] for name in ("ours", "peer"))
    assert f"ours / peer: {ours / peer:.2f} times" in result.stdout


def test_a_measurement_that_fails_is_one_sentence(tmp_path):
    assert_one_sentence(bench(tmp_path / "nowhere"), "No such file")


CHANGES = runpy.run_path(ROOT / "benchmarks/recipe/changes.py")
SHAPES = [(64, 32), (32, 64), (64, 32), (32, 32)]


def updated(optimizer, steps=10, **options):
    """Matrices of those shapes before and after so many steps on random gradients, the same ones each time."""
    random = torch.Generator().manual_seed(0)
    before = [torch.randn(shape, generator=random) for shape in SHAPES]
    after = [torch.nn.Parameter(weight.clone()) for weight in before]
    muon = optimizer(after, lr=0.02, momentum=0.95, **options)
    for _ in range(steps):
        for weight in after:
            weight.grad = torch.randn(weight.shape, generator=random)
        muon.step()
    return before, [weight.detach() for weight in after]


def test_the_proxys_muon_without_its_options_is_torchs():
    before, theirs = updated(torch.optim.Muon, weight_decay=0.1)
    _, ours = updated(CHANGES["Muon"], weight_decay=0.1)
    for start, one, other in zip(before, theirs, ours):
        # Both compute in bfloat16, which has 8 bits, but in another order of additions, in five rounds.
        assert (one - other).norm() < 0.02 * (one - start).norm()


def test_normuons_first_update_has_rows_of_one_length():
    def spread(weights, start):
        moved = weights - start  # along its longer side each row, or column, is one output or input
        lengths = moved.norm(dim=1 if len(moved) >= moved.size(1) else 0)
        return (lengths.max() / lengths.min()).item()

    before, plain = updated(CHANGES["Muon"], steps=1, weight_decay=0.0)
    _, even = updated(CHANGES["Muon"], steps=1, weight_decay=0.0, row_norm=True)
    for start, one, other in zip(before, plain, even):
        assert spread(other, start) < 1.001 < 1.1 < spread(one, start)
        assert abs((other - start).norm() / (one - start).norm() - 1) < 0.01  # the length of the whole is kept


def test_cautious_decay_leaves_weights_that_the_update_makes_larger():
    before, without = updated(CHANGES["Muon"], steps=1, weight_decay=0.0)
    _, cautious = updated(CHANGES["Muon"], steps=1, weight_decay=0.5, cautious=True)
    for start, plain, decayed in zip(before, without, cautious):
        agree = (plain - start) * start < 0
        torch.testing.assert_close(decayed, plain - 0.02 * 0.5 * start * agree)
        assert 0 < agree.float().mean() < 1


def proxy(bins, row, save, *changes):
    sizes = {"n_layer": 1, "n_embd": 32, "block_size": 32, "tokens": 32 * 16 * 40, "compile": False, "save": save}
    flags = [f"--{key}={value}" for key, value in {**sizes, "dtype": "float32", "dataset": bins}.items()]
    return run("benchmarks/recipe/run.py", row, *flags, *(f"--{change}" for change in changes))


def test_a_run_of_the_proxy_is_saved_with_its_changes(bins, tmp_path):
    save = tmp_path / "rows.jsonl"
    changes = ("normuon", "cautious", "lookahead", "tail_average", "matrix_warmdown=0.8")
    for flags in ((), changes):
        result = proxy(bins, "muon-qwen3", save, *flags)
        assert result.returncode == 0, result.stderr
    plain, changed = (json.loads(line) for line in save.read_text().splitlines())
    assert plain["tokens"] == changed["tokens"] == 32 * 16 * 40
    assert all(change in changed["changes"] for change in changes)
    losses = [row["val_loss"][-1][1] for row in (plain, changed)]
    assert max(losses) < 5 and losses[0] != losses[1]  # 5.5 is the loss of one of 250 ids at random


def test_a_change_of_muon_is_refused_for_adamw(bins, tmp_path):
    assert_one_sentence(proxy(bins, "adamw-qwen3", tmp_path / "rows.jsonl", "normuon"), "change Muon")


PARTS = [
    "card", "the night", "the short night", "nanoGPT", "out of memory", "resuming", "sampling", "the first evening",
    "more training", "switches",
]  # fmt: skip


def test_gpu_measures_every_part_without_a_gpu_and_one_that_fails_is_a_line(tmp_path):
    data = sorted((ROOT / "data").rglob("*"))
    result = run("benchmarks/gpu.py", "--device=cpu", "--peer=nowhere", f"--save={tmp_path / 'gpu.json'}")
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved.keys() >= {"command", "commit", "date", "machine", "torch", "tiny", "tflops", "copy_gb_s", "parts"}
    parts = saved["parts"]
    assert list(parts) == PARTS
    assert "nowhere/model.py" in parts["nanoGPT"]["peer, first"].pop("failed")
    for rows in parts.values():
        for figures in rows.values():
            assert "failed" not in figures
            assert figures.get("skipped") in (None, "needs a GPU")
    for name in ("the night", "the short night", "the first evening", "more training"):
        own, largest = parts[name].values()
        assert own["plan_gb"] > 0 and 0 < own["mfu"] < 1 and largest["batch_size"] == 2 * own["batch_size"]
    assert parts["resuming"]["losses after a stop, resumed"] == {"loss_difference": 0, "iters": 10}  # bit for bit
    assert parts["sampling"]["8 samples, eager"]["share_of_bandwidth"] > 0
    assert [name for name, figures in parts["switches"].items() if "gain" in figures] == [
        "1,024 rows of the head at once",
        "4,096 rows of the head at once",
        "residual stream in bfloat16",
        "as it is, again",
    ]
    table = (tmp_path / "gpu.md").read_text()
    assert table in result.stdout
    assert table.count("\n| ") == 1 + sum(map(len, parts.values()))  # and the head
    assert sorted((ROOT / "data").rglob("*")) == data


def test_gpu_asks_of_a_gpu_what_follows_from_its_figures(tmp_path, monkeypatch):
    """The full form, with answers made up in place of a card: what is asked next, and what is computed from them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu, asked = runpy.run_path(ROOT / "benchmarks/gpu.py"), []

    def answer(bench, script, *arguments, **environment):
        flags = dict(flag[2:].split("=", 1) for flag in arguments if str(flag).startswith("--"))
        asked.append((arguments[:2], flags))
        if script.name == "train.py" and "only" not in flags:
            out_dir, size = Path(flags["out_dir"]), int(flags["batch_size"])
            out_dir.mkdir(exist_ok=True)
            losses = [3 + (size == 8) * i / 1000 for i in range(20)]
            peaks = {"peak_memory_gb": size / 4, "peak_reserved_gb": size / 4 + 0.5}
            rows = [{"iter": i, "train_loss": loss, **peaks} for i, loss in enumerate(losses)]
            (out_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return "out of memory: going on with --batch_size=8 ..." * ("disturbed" in str(out_dir)), ""
        if flags.get("cuda_graphs"):
            return "", "RuntimeError: overwritten | by a later run"
        size = min(int(flags.get("batch_size", 16)), 8 if flags.get("only") == "peer" else 16)
        speed = 1000.0 * size * (1.5 if flags.get("bfloat16_stream") else 1)
        figures = {"batch_size": size, "tokens_per_s": speed, "tflops": 20.0, "dtype": "bfloat16", "windows": 512}
        figures |= {"plan_gb": 8.0, "allocated_gb": 5.0, "larger": {"32": 14.0, "64": 27.0}, "weights_gb_s": 100.0}
        if arguments[0] == "card":
            figures |= {"device": "cuda", "tflops": {"bfloat16": 50.0}, "copy_gb_s": 400.0, "multiprocessors": 46}
        return json.dumps(figures), ""

    bench, config = gpu["Bench"], gpu["GpuConfig"](peer="somewhere")
    monkeypatch.setattr(bench, "run", answer)
    bench = bench(tmp_path, config)
    about = {"tiny": False, "machine": "a card", "torch": "", "commit": "", "date": ""}
    report = gpu["Report"](tmp_path / "gpu.json", about)
    for part, measure, limit_s in gpu["PARTS"]:
        gpu["measure_part"](part, measure, limit_s, bench, report)
    parts = report.parts
    assert list(parts) == PARTS
    # 5 GB of 8 planned: 14 planned take 8.75, and 27 take 17, over 11.3.
    night = [flags for what, flags in asked if what == ("training", "config/train_fineweb_4070.py")]
    assert [flags.get("batch_size") for flags in night] == [None, "32"]
    assert parts["the night"]["the config's micro-batch"]["mfu"] == 0.4
    assert parts["nanoGPT"]["ours / peer"] == {"times": 2.0}
    assert [flags["batch_size"] for _, flags in asked if "only" in flags] == ["16", "16", "16", "8", "8"]
    disturbed = parts["out of memory"]["losses with memory for half, after running out"]
    # 4 GB allocated by the one, 2.5 reserved by the other, and the card's reserve
    assert disturbed == {"limit_gb": 3.25 + 0.7, "loss_difference": 0, "iters": 20, "went_on_with": 8}
    apart = parts["out of memory"]["losses with half the micro-batch, undisturbed"]["loss_difference"]
    assert abs(apart - 0.019) < 1e-9
    assert parts["sampling"]["8 samples, compiled"]["share_of_bandwidth"] == 0.25
    assert parts["switches"]["residual stream in bfloat16"]["gain"] == 0.5
    assert "| switches | CUDA graphs | failed: RuntimeError: overwritten / by a later run |" in report.text
    assert "gain" in parts["switches"]["as it is, again"]  # which comes after the one that failed
    assert "skipped" in parts["switches"]["max-autotune"]  # the card is too small for it


def test_gpu_names_the_parts_that_the_minutes_are_too_short_for(tmp_path):
    result = run("benchmarks/gpu.py", "--device=cpu", "--minutes=0.01", f"--save={tmp_path / 'gpu.json'}")
    assert result.returncode == 0, result.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == PARTS
    assert all(rows == {"all of it": {"skipped": "not reached in 0.01 minutes"}} for rows in parts.values())


def test_gpu_keeps_what_was_measured_when_it_is_interrupted(tmp_path):
    process = start_script("benchmarks/gpu.py", "--device=cpu", f"--save={tmp_path / 'gpu.json'}")
    wait_for_line(process, "| the night | the config's micro-batch")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.stderr.read().count("\n") == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["the night"]["the config's micro-batch"]["tokens_per_s"] > 0


def test_gpu_refuses_in_one_sentence(tmp_path):
    assert_one_sentence(run("benchmarks/gpu.py", "--save=figures.txt"), "must end in .json")
    if not torch.cuda.is_available():
        assert_one_sentence(run("benchmarks/gpu.py", "--device=cuda"), "device=cuda is not available here")
