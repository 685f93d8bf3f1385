"""trainer.py, with the step of train.py: the arithmetic of an iteration and what it changes."""

import math

import pytest
import torch
from torch.nn import functional as F

from helpers import TINY, gpt2_of, make_bins, make_config, make_trainer, step
from onenight.data.windows import TrainWindows
from onenight.models.checkpoint import load_checkpoint, save_checkpoint
from onenight.system.distributed import Ranks
from onenight.training.trainer import Progress, StopRequested, model_args, read_progress
from train import forward_backward

# -----------------------------------------------------------------------------
# An iteration


def reference_of(trainer):
    """Return transformers' GPT-2 with the trainer's weights, and the parameters that it trains.

    They are all but the biases, which our model does not have.
    """
    checkpoint = {"model_args": trainer.model_args, "model": trainer.model.state_dict()}
    reference = gpt2_of(checkpoint).train()
    trained = [
        parameter for name, parameter in reference.named_parameters() if not name.endswith(".bias")
    ]
    return reference, trained


def make_weights_large(trainer):
    """Multiply the initial weights by 3, so that the gradients are large enough for clipping."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(3)


def gradient_norm(parameters):
    """Return the 2-norm of all gradients together, computed in float64."""
    squares = [parameter.grad.double().square().sum() for parameter in parameters]
    return math.sqrt(sum(squares))


def test_iterations_equal_those_of_a_plain_loop(bins):
    """Transformers' GPT-2 and torch's AdamW, with the micro-batches as one batch."""
    trainer = make_trainer(bins, weight_decay=0.3, grad_clip=0.5)
    make_weights_large(trainer)
    reference, trained = reference_of(trainer)
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.3},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    windows = TrainWindows(trainer.train_tokens, 32, seed=1337)

    for i, lr in enumerate((1e-2, 5e-3, 2e-3)):
        x, y = windows.batch(16 * i, 16, torch.device("cpu"))
        expected_loss = F.cross_entropy(reference(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        expected_loss.backward()
        expected_norm = gradient_norm(trained)
        assert expected_norm > 0.5  # or clipping would not be tested
        for parameter in trained:
            parameter.grad *= 0.5 / expected_norm
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

        loss, grad_norm = step(trainer, lr_multiplier=lr / 1e-2)
        # The sums are in float32, in another order.
        assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
        assert grad_norm == pytest.approx(expected_norm, rel=1e-4)

    ours = trainer.model.state_dict()
    for name, value in reference.state_dict().items():
        if name not in ours:
            continue
        is_transposed = "c_" in name or value.shape != ours[name].shape
        expected = value.T if is_transposed else value
        # AdamW divides by the size of the gradient, so rounding can move a weight by a fraction of
        # the learning rate 1e-2.
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-4)


def test_without_clipping_the_gradient_is_used_as_it_is(bins):
    trainer = make_trainer(bins, grad_clip=0.0)
    make_weights_large(trainer)
    _, grad_norm = step(trainer)
    assert grad_norm > 1
    assert gradient_norm(trainer.model.parameters()) == pytest.approx(grad_norm, rel=1e-5)


def test_with_clipping_the_returned_norm_is_that_before_it(bins):
    trainer = make_trainer(bins, grad_clip=0.5)
    make_weights_large(trainer)
    _, grad_norm = step(trainer)
    assert grad_norm > 1
    assert gradient_norm(trainer.model.parameters()) == pytest.approx(0.5, rel=1e-4)


def test_an_iteration_is_counted_in_iterations_windows_and_tokens(bins):
    trainer = make_trainer(bins)
    for _ in range(3):
        step(trainer)
    assert trainer.progress.iter_num == 3
    assert trainer.progress.position == 3 * 16
    assert trainer.progress.tokens == 3 * 16 * 32
    assert trainer.epoch == 3 * 16 / (19_999 // 32 - 1)


def test_dropout_depends_only_on_the_seed_the_iteration_and_the_process(bins):
    def random_numbers(seed=1337, iter_num=3, rank=0):
        trainer = make_trainer(bins, ranks=Ranks(rank=rank), seed=seed)
        trainer.progress.iter_num = iter_num
        trainer.seed_dropout()
        return torch.rand(4).tolist()

    first = random_numbers()
    torch.rand(1000)
    assert random_numbers() == first
    assert random_numbers(seed=1) != first
    assert random_numbers(iter_num=4) != first
    assert random_numbers(rank=1) != first


def test_two_processes_take_the_windows_of_one(bins):
    def windows(ranks):
        trainer = make_trainer(bins, ranks=ranks)
        return [tuple(window.tolist()) for x, _ in trainer.micro_batches() for window in x]

    both = windows(Ranks(rank=0, world_size=2)) + windows(Ranks(rank=1, world_size=2))
    assert len(both) == 16
    assert sorted(both) == sorted(windows(Ranks()))


def test_a_stop_between_micro_batches_discards_the_iteration(bins):
    trainer = make_trainer(bins)
    calls = []

    def stop_after_the_first():
        calls.append(1)
        return len(calls) > 1

    trainer.stop_requested = stop_after_the_first
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(StopRequested):
        trainer.sum_over_processes(forward_backward(trainer))
    with pytest.raises(StopRequested):
        trainer.mean_loss(trainer.val_tokens)
    assert trainer.progress == Progress()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


# -----------------------------------------------------------------------------
# Evaluation and samples


def test_the_mean_loss_weights_every_token_equally(bins):
    trainer = make_trainer(bins)
    make_weights_large(trainer)
    ids = torch.from_numpy(trainer.val_tokens.astype("int64"))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            _, loss = trainer.model(window[None, :-1], window[None, 1:])
            total += loss.item() * (len(window) - 1)
    expected = total / (len(ids) - 1)
    assert trainer.mean_loss(trainer.val_tokens) == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_has_at_most_eval_iters_units_of_16384_tokens(tmp_path):
    make_bins(tmp_path, train_tokens=40_000, val_tokens=20_000)
    assert make_trainer(tmp_path, eval_iters=1).eval_tokens == 2 * 16_384
    assert make_trainer(tmp_path, eval_iters=2).eval_tokens == 2 * 16_384 + 20_000
    assert make_trainer(tmp_path, eval_iters=9).eval_tokens == 60_000


def test_a_model_of_another_vocabulary_than_gpt2s_writes_no_sample(bins):
    assert make_trainer(bins).sample() == ""


def test_weights_with_one_infinite_value_are_not_finite(bins):
    trainer = make_trainer(bins)
    assert trainer.weights_are_finite()
    with torch.no_grad():
        trainer.model.transformer.h[1].ln_2.weight[31] = math.inf
    assert not trainer.weights_are_finite()


# -----------------------------------------------------------------------------
# Shape and state


def test_the_vocabulary_is_that_of_meta_json_padded_to_a_multiple_of_64(bins, tmp_path):
    assert model_args(make_config(bins))["vocab_size"] == 256
    assert model_args(make_config(tmp_path))["vocab_size"] == 50304  # GPT-2's, without meta.json


def test_the_vocabulary_is_that_of_the_checkpoint_to_start_from(bins):
    config = make_config(bins, init_from="x.pt")
    checkpoint = {"model_args": {**config.shape, "vocab_size": 250}}
    assert model_args(config, checkpoint)["vocab_size"] == 250


def test_the_state_of_a_checkpoint_is_restored(bins, tmp_path):
    trainer = make_trainer(bins, dropout=0.1)
    for _ in range(3):
        step(trainer)
    trainer.progress.count_evaluation(2.0, min_delta=0.0)
    save_checkpoint(tmp_path / "ckpt.pt", trainer.checkpoint())

    resumed = make_trainer(bins, dropout=0.1)
    resumed.restore(load_checkpoint(tmp_path / "ckpt.pt"))
    assert resumed.progress == trainer.progress
    for _ in range(2):
        assert step(resumed) == step(trainer)


# -----------------------------------------------------------------------------
# Progress


def test_evaluations_that_do_not_improve_are_counted():
    progress = Progress(iter_num=10)
    assert progress.count_evaluation(3.0, min_delta=0.1)
    assert (progress.best_val_loss, progress.best_iter, progress.stale_evals) == (3.0, 10, 0)
    progress.iter_num = 20
    assert progress.count_evaluation(2.95, min_delta=0.1)  # the best, but not by 0.1
    assert (progress.best_val_loss, progress.best_iter, progress.stale_evals) == (2.95, 20, 1)
    progress.iter_num = 30
    assert not progress.count_evaluation(2.99, min_delta=0.1)
    assert (progress.best_val_loss, progress.best_iter, progress.stale_evals) == (2.95, 20, 2)
    progress.iter_num = 40
    assert progress.count_evaluation(2.0, min_delta=0.1)
    assert (progress.best_val_loss, progress.best_iter, progress.stale_evals) == (2.0, 40, 0)
    assert progress.evaluated_iter == 40


def test_the_progress_of_nanogpts_checkpoints_follows_from_the_iterations():
    checkpoint = {"iter_num": 9, "best_val_loss": torch.tensor(2.5), "model": {}, "config": {}}
    progress = read_progress(checkpoint, make_config("unused"))
    assert progress == Progress(
        iter_num=9,
        position=9 * 16,
        tokens=9 * 16 * 32,
        fraction=9 / TINY["max_iters"],
        best_val_loss=2.5,
    )
    assert type(progress.best_val_loss) is float


def test_the_tokens_of_nanogpts_checkpoints_are_those_of_their_own_batch_size():
    then = {"batch_size": 3, "gradient_accumulation_steps": 5, "block_size": 32}
    progress = read_progress({"iter_num": 9, "config": then}, make_config("unused"))
    assert progress.position == 9 * 3 * 5
    assert progress.tokens == 9 * 3 * 5 * 32


def test_the_progress_of_older_checkpoints_is_relative_to_the_length_that_they_decided_on():
    older = {"iter_num": 30, "position": 500, "hours": 8.0, "decisions": 1, "warmdown_iters": 70}
    config = make_config("unused", max_iters=45)
    progress = read_progress({**older, "max_iters": 100}, config)
    assert progress.fraction == 0.3
    assert progress.position == 500
    progress = read_progress({**older, "max_iters": 0, "decisions": 0}, config)
    assert progress.fraction == 30 / 45


@pytest.mark.parametrize(
    "before, now, fraction",
    [
        ({"hours": 0.0}, {"hours": 4.0}, 0.5),  # a run that was finished by max_iters
        ({"hours": 2.0}, {"hours": 4.0}, 0.5),
        ({"hours": 4.0}, {"hours": 4.0}, 1.0),
        ({"hours": 4.0}, {}, 1.0),
    ],
)
def test_a_finished_run_with_more_hours_is_at_the_fraction_that_has_passed(before, now, fraction):
    checkpoint = {"iter_num": 45, "fraction": 1.0, "elapsed_s": 2 * 3600.0, "config": before}
    assert read_progress(checkpoint, make_config("unused", **now)).fraction == fraction


def test_a_checkpoints_own_progress_is_read():
    own = {"iter_num": 9, "position": 200, "tokens": 7000, "fraction": 0.25, "elapsed_s": 12.5}
    assert read_progress(own, make_config("unused")) == Progress(**own)


def test_a_val_loss_that_is_not_a_number_is_no_improvement():
    progress = Progress(iter_num=40, best_val_loss=3.0, stale_evals=4)
    assert not progress.count_evaluation(math.nan, min_delta=0.0)
    assert progress.stale_evals == 5
    assert progress.count_evaluation(2.9, min_delta=0.0)
    assert progress.stale_evals == 0
