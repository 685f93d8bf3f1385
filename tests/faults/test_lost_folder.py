"""The folder of a run is removed or renamed while it trains."""

import os
import shutil
import time

import pytest

import train as train_script
from configurator import UserError
from helpers import load, make_run, make_trainer, metrics, start_training, stop, wait_for_iter
from onenight.system.locks import lock_folder


def rename(folder):
    folder.rename(folder.with_name("renamed"))


@pytest.mark.skipif(os.name != "posix", reason="Windows does not remove a folder that is in use")
@pytest.mark.parametrize("lose", [shutil.rmtree, rename], ids=["removed", "renamed"])
def test_a_lost_folder_is_created_and_locked_again(bins, tmp_path, capsys, lose):
    out_dir = tmp_path / "out"
    trainer = make_trainer(bins, out_dir=str(out_dir))
    run = make_run(trainer, out_dir)
    run.lock.enter_context(lock_folder(out_dir))

    def lose_folder(*_):
        if trainer.progress.iter_num == 25:
            lose(out_dir)

    trainer.optimizers["optimizer"].register_step_post_hook(lose_folder)
    with run.lock:
        assert train_script.train(run) == "done"
        with pytest.raises(UserError, match="is writing there"), lock_folder(out_dir):
            pass
    printed = capsys.readouterr().out
    line = f"{out_dir} was removed or renamed during the run: creating it again\n"
    assert printed.count(line) == 1
    assert "cannot be written" not in printed
    assert load(out_dir)["iter_num"] == 45
    steps = [record["iter"] for record in metrics(out_dir) if "train_loss" in record]
    assert steps == list(range(25, 45))
    assert not (out_dir / "lock").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_a_stop_saves_to_a_folder_that_was_renamed_just_before(bins, tmp_path):
    out_dir = tmp_path / "out"
    # Iterations that are not logged, so that only the stop writes.
    endless = {"max_iters": 10**7, "lr_decay_iters": 10**7}
    process = start_training(bins, out_dir, eval_interval=10**7, log_interval=10**6, **endless)
    wait_for_iter(process, 0)
    time.sleep(0.3)  # until it has recorded iteration 0
    rename(out_dir)
    stdout, _ = stop(process)
    assert "was removed or renamed during the run: creating it again" in stdout
    assert "to continue, add --init_from=resume" in stdout
    assert load(out_dir)["iter_num"] > 0
