"""
Measures on your own GPU what the project has not measured yet.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --peer=../nanoGPT --minutes=40
    python benchmarks/gpu.py --parts=int8,resuming

These are speed, memory against the plan, the gain of --int8, nanoGPT beside it, running out of
memory, resuming, sampling, and the gain of some switches. It trains on random ids in a temporary
folder and does not touch data/ and out*/. Each measurement runs in a process of its own: if one
fails, it is a line in the table, and the others still run. The most important parts come first, and
parts that do not fit into --minutes are listed. After each measurement it writes
benchmarks/results/gpu-<name of the card>.json (with --parts, their names follow), and the table
beside it as .md. Without a GPU the same parts run with tiny models, which shows only that they
work. What a part measures is in gpu_parts.py, and a measurement in gpu_measure.py.
"""

import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS
from configurator import UserError, configure, setting
from gpu_bench import Bench, OutOfTime
from gpu_parts import PARTS
from gpu_report import Report
from onenight.system.console import run_script
from onenight.system.wording import first_line


@dataclass
class GpuConfig:
    peer: str = setting("", "folder of a nanoGPT checkout to measure beside ours", path=True)
    minutes: float = setting(15.0, "stop after this time, and name what was not reached", above=0)
    parts: str = setting("", "parts to measure, separated by commas; '': all")
    device: str = setting(
        "auto", "'auto' is the GPU if there is one", choices=("auto", "cuda", "cpu")
    )
    save: str = setting(
        "",
        "JSON file for the figures; '': benchmarks/results/gpu-<card and parts>.json",
        path=True,
    )

    def __post_init__(self):
        unknown = [name for name in self.part_names if name not in PARTS]
        if unknown:
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, not {', '.join(unknown)}")
        if self.save and not self.save.endswith(".json"):
            raise ValueError(
                f"save must end in .json, not {self.save!r}; the table goes beside it as .md"
            )

    @property
    def part_names(self) -> list[str]:
        return self.parts.split(",") if self.parts else list(PARTS)


def main(arguments: list[str]):
    config = configure(GpuConfig, arguments, __doc__)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            bench = Bench(Path(folder), config)
            command = " ".join(["python benchmarks/gpu.py", *arguments])
            about = {"command": command, "tiny": bench.tiny, **bench.card}
            path = config.save or RESULTS / f"{file_name(bench, config.parts)}.json"
            report = Report(Path(path), about)
            for part in config.part_names:
                measure_part(part, bench, report)
    except KeyboardInterrupt:
        print("stopped; the figures so far have been saved", file=sys.stderr)
        raise SystemExit(130) from None
    except OutOfTime:
        raise UserError("the card did not answer within two minutes; check it with nvidia-smi")


def file_name(bench: Bench, parts: str) -> str:
    """Return the name of the files for the figures: that of the card and, if not all are measured,
    those of the parts."""
    machine = "tiny" if bench.tiny else bench.card["machine"]
    name = f"gpu {machine} {parts}".lower()
    return re.sub("[^a-z0-9]+", "-", name).strip("-")


def measure_part(part: str, bench: Bench, report: Report):
    """Measure a part until it ends or its time is over, and report the reason if it did not
    end."""
    measure, limit_s = PARTS[part]
    started = time.monotonic()
    bench.deadline = min(bench.end, started + limit_s)
    n_measured = 0
    problem = ""
    try:
        if started >= bench.end:
            raise OutOfTime
        for name, figures in measure(bench):
            report.add(part, name, figures)
            n_measured += 1
    except OutOfTime:
        limit = f"{limit_s:g} seconds"
        if bench.deadline == bench.end:
            limit = f"{bench.minutes:g} minutes"
        problem = f"not reached in {limit}"
    except Exception as error:  # an error in one part does not end the others
        problem = f"{type(error).__name__}: {first_line(error)}"
    if problem:
        missing = "the rest" if n_measured else "all of it"
        report.add(part, missing, {"skipped": problem})


if __name__ == "__main__":
    run_script(main)
