"""The plan: the memory and the time that a run is expected to take, calculated or measured."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import train as train_script
from helpers import MUON, SmallMemory, load, losses, make_trainer, run_here, step, train_here
from model import GPT, GPTConfig, cross_entropy_and_gradient
from onenight import plan as plan_module
from onenight.distributed import Ranks
from onenight.optim import make_optimizers
from onenight.plan import Speed, make_plan, measure, predict_memory
from onenight.settings import TrainConfig

DROPOUT = {"dropout": 0.1}

# -----------------------------------------------------------------------------
# Memory

# architecture, bias, batch_size: as in the shipped configs activations take most of the memory, or,
# in the second one, weights do.
SHAPES = [("gpt2", False, 16), ("gpt2", True, 3), ("qwen3", False, 8)]


def make_model(architecture, bias, **settings):
    """Return the config and the model of two layers of GPT-2's width, in bfloat16."""
    if architecture == "qwen3":
        settings = {"optimizer": "muon", "embedding_lr": 0.1, "head_lr": 0.1, **settings}
    settings = {"n_layer": 2, "bias": bias, "architecture": architecture, **settings}
    config = TrainConfig(dtype="bfloat16", **settings)
    return config, GPT(GPTConfig(**config.shape, vocab_size=50304))


def peak_bytes(tracker):
    """Return the most memory that a MemTracker has seen in use."""
    return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())


@pytest.mark.parametrize("architecture, bias, batch_size", SHAPES)
def test_the_predicted_peak_is_what_training_allocates(architecture, bias, batch_size):
    """Without torch.compile and without real memory."""
    with FakeTensorMode():
        config, model = make_model(architecture, bias, compile=False)
        optimizers = make_optimizers(model, config, torch.device("cpu")).values()
        tracker = MemTracker()
        tracker.track_external(model, *optimizers)
        x = torch.zeros(batch_size, 1024, dtype=torch.long)
        with tracker:
            for micro_batch in range(3):
                with torch.autocast("cpu", torch.bfloat16):
                    model(x, x)[1].backward()
                if micro_batch != 1:  # an iteration of one micro-batch, then one of two
                    for optimizer in optimizers:
                        optimizer.step()
                    model.zero_grad(set_to_none=True)
                tracker.reset_mod_stats()
    predicted = sum(predict_memory(model, config, batch_size).values())
    # What is left out: norms' statistics, single rows, temporary copies.
    assert predicted == pytest.approx(peak_bytes(tracker), rel=0.03)


@pytest.mark.parametrize("architecture, bias, batch_size", SHAPES)
def test_the_predicted_activations_are_what_the_compiled_model_saves(
    architecture, bias, batch_size, monkeypatch
):
    """AOTAutograd's partitioner decides which tensors are saved for the backward pass."""
    # The head is not a part of the graph, and Inductor's code cannot run with fake tensors.
    monkeypatch.setattr("model.compiled_softmax", lambda: cross_entropy_and_gradient)
    saved_bytes = []
    torch._dynamo.reset()  # forget what other tests have compiled

    def compile_forward(graph, inputs):
        (output,) = graph.graph.find_nodes(op="output")
        tensors = {}
        for node in output.args[0]:
            if node is not None and node.op != "placeholder":
                tensors[node] = node.meta["val"]
        sizes = [val.nbytes for val in tensors.values() if isinstance(val, torch.Tensor)]
        saved_bytes.append(sum(sizes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=compile_forward,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    with FakeTensorMode():
        config, model = make_model(architecture, bias)
        x = torch.zeros(batch_size, 1024, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(model, backend=backend, dynamic=False)(x, x)
    # The plan counts the output of the graph as a part of the head.
    output_bytes = batch_size * 1024 * 768 * 2
    predicted = predict_memory(model, config, batch_size)["activations"]
    assert predicted == pytest.approx(sum(saved_bytes) - output_bytes, rel=0.05)


# -----------------------------------------------------------------------------
# A card that is not here


def plan_card(config, card, *flags):
    """Return what --plan_card prints for a shipped config."""
    result = run_here(train_script, f"config/{config}.py", f"--plan_card={card}", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def number(pattern, text):
    return float(re.search(pattern, text)[1].replace(",", ""))


def test_a_card_has_the_time_of_a_night_at_its_rated_speed():
    printed = plan_card("train_fineweb_4070", "rtx4090")
    matrices = 12 * 12 * 768**2 + 50304 * 768
    flops = 6 * matrices + 12 * 12 * 768 * 1024
    tokens_per_s = number(r"([\d,]+) tokens/s, calc", printed)
    # It counts the gains like matrices: 0.01 %.
    assert tokens_per_s == pytest.approx(0.85 * 165.2e12 / flops, rel=2e-4)
    hours, minutes = map(int, re.search(r"time: (\d+)h (\d+)m", printed).groups())
    expected = 6000 * 524_288 / tokens_per_s / 3600
    assert hours + minutes / 60 == pytest.approx(expected, abs=1 / 60)
    assert f"parameters: {(matrices + 25 * 768) / 1e6:.2f}M" in printed  # with the gains


def test_the_speed_of_an_rtx_4070_is_the_reported_one():
    """nanochat's d12: 55,700 tokens/s of 887 MFLOP."""
    printed = plan_card("train_fineweb_4070_fast", "RTX 4070")
    flops = number(r"([\d,]+) MFLOP", printed)
    reported = 55_700 * 887 / flops
    assert number(r"([\d,]+) tokens/s, calc", printed) == pytest.approx(reported, rel=0.01)


def test_a_plan_by_hours_has_the_iterations_that_fit():
    printed = plan_card("train_fineweb_4070", "RTX 4070", "--hours=2")
    tokens_per_s = number(r"([\d,]+) tokens/s, calc", printed)
    assert number(r"iterations: ([\d,]+)", printed) == round(7200 * tokens_per_s / 524_288)
    assert "time: 2h 00m" in printed


@pytest.mark.parametrize("config", ["train_fineweb_4070_fast", "finetune_gpt2"])
def test_the_largest_micro_batch_that_is_named_fits_and_twice_as_much_does_not(config):
    first = plan_card(config, "RTX 4070")
    assert "fits: yes" in first  # as the config has it
    largest = int(number(r"at most --batch_size=(\d+)", first))
    for size, fits in ((largest, "yes"), (2 * largest, "no")):
        printed = plan_card(config, "RTX 4070", f"--batch_size={size}")
        peak = number(r"memory: ([\d.]+) GB", printed)
        free = number(r"in ([\d.]+) GB free", printed)
        assert f"fits: {fits}" in printed
        assert (peak <= free) == (fits == "yes")


# -----------------------------------------------------------------------------
# --plan


def test_a_plan_needs_no_data_and_writes_nothing(tmp_path):
    result = train_here(tmp_path / "no data", tmp_path / "out", plan=True)
    assert result.returncode == 0, result.stderr
    assert number(r"speed: ([\d,]+) tokens/s, measured", result.stdout) > 0
    assert "time: " in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("free, words", [(1e5, "no, not even"), (8e9, "yes, in 8.0 GB free")])
def test_a_plan_says_whether_the_free_memory_of_this_machine_suffices(
    free, words, finished_run, bins, monkeypatch
):
    """Of a run that is finished, which it leaves alone."""
    monkeypatch.setattr(train_script, "free_memory", lambda *_: free)
    before = {path.name: path.stat().st_mtime_ns for path in finished_run.iterdir()}
    printed = train_here(bins, finished_run, plan=True, max_iters=100).stdout
    assert f"fits: {words}" in printed
    assert f"{100 * 512:,} tokens, {100 * 512 / 20_000:.2f} epochs of 20,000" in printed
    assert {path.name: path.stat().st_mtime_ns for path in finished_run.iterdir()} == before


SPEED = Speed(micro_step_s=0.01, update_s=0.04, eval_step_s=0.001)


def test_the_time_is_that_of_all_iterations_and_evaluations(bins):
    """100 iterations of 16 windows, and 10 evaluations and one at the beginning of 16,384 tokens of
    train.bin and all 2,500 of val.bin."""
    trainer = make_trainer(bins, max_iters=100, eval_interval=10)
    plan = make_plan(trainer, SPEED, elapsed_s=7.0)
    iteration_s = 16 * 0.01 + 0.04
    eval_s = (16_384 + 2500) / 32 * 0.001
    assert plan.eval_s == pytest.approx(eval_s)
    assert plan.seconds == pytest.approx(7.0 + 100 * iteration_s + 11.5 * eval_s)
    assert plan.tokens_per_s == pytest.approx(512 / iteration_s)
    assert (plan.iters, plan.tokens) == (100, 51_200)


def test_the_plan_of_a_resumed_run_counts_only_what_is_left(bins):
    trainer = make_trainer(bins, max_iters=100, eval_interval=10)
    trainer.progress.iter_num = 60
    plan = make_plan(trainer, SPEED, elapsed_s=700.0)
    assert plan.seconds == pytest.approx(700 + 40 * 0.2 + 4.5 * plan.eval_s)
    assert plan.iters == 100
    trainer = make_trainer(bins, hours=0.5, eval_interval=1000)
    trainer.progress.iter_num = 60
    plan = make_plan(trainer, SPEED, elapsed_s=1700.0)
    assert plan.iters == 60 + (100 - 0.5 * plan.eval_s) // (0.2 + plan.eval_s / 1000)


def test_two_processes_halve_the_windows_of_each_but_not_the_update(bins):
    plan = make_plan(make_trainer(bins, ranks=Ranks(0, 2)), SPEED, elapsed_s=0.0)
    assert plan.tokens_per_s == pytest.approx(512 / (8 * 0.01 + 0.04))
    assert plan.eval_s == pytest.approx((16_384 + 2500) / 32 * 0.001 / 2)


@pytest.mark.parametrize("eval_interval", [1, 20])
def test_the_iterations_of_a_plan_by_hours_leave_time_for_the_evaluations(bins, eval_interval):
    trainer = make_trainer(bins, hours=0.5, max_iters=10, eval_interval=eval_interval)
    plan = make_plan(trainer, SPEED, elapsed_s=60.0)
    assert plan.seconds == 1800
    eval_s = (16_384 + 2500) / 32 * 0.001
    planned = 60 + plan.iters * (0.2 + eval_s / eval_interval) + 1.5 * eval_s
    assert 1799 < planned <= 1800  # one more iteration would exceed it
    assert plan.tokens == plan.iters * 512


# -----------------------------------------------------------------------------
# Speed, measured


@pytest.fixture
def no_pictures(monkeypatch):
    """Draw no loss.png, which takes longer than all else in short runs."""
    monkeypatch.setattr("onenight.records.draw_losses", lambda *arguments: None)


def test_the_measurement_does_not_change_the_run(bins, tmp_path, monkeypatch, no_pictures):
    """To the bit: a run with it, and one whose speed is given."""
    changes = {**MUON, **DROPOUT, "max_iters": 8, "eval_interval": 4, "eval_tokens": 512}
    assert train_here(bins, tmp_path / "measured", **changes).returncode == 0
    monkeypatch.setattr(train_script, "measure", lambda trainer: SPEED)
    assert train_here(bins, tmp_path / "given", **changes).returncode == 0
    assert losses(tmp_path / "measured") == losses(tmp_path / "given")
    weights = load(tmp_path / "given")["model"]
    for name, value in load(tmp_path / "measured")["model"].items():
        assert torch.equal(value, weights[name]), name


def assert_same_steps(trainer, other):
    """Assert that both do the same two iterations, to the bit."""
    for _ in range(2):
        assert step(trainer) == step(other)
    for value, expected in zip(trainer.model.parameters(), other.model.parameters()):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("int8_is_faster", [True, False])
def test_measuring_int8_as_well_leaves_a_trainer_as_if_made_with_the_faster_one(
    bins, monkeypatch, int8_is_faster
):
    monkeypatch.setattr(plan_module, "gains_enough", lambda *_: int8_is_faster)
    trainer = make_trainer(bins, **MUON, int8="auto")
    measure(trainer)
    assert trainer.config.int8 is int8_is_faster
    assert_same_steps(trainer, make_trainer(bins, **MUON, int8=int8_is_faster))


def test_a_micro_batch_that_is_too_slow_for_a_cpu_is_not_measured_as_a_whole(bins, monkeypatch):
    monkeypatch.setattr(plan_module, "MAX_CPU_FLOPS", 0)
    trainer = make_trainer(bins, **DROPOUT)
    trainer.compiled_model = SmallMemory(trainer.model, 8)
    measure(trainer)
    assert trainer.compiled_model.calls == []
    assert_same_steps(trainer, make_trainer(bins, **DROPOUT))
    assert trainer.compiled_model.calls == [8] * 4


def test_a_micro_batch_that_does_not_fit_is_halved_before_the_run(bins):
    trainer = make_trainer(bins)
    trainer.compiled_model = SmallMemory(trainer.model, 3)
    measure(trainer)
    assert trainer.micro_batch_size == 2
    assert_same_steps(trainer, make_trainer(bins, batch_size=2, gradient_accumulation_steps=8))


@pytest.mark.parametrize("max_flops, windows", [(1e12, 8), (0, 1)])
def test_the_speed_is_the_mean_for_each_window(bins, monkeypatch, max_flops, windows):
    """By a clock that only the parts of the run advance; every fifth call is six times as slow, so
    that the mean is twice what most calls take."""
    clock = SimpleNamespace(seconds=0.0)
    trainer = make_trainer(bins)

    def slowed(function, seconds):
        calls = itertools.count(1)

        def call(*arguments):
            clock.seconds += seconds * (6 if next(calls) % 5 == 0 else 1)
            return function(*arguments)

        return call

    trainer.micro_step = slowed(trainer.micro_step, 0.08)
    trainer.eval_step = slowed(trainer.eval_step, 0.04)
    [optimizer] = trainer.optimizers.values()
    optimizer.step = slowed(optimizer.step, 0.05)
    monkeypatch.setattr(plan_module, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    monkeypatch.setattr(plan_module, "MEASURED_TIMES", 10)
    monkeypatch.setattr(plan_module, "MEASURED_S", 3.0)
    monkeypatch.setattr(plan_module, "MAX_CPU_FLOPS", max_flops)
    speed = measure(trainer)
    assert speed.micro_step_s == pytest.approx(2 * 0.08 / windows)
    assert speed.update_s == pytest.approx(2 * 0.05)
    assert speed.eval_step_s == pytest.approx(2 * 0.04 / windows)


def test_a_run_that_is_much_slower_than_planned_says_so(bins, tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr(train_script, "measure", lambda trainer: Speed(1e-8, 1e-8, 1e-8))
    monkeypatch.setattr(train_script, "EARLY_S", 0.0)
    result = train_here(bins, tmp_path, max_iters=14, eval_tokens=512, eval_interval=100)
    assert result.stdout.count("\nspeed: ") == 2, result.stdout
