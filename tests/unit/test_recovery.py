"""recovery.py: memory that runs out, numbers that are not finite, and the way back.

Whole runs with these faults are in tests/faults/.
"""

import math

import pytest
import torch
from torch._inductor.exc import CppCompileError, InductorError

from configurator import UserError
from helpers import SmallMemory, make_trainer, step
from onenight.models.checkpoint import LATEST, save_checkpoint
from onenight.training.metrics import Metrics, read_metrics
from onenight.training.recovery import (
    MAX_OVERFLOWS_IN_ROW,
    MAX_RELOADS,
    MAX_SKIPPED_IN_ROW,
    Recovery,
)

MUON = {
    "architecture": "qwen3",
    "optimizer": "muon",
    "embedding_lr": 0.1,
    "head_lr": 0.01,
    "vector_lr": 0.01,
}


def run_out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def copy_weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


# -----------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    "batch_size, accumulation, limit, remaining",
    [(8, 2, 3, 2), (12, 1, 4, 3), (6, 3, 1, 1), (7, 1, 3, 1)],
)
def test_out_of_memory_continues_with_smaller_micro_batches_and_the_same_losses(
    bins, capsys, batch_size, accumulation, limit, remaining
):
    """The same windows in the same order, compared with a run that is not disturbed."""
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    undisturbed = make_trainer(bins, **sizes)
    squeezed = make_trainer(bins, **sizes)
    squeezed.compiled_model = SmallMemory(squeezed.model, limit)
    for _ in range(3):
        # float32 sums in another order
        assert step(squeezed, lr_multiplier=0.1) == pytest.approx(
            step(undisturbed, lr_multiplier=0.1), rel=1e-5
        )
    val_tokens = undisturbed.val_tokens
    assert squeezed.mean_loss(val_tokens) == pytest.approx(
        undisturbed.mean_loss(val_tokens), rel=1e-6
    )
    windows = batch_size * accumulation
    assert squeezed.progress.position == 3 * windows
    assert squeezed.progress.position == undisturbed.progress.position
    assert squeezed.micro_batch_size == remaining
    assert squeezed.micro_batches_per_iter == windows // remaining
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == (
        f"out of memory: continuing with --batch_size={remaining} "
        f"--gradient_accumulation_steps={windows // remaining} (same effective batch)"
    )
    assert all(line.startswith("out of memory: continuing with") for line in lines)


def test_out_of_memory_in_an_evaluation(bins):
    trainer = make_trainer(bins)
    expected = trainer.mean_loss(trainer.val_tokens)
    trainer.compiled_model = SmallMemory(trainer.model, 3)
    loss = Recovery(trainer).within_memory(trainer.mean_loss, trainer.val_tokens)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert trainer.micro_batch_size == 2
    assert trainer.micro_batches_per_iter == 8


def test_out_of_memory_with_a_single_window_is_one_sentence(bins):
    trainer = make_trainer(bins)
    trainer.compiled_model = SmallMemory(trainer.model, 0)
    with pytest.raises(UserError, match="out of memory with a micro-batch of one window; use a"):
        step(trainer)
    assert trainer.compiled_model.calls == [8, 4, 2, 1]


def test_a_model_that_cannot_be_compiled_is_trained_without_torch_compile(bins, capsys):
    undisturbed = make_trainer(bins)
    trainer = make_trainer(bins)
    calls = []

    def fail(x, y):
        calls.append(len(x))
        raise InductorError(CppCompileError(["g++"], "g++: fatal error: no room"), None)

    trainer.compiled_model = fail
    for _ in range(2):
        assert step(trainer) == step(undisturbed)
    assert calls == [8]
    printed = capsys.readouterr().out
    assert printed.startswith("torch.compile: disabled (g++: fatal error: no room). To enable it:")
    assert printed.count("\n") == 1


def test_other_errors_are_raised(bins):
    trainer = make_trainer(bins)
    trainer.compiled_model = lambda x, y: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step(trainer)
    with pytest.raises(ZeroDivisionError):
        Recovery(trainer).guard_update(lambda trainer, loss: 1 / 0, 1.0)


def test_memory_that_runs_out_in_an_update_leads_back_to_the_checkpoint(bins, tmp_path, capsys):
    """AdamW's update fails after Muon's: the weights are half new."""
    trainer = make_trainer(bins, out_dir=str(tmp_path), **MUON)
    recovery = Recovery(trainer, tmp_path)
    for _ in range(3):
        step(trainer, recovery)
    save_checkpoint(tmp_path / LATEST, trainer.checkpoint())
    before = copy_weights(trainer)

    trainer.optimizers = {key: trainer.optimizers[key] for key in ("muon", "optimizer")}
    hook = trainer.optimizers["optimizer"].register_step_pre_hook(run_out_of_memory)
    step(trainer, recovery)
    hook.remove()
    attention = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(trainer.model.state_dict()[attention], before[attention])

    recovery.go_back_if_needed()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert trainer.progress.iter_num == 3
    assert trainer.micro_batch_size == 4
    printed = capsys.readouterr().out
    assert "memory ran out in an update: back to iter 3, continuing with later data" in printed
    step(trainer, recovery)
    recovery.go_back_if_needed()
    assert trainer.progress.iter_num == 4


def test_memory_that_runs_out_in_an_update_before_any_checkpoint_ends_the_run(bins, tmp_path):
    trainer = make_trainer(bins)
    recovery = Recovery(trainer, tmp_path)
    trainer.optimizers["optimizer"].register_step_pre_hook(run_out_of_memory)
    step(trainer, recovery)
    with pytest.raises(UserError, match="before any checkpoint; try a smaller --batch_size"):
        recovery.go_back_if_needed()


# -----------------------------------------------------------------------------
# Numbers that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_update(bins, capsys, value):
    trainer = make_trainer(bins, **MUON)
    recovery = Recovery(trainer)
    step(trainer, recovery)
    before = copy_weights(trainer)
    hook = trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * value)
    _, grad_norm = step(trainer, recovery)
    hook.remove()
    assert not math.isfinite(grad_norm)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert recovery.skipped_in_row == 1
    assert trainer.progress.skipped_iters == 1
    assert trainer.progress.iter_num == 2
    assert trainer.progress.position == 32
    printed = capsys.readouterr().out
    assert printed == "iter 1: non-finite loss or gradient: update skipped\n"

    step(trainer, recovery)
    assert recovery.skipped_in_row == 0
    assert trainer.progress.skipped_iters == 1
    assert not torch.equal(trainer.model.lm_head.weight, before["lm_head.weight"])


def test_an_overflow_under_loss_scaling_skips_all_optimizers_and_is_not_counted(bins):
    """An infinite gradient in one of Muon and AdamW leaves the weights of both as they are."""
    trainer = make_trainer(bins, **MUON)
    recovery = Recovery(trainer)
    # Head and outputs start at zero, and pass no gradient on before they have changed.
    for _ in range(3):
        step(trainer, recovery)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = copy_weights(trainer)
    overflow = trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    step(trainer, recovery)
    overflow.remove()
    assert trainer.scaler.get_scale() == 2.0**15
    assert recovery.skipped_in_row == 0
    assert trainer.progress.skipped_iters == 0
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name

    step(trainer, recovery)
    for name, value in trainer.model.state_dict().items():
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name


def test_overflows_without_end_count_as_skipped_iterations(bins):
    trainer = make_trainer(bins)
    trainer.scaler = torch.amp.GradScaler("cpu")
    recovery = Recovery(trainer)
    for _ in range(MAX_OVERFLOWS_IN_ROW):
        recovery.guard_update(lambda trainer, loss: math.inf, 5.0)
    recovery.go_back_if_needed()
    assert recovery.skipped_in_row == 0
    for _ in range(MAX_SKIPPED_IN_ROW):
        recovery.guard_update(lambda trainer, loss: math.inf, 5.0)
    with pytest.raises(UserError, match="before any checkpoint"):
        recovery.go_back_if_needed()


def test_memory_that_runs_out_before_the_scale_is_checked_leads_back(bins, tmp_path):
    """GradScaler would refuse another update() then."""
    trainer = make_trainer(bins, out_dir=str(tmp_path))
    trainer.scaler = torch.amp.GradScaler("cpu")
    trainer.make_scaler = lambda: torch.amp.GradScaler("cpu")
    recovery = Recovery(trainer, tmp_path)
    step(trainer, recovery)
    save_checkpoint(tmp_path / LATEST, trainer.checkpoint())
    trainer.scaler.unscale_ = run_out_of_memory
    step(trainer, recovery)
    recovery.go_back_if_needed()
    assert trainer.progress.iter_num == 1
    step(trainer, recovery)
    assert trainer.progress.iter_num == 2


def test_under_loss_scaling_the_step_is_the_same(bins):
    scaled = make_trainer(bins, grad_clip=0.1)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    plain = make_trainer(bins, grad_clip=0.1)
    for _ in range(3):
        assert step(scaled) == pytest.approx(step(plain), rel=1e-6)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(scaled.model.state_dict()[name], value, rtol=0, atol=1e-5)


def poison(recovery, n):
    """Do n iterations whose loss is NaN."""
    for _ in range(n):
        recovery.guard_update(lambda trainer, loss: 1.0, math.nan)
        recovery.trainer.progress.count_iteration(recovery.trainer.config)


def test_too_many_skipped_iterations_in_a_row_lead_back_with_later_data(bins, tmp_path, capsys):
    trainer = make_trainer(bins, out_dir=str(tmp_path))
    recovery = Recovery(trainer, tmp_path, Metrics(tmp_path))
    for iter_num in range(8):
        recovery.metrics.write({"iter": iter_num, "train_loss": 1.0})
    step(trainer, recovery)
    save_checkpoint(tmp_path / LATEST, trainer.checkpoint())
    poison(recovery, MAX_SKIPPED_IN_ROW - 1)
    recovery.go_back_if_needed()
    assert trainer.progress.iter_num == MAX_SKIPPED_IN_ROW
    poison(recovery, 1)
    recovery.go_back_if_needed()
    assert trainer.progress.iter_num == 1
    assert trainer.progress.tokens == 512
    assert trainer.progress.position == (1 + MAX_SKIPPED_IN_ROW) * 16
    assert trainer.progress.skipped_iters == MAX_SKIPPED_IN_ROW
    assert recovery.skipped_in_row == 0
    line = "loss or weights are not finite: back to iter 1, continuing with later data\n"
    assert capsys.readouterr().out.endswith(line)
    assert [record["iter"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0]


def test_a_checkpoint_that_does_not_help_is_not_reloaded_for_ever(bins, tmp_path):
    trainer = make_trainer(bins, out_dir=str(tmp_path))
    recovery = Recovery(trainer, tmp_path)
    save_checkpoint(tmp_path / LATEST, trainer.checkpoint())
    for _ in range(MAX_RELOADS):
        poison(recovery, MAX_SKIPPED_IN_ROW)
        recovery.go_back_if_needed()
    poison(recovery, MAX_SKIPPED_IN_ROW)
    words = "not finite again at iter 5; .*ckpt.pt is good: .* a lower --learning_rate"
    with pytest.raises(UserError, match=words):
        recovery.go_back_if_needed()


def test_weights_that_are_not_finite_lead_back_if_they_are_checked(bins, tmp_path):
    trainer = make_trainer(bins, out_dir=str(tmp_path))
    recovery = Recovery(trainer, tmp_path)
    save_checkpoint(tmp_path / LATEST, trainer.checkpoint())
    with torch.no_grad():
        trainer.model.transformer.wpe.weight[31] = math.inf
    recovery.go_back_if_needed()
    assert not trainer.weights_are_finite()
    recovery.go_back_if_needed(check_weights=True)
    assert trainer.weights_are_finite()


def test_without_a_checkpoint_there_is_no_way_back(bins):
    recovery = Recovery(make_trainer(bins))
    poison(recovery, MAX_SKIPPED_IN_ROW)
    words = "loss or weights are not finite at iter 5, before any checkpoint; try a lower"
    with pytest.raises(UserError, match=words):
        recovery.go_back_if_needed()
