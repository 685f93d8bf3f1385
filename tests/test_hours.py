"""train.py --hours: runs that end in time, here of twenty seconds, also when stopped, resumed or disturbed."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import TINY, load, start_training, train, wait_for_line

SECONDS = 20
HOURS = SECONDS / 3600
SHARED = 0.3  # runs this short, with other tests beside them: see benchmarks/LOG.md
# Small micro-batches, so that an iteration takes long enough to be steady; an evaluation every few seconds.
LONG = {"gradient_accumulation_steps": 8, "log_interval": 10, "eval_interval": 300, "hours": HOURS}
TRAPEZOID = {**LONG, "warmup_iters": 0, "warmdown_iters": 30, "min_lr": 0.0}
COSINE = {**LONG, "warmup_iters": 80}


def decisions(stdout):
    """The iterations that the lines about the length name."""
    return [int(iters.replace(",", "")) for iters in re.findall(r"^hours: ([\d,]+) iterations", stdout, re.M)]


def elapsed(out_dir):
    return json.loads((out_dir / "metrics.jsonl").read_text().splitlines()[-1])["elapsed_s"]


@pytest.mark.parametrize(
    "settings, n_decisions, tolerance",
    [(TRAPEZOID, 2, SHARED), (COSINE, 1, 2 * SHARED)],  # a cosine's one decision is early
    ids=["trapezoid", "cosine"],
)
def test_a_run_ends_in_time_with_its_rate_at_the_minimum(bins, tmp_path, settings, n_decisions, tolerance):
    result = train(bins, tmp_path, **settings)
    assert result.returncode == 0, result.stderr
    lengths = decisions(result.stdout)
    assert len(lengths) == n_decisions
    checkpoint = load(tmp_path)
    assert checkpoint["iter_num"] == checkpoint["max_iters"] == lengths[-1]
    assert elapsed(tmp_path) == pytest.approx(SECONDS, rel=tolerance)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["lr"] == pytest.approx(settings.get("min_lr", TINY["min_lr"]))


def test_stopped_and_resumed_it_takes_its_decision_along(bins, tmp_path):
    process = start_training(bins, tmp_path, **TRAPEZOID)
    wait_for_line(process, "hours:")
    wait_for_line(process, "iter")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    decided = load(tmp_path)["max_iters"]
    time.sleep(5)  # does not count
    resumed = train(bins, tmp_path, **TRAPEZOID, init_from="resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "changed since" not in resumed.stdout
    assert len(decisions(resumed.stdout)) == 1  # the second and last one
    assert load(tmp_path)["decisions"] == 2 and decided > 0
    assert elapsed(tmp_path) == pytest.approx(SECONDS, rel=SHARED)
    late = train(bins, tmp_path, **{**TRAPEZOID, "hours": 1.0}, init_from="resume")
    assert "the decay has begun, so the run still ends at iter" in late.stdout
    assert "this run is finished" in late.stdout


def test_other_hours_before_the_decay_decide_anew(bins, tmp_path):
    process = start_training(bins, tmp_path, **{**TRAPEZOID, "hours": 1.0})
    wait_for_line(process, "hours:")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert load(tmp_path)["decisions"] == 1
    resumed = train(bins, tmp_path, **TRAPEZOID, init_from="resume")
    assert len(decisions(resumed.stdout)) == 2, resumed.stdout
    assert elapsed(tmp_path) < 60  # and not an hour


def test_a_machine_that_slows_down_midway_still_ends_it_in_time(bins, tmp_path):
    process = start_training(bins, tmp_path, **TRAPEZOID)
    wait_for_line(process, "hours:")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        for other in busy:
            other.kill()
    assert process.returncode == 0, stderr
    assert elapsed(tmp_path) == pytest.approx(SECONDS, rel=SHARED)


def test_the_plan_tells_what_the_hours_buy(bins):
    plans = [train(bins, "unused", plan=True, plan_tflops=1.0, hours=hours).stdout for hours in (1.0, 2.0)]
    iterations = [int(re.search(r"([\d,]+) iterations", plan)[1].replace(",", "")) for plan in plans]
    assert iterations[1] == pytest.approx(2 * iterations[0], abs=1)
    assert "time: 1h 00m" in plans[0] or "time: 59m" in plans[0]
    assert "over 4 the same text teaches little more" in plans[0]
