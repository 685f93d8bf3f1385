"""Memory: its prediction, running out of it, and reading a large file."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from onenight.dataset import TrainWindows, open_bin
from onenight.device import is_out_of_memory
from onenight.metrics import Metrics, Pace
from onenight.optimizer import make_optimizers
from onenight.plan import predict_memory
from onenight.train_config import TrainConfig

import numpy as np
import pytest
import torch
from conftest import ROOT, SmallMemory, flags_of, load, make_trainer, run_here
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import train as train_script
from model import GPT, GPTConfig, linear_cross_entropy


@pytest.mark.parametrize(
    "batch_size, accumulation, limit, left", [(8, 2, 3, 2), (12, 1, 4, 3), (6, 3, 1, 1), (7, 1, 3, 1)]
)
def test_out_of_memory_continues_with_smaller_micro_batches(bins, capsys, batch_size, accumulation, limit, left):
    """Losses of an undisturbed run, evaluation first, by windows that are the same in the same order."""
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    undisturbed, squeezed = make_trainer(bins, **sizes), make_trainer(bins, **sizes)
    squeezed.compiled_model = SmallMemory(squeezed.model, limit)
    for _ in range(3):
        # another order of float32 sums, nothing else
        assert squeezed.step(0.1) == pytest.approx(undisturbed.step(0.1), rel=1e-6)
    assert squeezed.evaluate(squeezed.val_tokens) == pytest.approx(
        undisturbed.evaluate(undisturbed.val_tokens), rel=1e-6
    )
    assert squeezed.progress.position == undisturbed.progress.position == 3 * batch_size * accumulation
    assert squeezed.batch_size == left
    assert squeezed.batch_size * squeezed.gradient_accumulation_steps == batch_size * accumulation
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("out of memory: going on with --batch_size=") for line in lines) and lines


def test_out_of_memory_in_an_evaluation(bins):
    trainer = make_trainer(bins)
    expected = trainer.evaluate(trainer.val_tokens)
    trainer.compiled_model = SmallMemory(trainer.model, 3)
    assert trainer.evaluate(trainer.val_tokens) == pytest.approx(expected, rel=1e-6)
    assert trainer.batch_size == 2 and trainer.gradient_accumulation_steps == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of a process are POSIX")
def test_a_cpu_that_runs_out_of_memory_goes_on(bins, tmp_path):
    """For real: the process may have 1.5 GB of addresses more than it has when it begins to train."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import train; run = train.run\n"
        "def limited(*arguments):\n"
        "    taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * 10**9 // 2,) * 2)\n"
        "    run(*arguments)\n"
        "train.run = limited; train.main(sys.argv[2:])\n"
    )
    sizes = {"batch_size": 16384, "gradient_accumulation_steps": 1, "max_iters": 1, "eval_iters": 1}
    command = [sys.executable, "-c", code, ROOT, *flags_of(bins, tmp_path, sizes)]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "out of memory: going on with --batch_size=8192 --gradient_accumulation_steps=2" in result.stdout
    assert load(tmp_path)["iter_num"] == 1


@pytest.mark.parametrize(
    "error, is_one",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.1 GB)"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_memory_that_runs_out_in_an_update_leads_back_to_the_checkpoint(bins, tmp_path, capsys):
    """AdamW's update fails once, after Muon's: the weights are half new, and the run must not go on with them."""
    muon = {"architecture": "qwen3", "optimizer": "muon", "embedding_lr": 0.1, "head_lr": 0.01}
    trainer, failed = make_trainer(bins, out_dir=str(tmp_path), **muon), []

    def fail_once(*_):
        if trainer.progress.iter_num == 25 and not failed:
            failed.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.optimizers = dict(reversed(trainer.optimizers.items()))  # Muon first
    trainer.optimizers["optimizer"].register_step_pre_hook(fail_once)
    train_script.train(trainer, Metrics(tmp_path), Pace(trainer, 1.0, time.monotonic()), tmp_path)
    printed = capsys.readouterr().out
    assert "memory ran out in an update: back to iter 20" in printed and "going on with --batch_size=4" in printed
    assert trainer.progress.iter_num == 45 and len(failed) == 1
    other = make_trainer(bins, out_dir=str(tmp_path / "other"), **muon)
    other.optimizers["optimizer"].register_step_pre_hook(fail_always)
    with pytest.raises(SystemExit, match="before any checkpoint; try a smaller --batch_size"):
        train_script.train(other, Metrics(tmp_path), Pace(other, 1.0, time.monotonic()), tmp_path / "other")


def fail_always(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_out_of_memory_with_one_window_is_one_sentence(bins):
    trainer = make_trainer(bins)
    trainer.compiled_model = SmallMemory(trainer.model, 0)
    with pytest.raises(SystemExit, match="one window"):
        trainer.step()
    assert trainer.compiled_model.calls == [8, 4, 2, 1]


def peak_bytes(tracker):
    return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())


def test_the_head_never_takes_a_gigabyte():
    """16 x 1024 tokens and GPT-2's vocabulary under bf16 autocast, forward and backward, its inputs left out."""
    with FakeTensorMode():
        x = torch.zeros(16 * 1024, 768, dtype=torch.bfloat16, requires_grad=True)
        head = torch.nn.Linear(768, 50304, bias=False)
        targets, inputs = torch.zeros(16 * 1024, dtype=torch.long), (16 * 1024 * 2 + 50304 * 4) * 768
        with MemTracker() as tracker, torch.autocast("cpu", torch.bfloat16):
            tracker.track_external(head, x, targets)
            linear_cross_entropy(x, head.weight, targets).backward()
    assert 0.4e9 < peak_bytes(tracker) - inputs < 1e9  # at least the chunk's logits and the weight's gradient


# The shapes of the shipped configs, whose activations are most of the memory, and small ones, whose weights are.
SHAPES = [("gpt2", False, 16, 12), ("gpt2", True, 3, 6), ("qwen3", False, 8, 12)]


@pytest.mark.parametrize("architecture, bias, batch_size, n_layer", SHAPES)
def test_the_plan_predicts_the_peak(architecture, bias, batch_size, n_layer):
    """predict_memory against what a training step allocates in eager mode, at GPT-2's width and length."""
    own = {"optimizer": "muon", "embedding_lr": 0.1, "head_lr": 0.1} if architecture == "qwen3" else {}
    config = TrainConfig(n_layer=n_layer, bias=bias, architecture=architecture, **own)
    with FakeTensorMode():
        model = GPT(GPTConfig(**config.shape, vocab_size=50304))
        optimizers = make_optimizers(model, config, torch.device("cpu")).values()
        tracker = MemTracker()
        tracker.track_external(model, *optimizers)
        x = torch.zeros(batch_size, 1024, dtype=torch.long)
        with tracker:
            for micro_batch in range(4):
                with torch.autocast("cpu", torch.bfloat16):
                    model(x, x)[1].backward()
                if micro_batch % 2:
                    for optimizer in optimizers:
                        optimizer.step()
                    model.zero_grad(set_to_none=True)
                tracker.reset_mod_stats()
    predicted = sum(predict_memory(model, batch_size, "bfloat16", config.optimizer, compiled=False).values())
    assert predicted == pytest.approx(peak_bytes(tracker), rel=0.03)  # 2 % at these shapes


@pytest.mark.parametrize("architecture, bias, batch_size, n_layer", SHAPES)
def test_the_plan_predicts_what_the_compiled_model_saves(architecture, bias, batch_size, n_layer):
    """Its activations against the tensors that AOTAutograd's partitioner keeps for the backward pass."""
    saved = []
    torch._dynamo.reset()  # whatever was compiled before in this process

    def forward_compiler(graph, inputs):
        (output,) = graph.graph.find_nodes(op="output")
        kept = {node: node.meta["val"] for node in output.args[0] if node is not None and node.op != "placeholder"}
        saved.append(sum(val.nbytes for val in kept.values() if isinstance(val, torch.Tensor)))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    with FakeTensorMode():
        model = GPT(GPTConfig(n_layer=n_layer, bias=bias, architecture=architecture))
        x = torch.zeros(batch_size, 1024, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(model, backend=backend, dynamic=False)(x, x)
    of_head = 50304 * 768 * 4 + batch_size * 1024 * 768 * 2  # its gradients, which it computes in the forward pass
    assert predict_memory(model, batch_size, "bfloat16")["activations"] == pytest.approx(sum(saved) - of_head, rel=0.05)


@pytest.mark.parametrize(
    "name, iters, per_iter, lookups, at_most_hours, at_most_gb",
    [
        # beside the matrices of products the gains; and the second one has embeddings apart from its head
        ("train_fineweb_4070", 6000, 524_288, 25 * 768, 27, 10),
        ("train_fineweb_4070_fast", 6500, 262_144, 50304 * 768 + 25 * 768 + 24 * 128, 9, 10),
    ],
)
def test_a_plan_for_another_card(name, iters, per_iter, lookups, at_most_hours, at_most_gb):
    """The plans of the shipped configs for 12 GB, against arithmetic done here."""
    result = run_here(train_script, f"config/{name}.py", "--plan", "--plan_vram_gb=12", "--plan_tflops=49")
    assert result.returncode == 0, result.stderr
    matrices = 12 * 12 * 768**2 + 50304 * 768
    flops = 6 * matrices + 12 * 12 * 768 * 1024
    hours, minutes = map(int, re.search(r"time: (\d+)h (\d+)m at 49 TFLOP/s", result.stdout).groups())
    assert hours + minutes / 60 == pytest.approx(iters * per_iter * flops / 49e12 / 3600, abs=0.02)
    assert hours < at_most_hours
    assert f"parameters: {(matrices + lookups) / 1e6:.2f}M" in result.stdout
    assert f"{per_iter:,} per iteration" in result.stdout and f"{iters * per_iter:,}" in result.stdout
    memory, parts = re.search(r"memory: ([\d.]+) GB at the peak \((.*)\)", result.stdout).groups()
    assert sum(map(float, re.findall(r"[\d.]+", parts))) == pytest.approx(float(memory), abs=0.1)
    assert float(memory) < at_most_gb
    assert "fits: yes" in result.stdout


def test_a_plan_for_this_machine_expects_less_of_a_narrow_model():
    shares = []
    for n_embd in (64, 768):
        flags = ["--plan", f"--n_embd={n_embd}", "--max_iters=100000000"]
        result = run_here(train_script, "config/train_demo.py", *flags)
        share, ceiling = re.search(r"at (\d+)% \(expected\) of ([\d.]+) TFLOP/s", result.stdout).groups()
        speed = int(share) / 100 * float(ceiling) * 1e12
        flops = 6 * (4 * 12 * n_embd**2 + 50304 * n_embd) + 12 * 4 * n_embd * 64
        hours, minutes = map(int, re.search(r"time: (\d+)h (\d+)m", result.stdout).groups())
        rounding = 0.005 / float(ceiling) + 0.5 / int(share)  # of the two as printed
        assert hours + minutes / 60 == pytest.approx(1e8 * 512 * flops / speed / 3600, rel=1.1 * rounding)
        shares.append(int(share))
    assert 0 < shares[0] < shares[1] < 100


def test_a_plan_that_does_not_fit_names_one_that_does():
    command = [train_script, "config/train_fineweb_4070.py", "--plan", "--plan_vram_gb=6", "--plan_tflops=49"]
    first = run_here(*command)
    change = re.search(r"fits: no: .* fits with (--batch_size=\d+) (--gradient_accumulation_steps=\d+)", first.stdout)
    assert change, first.stdout + first.stderr
    second = run_here(*command, *change.groups())
    assert "fits: yes" in second.stdout and "524,288 per iteration" in second.stdout
    assert "another recipe" not in first.stdout + second.stdout


def test_a_plan_says_when_a_flag_makes_it_another_recipe():
    command = [train_script, "config/train_fineweb_4070.py", "--batch_size=12"]
    flags = ["--plan", "--plan_vram_gb=12", "--plan_tflops=49"]
    alone = run_here(*command, *flags).stdout
    line = re.search(r"^another recipe: 393,216 tokens .* has 524,288; (--\w+=43) comes nearest", alone, re.M)
    assert line, alone
    nearest = run_here(*command, line[1], *flags).stdout
    assert "528,384 per iteration" in nearest and "another recipe" not in nearest  # 0.8 % more


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the anonymous memory from /proc")
def test_reading_does_not_use_more_memory(tmp_path):
    """10,000 random batches from a large file. Its mapped pages do not count, as the system can drop them."""
    np.arange(60_000_000, dtype="<u4").astype("<u2").tofile(tmp_path / "train.bin")  # 120 MB

    def anonymous_mb():
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6

    before = anonymous_mb()
    windows = TrainWindows(open_bin(tmp_path, "train", 256, 65536), 256, seed=1)
    for batch in range(10_000):
        windows.batch(batch * 8, 8, torch.device("cpu"))
    assert anonymous_mb() - before < 40  # the order of the windows takes 2 MB, the rest is slack of the allocator
