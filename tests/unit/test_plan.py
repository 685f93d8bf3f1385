"""plan.py: the memory and time that a run is expected to take, and what it says about them."""

import re
import time
from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from configurator import read_config_file
from helpers import flags_of, train_by_clock
from model import GPT, GPTConfig, cross_entropy_and_gradient, linear_cross_entropy
from onenight.training.costs import predict_memory, update_flops
from onenight.training.optimizers import make_optimizers
from onenight.training.settings import TrainConfig

FOR_12_GB = ["--plan_vram_gb=12", "--plan_tflops=49"]


def plan(*arguments):
    """Return what train.py prints with --plan."""
    result = train_by_clock(time.monotonic, *arguments, "--plan")
    assert result.returncode == 0, result.stderr
    return result.stdout


def hours_in(text):
    """Return the hours of the plan's time."""
    hours, minutes = re.search(r"time: (\d+)h (\d+)m", text).groups()
    return int(hours) + int(minutes) / 60


# -----------------------------------------------------------------------------
# Memory

# architecture, bias, batch_size, n_layer: as in the shipped configs activations take most of the
# memory, or, in the second one, weights do.
SHAPES = [("gpt2", False, 16, 4), ("gpt2", True, 3, 4), ("qwen3", False, 8, 4)]


def config_of(architecture, bias, n_layer, **settings):
    """Return the resolved settings of a model of GPT-2's width, in bfloat16."""
    if architecture == "qwen3":
        settings = {"optimizer": "muon", "embedding_lr": 0.1, "head_lr": 0.1, **settings}
    return TrainConfig(
        n_layer=n_layer, bias=bias, architecture=architecture, dtype="bfloat16", **settings
    )


def peak_bytes(tracker):
    """Return the most memory that a MemTracker has seen in use."""
    return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())


@pytest.mark.parametrize("architecture, bias, batch_size, n_layer", SHAPES)
def test_the_predicted_peak_is_what_training_allocates(architecture, bias, batch_size, n_layer):
    """In eager mode, without real memory."""
    config = config_of(architecture, bias, n_layer, compile=False)
    with FakeTensorMode():
        model = GPT(GPTConfig(**config.shape, vocab_size=50304))
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
    assert predicted == pytest.approx(peak_bytes(tracker), rel=0.03)


@pytest.mark.parametrize("architecture, bias, batch_size, n_layer", SHAPES)
def test_the_predicted_activations_are_what_the_compiled_model_saves(
    architecture, bias, batch_size, n_layer, monkeypatch
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
    config = config_of(architecture, bias, n_layer)
    with FakeTensorMode():
        model = GPT(GPTConfig(**config.shape, vocab_size=50304))
        x = torch.zeros(batch_size, 1024, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(model, backend=backend, dynamic=False)(x, x)
    # The plan counts the output of the graph as a part of the head.
    output_bytes = batch_size * 1024 * 768 * 2
    predicted = predict_memory(model, config, batch_size)["activations"]
    assert predicted == pytest.approx(sum(saved_bytes) - output_bytes, rel=0.05)


def test_the_head_takes_less_than_a_gigabyte():
    """With 16 x 1024 tokens and GPT-2's vocabulary in bfloat16, forward and backward."""
    with FakeTensorMode():
        x = torch.zeros(16 * 1024, 768, dtype=torch.bfloat16, requires_grad=True)
        head = torch.nn.Linear(768, 50304, bias=False)
        targets = torch.zeros(16 * 1024, dtype=torch.long)
        with MemTracker() as tracker, torch.autocast("cpu", torch.bfloat16):
            tracker.track_external(head, x, targets)
            linear_cross_entropy(x, head.weight, targets).backward()
    inputs = 16 * 1024 * 768 * 2 + 50304 * 768 * 4
    # At least a chunk of logits and the gradient of the weight.
    assert 0.4e9 < peak_bytes(tracker) - inputs < 1e9


def test_dropout_and_larger_micro_batches_need_more_memory():
    config = config_of("gpt2", False, 2)
    with_dropout = replace(config, dropout=0.1)
    with torch.device("meta"):
        model = GPT(GPTConfig(**config.shape))
        dropout_model = GPT(GPTConfig(**with_dropout.shape))
    one = predict_memory(model, config, 1)
    two = predict_memory(model, config, 2)
    assert one["activations"] < two["activations"] < 2 * one["activations"]
    for part in ("weights", "gradients", "optimizer"):
        assert one[part] == two[part]
    with_masks = predict_memory(dropout_model, with_dropout, 1)
    assert with_masks["activations"] - one["activations"] == 2 * 1024 * 2 * 768


# -----------------------------------------------------------------------------
# The printed plan


@pytest.mark.parametrize(
    "name, iters, tokens_per_iter, lookups, max_hours, max_gb",
    [
        # Parameters that are not part of matrix products: the gains, and embeddings that are not
        # the head as well.
        ("train_fineweb_4070", 6000, 524_288, 25 * 768, 27, 10),
        ("train_fineweb_4070_fast", 3250, 524_288, 50304 * 768 + 25 * 768 + 24 * 128, 9, 10),
    ],
)
def test_the_plans_of_the_fineweb_configs_fit_a_card_of_12_gb(
    name, iters, tokens_per_iter, lookups, max_hours, max_gb
):
    """And their figures are those of arithmetic done here."""
    printed = plan(f"config/{name}.py", *FOR_12_GB)
    matrices = 12 * 12 * 768**2 + 50304 * 768
    flops = 6 * matrices + 12 * 12 * 768 * 1024
    assert "at 49 TFLOP/s, as given; plus evaluation" in printed
    expected_hours = iters * tokens_per_iter * flops / 49e12 / 3600
    assert hours_in(printed) == pytest.approx(expected_hours, abs=0.02)
    assert hours_in(printed) < max_hours
    assert f"parameters: {(matrices + lookups) / 1e6:.2f}M" in printed
    assert f"tokens: {tokens_per_iter:,} per iteration, {iters:,} iterations" in printed
    assert f"{iters * tokens_per_iter:,}" in printed
    total, parts = re.search(r"memory: ([\d.]+) GB at the peak \((.*)\)", printed).groups()
    sizes = [float(size) for size in re.findall(r"[\d.]+", parts)]
    assert sum(sizes) == pytest.approx(float(total), abs=0.1)
    assert float(total) < max_gb
    assert "fits: yes, in 11.3 GB free on a card of 12 GB" in printed


def test_a_listed_card_needs_no_other_flags():
    printed = plan("config/train_fineweb_4070_fast.py", "--plan_card=RTX 4070")
    assert "fits: yes, in 11.3 GB free on an RTX 4070; at most --batch_size=16 " in printed
    source = r"calculated from 1.12 times the RTX 4070's rated 58.3 TFLOP/s and 504 GB/s; plus "
    assert re.search(rf"time: 7h \d\dm at 6\d,\d{{3}} tokens/s, {source}evaluation\n", printed)


def test_the_largest_micro_batch_of_a_listed_card_fits_and_twice_as_much_does_not():
    arguments = ["config/train_fineweb_4070_fast.py", "--plan_card=RTX 4090"]
    flags = re.search(r"at most --batch_size=(\d+) --gradient_acc\S+=(\d+)", plan(*arguments))
    size, micro_batches = map(int, flags.groups())
    assert size * micro_batches == 32 * 16
    largest = [f"--batch_size={size}", f"--gradient_accumulation_steps={micro_batches}"]
    assert "fits: yes, in 23.3 GB free on an RTX 4090" in plan(*arguments, *largest)
    twice = [f"--batch_size={2 * size}", f"--gradient_accumulation_steps={micro_batches // 2}"]
    assert f"the same effective batch fits with {' '.join(largest)}" in plan(*arguments, *twice)


@pytest.mark.parametrize(
    "name",
    ["train_fineweb_4070", "train_fineweb_4070_fast", "train_fineweb_4070_small", "finetune_gpt2"],
)
def test_the_micro_batches_of_the_configs_are_the_largest_that_leave_room_on_a_4070(name):
    """The largest power of two that leaves 0.8 of 11.3 GB free."""
    file = f"config/{name}.py"
    size = read_config_file(file)["batch_size"]
    for factor, fits in ((1, True), (2, False)):
        printed = plan(file, "--plan_card=RTX 4070", f"--batch_size={factor * size}")
        peak = float(re.search(r"memory: ([\d.]+) GB at the peak", printed)[1])
        assert (peak <= 11.3 - 0.8) == fits


def test_a_plan_that_does_not_fit_names_a_batch_size_that_does():
    arguments = ["config/train_fineweb_4070.py", "--plan_vram_gb=6", "--plan_tflops=49"]
    first = plan(*arguments)
    flags = re.search(
        r"fits: no: a card of 6 GB has 5.3 GB free; the same effective batch fits with "
        r"(--batch_size=\d+) (--gradient_accumulation_steps=\d+)",
        first,
    )
    assert flags, first
    second = plan(*arguments, *flags.groups())
    assert "fits: yes" in second
    assert "524,288 per iteration" in second
    assert "another recipe" not in first + second


def test_a_plan_for_a_cpu_keeps_within_the_limit_of_the_container(bins, monkeypatch):
    monkeypatch.setattr("onenight.training.plan.available_memory", lambda: 2e9)
    monkeypatch.setattr("onenight.training.plan.container_memory", lambda: 2e9)
    printed = plan(*flags_of(bins, "unused", {}))
    assert "fits: yes, in 2.0 GB free on this container\n" in printed
    monkeypatch.setattr("onenight.training.plan.container_memory", lambda: 3e9)
    printed = plan(*flags_of(bins, "unused", {"n_embd": 1024, "n_layer": 24}))
    assert "fits: no, not even with batch_size=1: this machine has 2.0 GB free; use" in printed


def test_a_plan_that_cannot_fit_says_so():
    printed = plan("config/train_fineweb_4070.py", "--plan_vram_gb=2", "--plan_tflops=49")
    assert "fits: no, not even with batch_size=1: a card of 2 GB has 1.3 GB free" in printed


def test_a_flag_that_changes_the_tokens_of_an_iteration_is_reported():
    arguments = ["config/train_fineweb_4070.py", "--batch_size=12", *FOR_12_GB]
    alone = plan(*arguments)
    flag = re.search(
        r"^warning: another recipe: 393,216 tokens per iteration, where the config file has "
        r"524,288; "
        r"(--gradient_accumulation_steps=43) comes nearest",
        alone,
        re.M,
    )
    assert flag, alone
    nearest = plan(*arguments, flag[1])
    assert "528,384 per iteration" in nearest  # 0.8 % more
    assert "another recipe" not in nearest


def test_the_iterations_of_a_plan_follow_from_the_hours(bins):
    iterations = []
    for hours in (1.0, 2.0):
        flags = flags_of(bins, "unused", {"plan_tflops": 1.0, "hours": hours})
        printed = plan(*(flag for flag in flags if not flag.startswith("--max_iters")))
        iterations.append(int(re.search(r"([\d,]+) iterations", printed)[1].replace(",", "")))
        assert hours_in(printed) == pytest.approx(hours, abs=0.02)
        assert "(more than 4 epochs help little: prepare a second file as well)" in printed
    assert iterations[1] == pytest.approx(2 * iterations[0], abs=1)


def test_a_plan_by_hours_has_time_for_the_evaluations(bins):
    """With an evaluation of 3 iterations' tokens after each iteration, half of the hours are for
    training: an evaluation takes a third of the time for its tokens."""
    tokens = {"eval_iters": 1, "batch_size": 8, "block_size": 32}
    tokens["gradient_accumulation_steps"] = 2 * 16384 // (8 * 32) // 3
    iterations = []
    for eval_interval in (1_000_000, 1):
        changes = {"plan_tflops": 1.0, "hours": 1.0, "eval_interval": eval_interval, **tokens}
        printed = plan(*(f for f in flags_of(bins, "unused", changes) if "max_iters" not in f))
        iterations.append(int(re.search(r"([\d,]+) iterations", printed)[1].replace(",", "")))
    assert iterations[1] == pytest.approx(iterations[0] / 2, rel=0.01)


def test_the_epochs_of_a_plan_are_those_of_the_tokens(bins):
    printed = plan(*flags_of(bins, "unused", {"max_iters": 100}))
    assert f"{100 * 512 / 20_000:.2f} epochs of 20,000\n" in printed


# -----------------------------------------------------------------------------
# Time


def speed_in(text):
    """Return the tokens/s of a plan."""
    return float(re.search(r"at ([\d,]+) tokens/s, calculated", text)[1].replace(",", ""))


@pytest.fixture
def plan_at(monkeypatch):
    """Return plan(), on a machine that reaches the given TFLOP/s and GB/s."""

    def plan_at(tflops, gb_per_s, *arguments):
        monkeypatch.setattr("onenight.training.plan.measure_tflops", lambda *_: tflops)
        monkeypatch.setattr("onenight.training.plan.measure_bandwidth", lambda *_: gb_per_s)
        return plan(*arguments)

    return plan_at


# What torch.compile makes of the model for an RTX 4070 (benchmarks/LOG.md): config and flags; the
# tokens/s that its FLOPs and bytes allow at 86 % of the card's rated TFLOP/s and 85 % of its GB/s;
# the bytes that a token's kernels and the addition of its gradients move.
LONG = "config/train_fineweb_4070.py"
SHORT = "config/train_fineweb_4070_fast.py"
COMPILED = [
    ([LONG], 50_996, 1166e3 + 12 * 123.6e6 / 16384),
    ([LONG, "--batch_size=8"], 49_554, 1319e3 + 12 * 123.6e6 / 8192),
    ([SHORT], 49_577, 1378e3 + 12 * 162.2e6 / 16384),
    ([SHORT, "--batch_size=8"], 48_214, 1504e3 + 12 * 162.2e6 / 8192),
    ([LONG, "--int8"], 64_576, 1576e3 + 12 * 123.6e6 / 16384),
    ([SHORT, "--int8"], 60_613, 1982e3 + 12 * 162.2e6 / 16384),
    ([SHORT, "--int8", "--batch_size=8"], 58_490, 2120e3 + 12 * 162.2e6 / 8192),
    ([LONG, "--n_layer=6", "--n_head=6", "--n_embd=384"], 192_472, 467e3 + 12 * 29.9e6 / 16384),
    (
        [SHORT, "--batch_size=8", "--n_layer=6", "--n_head=8", "--n_embd=1024"],
        50_198,
        1201e3 + 12 * 178.9e6 / 8192,
    ),
]


@pytest.mark.parametrize("arguments, tokens_per_s, moved_per_token", COMPILED)
def test_the_time_is_that_of_what_the_compiled_model_computes_and_moves(
    arguments, tokens_per_s, moved_per_token, plan_at
):
    arguments = [*arguments, "--plan_vram_gb=12", "--gradient_accumulation_steps=32"]
    printed = plan_at(0.86 * 58.3, 0.85 * 504, *arguments)
    assert "calculated from 50.14 TFLOP/s and 428 GB/s, measured here" in printed
    assert speed_in(printed) == pytest.approx(tokens_per_s, rel=0.05)
    # If arithmetic took no time
    tokens_per_gb = speed_in(plan_at(1e12, 1e6, *arguments)) / 1e6
    assert 1e9 / tokens_per_gb == pytest.approx(moved_per_token, rel=0.12)


@pytest.mark.parametrize("arguments, tokens_per_s, moved_per_token", COMPILED)
def test_a_listed_card_is_as_much_faster_as_a_4070_was_reported_to_be(
    arguments, tokens_per_s, moved_per_token
):
    """nanochat's d12: 55,700 tokens/s, where the same count allows 42,586."""
    printed = plan(*arguments, "--plan_card=RTX 4070", "--gradient_accumulation_steps=32")
    assert speed_in(printed) == pytest.approx(tokens_per_s * 55_700 / 42_586, rel=0.05)


@pytest.mark.parametrize(
    "n_embd, percent", [(64, 48), (128, 53), (256, 64), (512, 80), (768, 84), (1024, 74)]
)
def test_on_a_cpu_narrow_models_reach_less_of_the_measured_speed(n_embd, percent, plan_at):
    """As measured on two cores of an AMD EPYC in float32 (benchmarks/LOG.md), and for 64 in
    benchmarks/results/train_cpu_demo.json."""
    shape = ["--architecture=gpt2", "--optimizer=adamw", f"--n_embd={n_embd}", "--block_size=128"]
    printed = plan_at(0.20, 14, "config/train_demo.py", *shape)
    flops = 6 * (4 * 12 * n_embd**2 + 50304 * n_embd) + 12 * 4 * n_embd * 128
    reached = speed_in(printed) * flops / 1e12 / 0.20
    assert reached == pytest.approx(percent / 100, rel=0.2)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_flops_of_an_update_are_those_of_the_optimizers(optimizer):
    config = config_of("qwen3", False, 2, n_embd=256, n_head=2, optimizer=optimizer)
    model = GPT(GPTConfig(**config.shape, vocab_size=128))
    optimizers = make_optimizers(model, config, torch.device("cpu")).values()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        for optimizer in optimizers:
            optimizer.step()
    assert update_flops(model, config) == counter.get_total_flops()


def test_the_time_includes_the_update(plan_at):
    """AdamW's 28 bytes for each parameter."""
    seconds = []
    for micro_batches in (1, 2, 3):
        flags = ["--plan_vram_gb=12", f"--gradient_accumulation_steps={micro_batches}"]
        printed = plan_at(1e12, 1e3, LONG, *flags)
        seconds.append(micro_batches * 16 * 1024 / speed_in(printed))
    gradient_added = 12 * 123.6e6 / 1e12
    micro_batch = seconds[1] - seconds[0] - gradient_added
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0], rel=1e-4)
    assert seconds[0] - micro_batch == pytest.approx(28 * 123.6e6 / 1e12, rel=0.01)
