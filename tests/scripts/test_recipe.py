"""benchmarks/recipe/: the rows of the proxy, and the arms of gpu_ab.py."""

import importlib
import json
import math

import pytest
import torch

from configurator import UserError
from helpers import ROOT, TINY, run
from model import GPT, GPTConfig
from onenight.system.distributed import Ranks
from onenight.training.int8 import use_int8
from onenight.training.trainer import Trainer


@pytest.fixture
def import_module(monkeypatch):
    """A function that imports a module of benchmarks/recipe/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "recipe")
    return importlib.import_module


# -----------------------------------------------------------------------------
# run.py

TOKENS = 32 * 16 * 40  # 40 iterations


def row_arguments(bins, row, save, *changes):
    """Return the arguments of run.py that train a row of the proxy with a tiny model."""
    settings = {
        "n_layer": 1,
        "n_embd": 32,
        "block_size": 32,
        "tokens": TOKENS,
        "compile": False,
        "dtype": "float32",
        "dataset": bins,
        "save": save,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return [row, *flags, *(f"--{change}" for change in changes)]


def test_a_row_is_saved_with_its_changes(import_module, bins, tmp_path):
    save = tmp_path / "rows.jsonl"
    changes = ("normuon", "cautious", "lookahead=0.6", "tail_average", "matrix_warmdown=0.8")
    import_module("run").main(row_arguments(bins, "muon-qwen3", save))
    script = "benchmarks/recipe/run.py"
    result = run(script, *row_arguments(bins, "muon-qwen3", save, *changes))
    assert result.returncode == 0, result.stderr
    plain, changed = [json.loads(line) for line in save.read_text().splitlines()]
    assert plain["tokens"] == TOKENS
    assert changed["tokens"] == TOKENS
    for change in changes:
        assert change not in plain["changes"]
        assert change in changed["changes"]
    losses = [row["val_loss"][-1][1] for row in (plain, changed)]
    assert max(losses) < 5  # 5.5 is that of guessing among 250 ids
    assert losses[0] != losses[1]


def test_a_change_to_muon_is_refused_for_adamw(import_module, bins, tmp_path):
    with pytest.raises(UserError, match="need --optimizer=muon"):
        import_module("run").main(
            row_arguments(bins, "adamw-qwen3", tmp_path / "rows.jsonl", "normuon")
        )


# -----------------------------------------------------------------------------
# rounded.py

SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64, bias=False)


def test_products_from_int8_are_those_of_rounded_operands(import_module):
    rounded = import_module("rounded")
    torch.manual_seed(0)
    a = torch.randn(24, 40)
    b = torch.randn(40, 32)
    a_scale = a.abs().amax(1, keepdim=True) / 127
    b_scale = b.abs().amax(0, keepdim=True) / 127
    a_integers = (a / a_scale).round().to(torch.int8)
    b_integers = (b / b_scale).round().to(torch.int8)
    exact = torch._int_mm(a_integers, b_integers) * a_scale * b_scale
    # In float32 the only differences are quotients next to a half, which may round otherwise.
    one_unit = a_scale * b_scale * 127
    result = rounded.multiply(a, b, from_int8=True)
    assert ((result - exact).abs() < 1e-4 + one_unit).all()
    # In bfloat16 the product and the result are rounded as well, to 8 bits.
    narrow = rounded.multiply(a.bfloat16(), b.bfloat16(), from_int8=True).float()
    assert (narrow - exact).norm() < 2**-6 * exact.norm()
    assert (narrow - a @ b).norm() > 2**-9 * exact.norm()


def test_only_the_asked_products_of_the_asked_layers_are_from_int8(import_module, monkeypatch):
    rounded = import_module("rounded")
    calls = []
    multiply = rounded.multiply

    def noted(a, b, from_int8):
        calls.append(from_int8)
        return multiply(a, b, from_int8)

    monkeypatch.setattr(rounded, "multiply", noted)
    gpt = GPT(SHAPE)
    rounded.round_products(gpt, ("output", "grad_weight"), last_of_mlp=False, reuse=False)
    ids = torch.zeros(2, 16, dtype=torch.long)
    gpt(ids, ids)[1].backward()
    assert type(gpt.transformer.h[0].mlp.c_proj) is torch.nn.Linear
    # Three layers forward, and each with two products backward.
    assert calls[:3] == [True] * 3
    assert calls[3:] == [False, True] * 3


def test_emulating_all_products_is_what_int8_computes(import_module):
    torch.manual_seed(0)
    models = GPT(SHAPE), GPT(SHAPE)
    models[1].load_state_dict(models[0].state_dict())
    import_module("rounded").round_products(
        models[0], ("output", "grad_input", "grad_weight"), last_of_mlp=True, reuse=True
    )
    use_int8(models[1])
    ids = torch.randint(64, (2, 16))
    losses = [model(ids, ids)[1] for model in models]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=2e-6)
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        # Quotients next to a half may round otherwise; without int8 the difference is 0.01.
        assert (one.grad - other.grad).norm() < 0.003 * other.grad.norm()


# -----------------------------------------------------------------------------
# gpu_ab.py

ALL_ARMS = ["plain", "stack", "stack-int8", "stack-float32-residual"]


@pytest.fixture
def compare(import_module, bins, capsys):
    """A function that runs gpu_ab.py, whose arms are processes, and returns what it prints."""

    def compare(*flags):
        import_module("gpu_ab").main([f"--dataset={bins}", "--device=cpu", *map(str, flags)])
        return capsys.readouterr().out.splitlines()

    return compare


def test_the_arms_are_trained_to_the_same_length_and_compared(compare, tmp_path):
    path = tmp_path / "arms.json"
    # Too short for anything: the first arm chooses the smallest number of iterations.
    printed = compare("--minutes=0.001", f"--save={path}")
    saved = json.loads(path.read_text())
    assert saved.keys() >= {"command", "commit", "date", "machine", "torch", "tokens_per_iter"}
    assert saved["tokens_per_iter"] == 2 * 32 * 32
    arms = saved["arms"]
    assert list(arms) == ALL_ARMS
    for figures in arms.values():
        assert figures["iterations"] == 8
        tokens, losses = zip(*figures["val_loss"])
        assert tokens == tuple(range(2048, 8 * 2048 + 1, 2048))
        assert losses[-1] < losses[0]
        assert figures["tokens_per_s"] > 0
    rate = 0.02 * math.sqrt(2048 / 524_288)
    assert arms["plain"]["learning_rates"]["learning_rate"] == pytest.approx(rate)
    rate = 0.7 * math.sqrt(2048 / 524_288)
    assert arms["stack"]["learning_rates"]["embedding_lr"] == pytest.approx(rate)

    plain, stack = [arms[name]["val_loss"][-1][1] for name in ("plain", "stack")]
    assert plain != stack
    words = f"stack: val loss {stack:.4f} ({stack - plain:+.4f} against plain)"
    assert any(line.startswith(words) for line in printed)
    (row,) = [line for line in printed if line.startswith("| stack - plain")]
    assert row.split(" | ")[8] == f"{stack - plain:+.4f}"


def test_a_failed_arm_is_a_line_and_the_others_are_trained(compare, tmp_path):
    path = tmp_path / "arms.json"
    # AdamW is an optimizer of the one arm, and impossible with the changes of the other.
    printed = compare("--arms=stack,plain", "--optimizer=adamw", "--iters=8", f"--save={path}")
    arms = json.loads(path.read_text())["arms"]
    assert "need --optimizer=muon" in arms["stack"]["failed"]
    assert arms["plain"]["iterations"] == 8
    for beginning in ("stack: failed: ", "| stack | failed: "):
        assert any(line.startswith(beginning) for line in printed)


def test_the_first_arm_that_does_not_fail_sets_the_length(import_module, bins, monkeypatch):
    gpu_ab = import_module("gpu_ab")
    trained = {"iterations": 123, "tokens": 1, "epochs": 1, "tokens_per_s": 1, "val_loss": [(1, 2)]}
    lengths = []

    def run_alone(name, arguments, iters):
        lengths.append(iters)
        return {"failed": "no reason"} if name == "plain" else trained

    monkeypatch.setattr(gpu_ab, "run_alone", run_alone)
    config = gpu_ab.read_settings([f"--dataset={bins}", "--device=cpu"])
    gpu_ab.compare(config, [])
    assert lengths == [0, 0, 123, 123]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--arms=yesterday"], "not yesterday"),
        (["--iters=3"], "at least 8"),
        (["--dataset=nowhere"], "no such file"),
    ],
)
def test_wrong_settings_are_refused_before_any_arm_is_trained(import_module, bins, flags, words):
    gpu_ab = import_module("gpu_ab")
    with pytest.raises(UserError, match=words):
        gpu_ab.main([f"--dataset={bins}", *flags])


def test_the_iterations_and_the_evaluations_fill_the_time(import_module, capsys):
    gpu_ab = import_module("gpu_ab")
    assert gpu_ab.iterations_within(100, s_per_iter=2.0, eval_s=5.0) == 30
    assert capsys.readouterr().out == ""
    assert gpu_ab.iterations_within(50, s_per_iter=2.0, eval_s=5.0) == 8
    assert "use more --minutes" in capsys.readouterr().out


def test_a_run_that_starts_anew_repeats_itself(import_module, bins):
    changed_run = import_module("changed_run")
    settings = {
        **TINY,
        "dataset": str(bins),
        "dtype": "float32",
        "architecture": "qwen3",
        "optimizer": "muon",
        "embedding_lr": 0.1,
        "head_lr": 0.01,
        "normuon": True,
        "lookahead": 0.6,
        "two_speeds": True,
        "dropout": 0.1,
    }
    config = changed_run.with_length(changed_run.ChangedConfig(**settings), iters=8)
    trainer = Trainer(config, Ranks())
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    first_run = changed_run.ChangedRun(trainer)
    losses = [first_run.step() for _ in range(8)]
    changed_run.start_anew(trainer, weights, config)
    second_run = changed_run.ChangedRun(trainer)
    assert [second_run.step() for _ in range(8)] == losses
