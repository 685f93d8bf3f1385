"""Two runs in one folder would overwrite each other's files."""

from forks import RUN, Training, needs_fork
from helpers import metrics, train_here

SHORT = {**RUN, "max_iters": 3}


@needs_fork
def test_a_second_run_is_refused_until_the_first_is_gone(bins, tmp_path):
    first = Training(bins, tmp_path, max_iters=10**7, eval_interval=10**7)
    first.wait_for_iter(3)
    second = train_here(bins, tmp_path, **SHORT)
    assert second.returncode == 1
    assert str(tmp_path) in second.stderr
    assert "iter 0:" not in second.stdout
    first.wait_for_iter(metrics(tmp_path)[-1]["iter"] + 3)
    first.process.kill()
    first.end()

    third = train_here(bins, tmp_path, **SHORT)
    assert third.returncode == 0, third.stderr
    assert [record["iter"] for record in metrics(tmp_path)] == [0, 0, 1, 2, 3]
