"""train.py that reports whether threads of gloo exist during the run and after it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train  # noqa: E402
from onenight.system.distributed import Ranks  # noqa: E402


def has_gloo_threads() -> bool:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return any("gloo" in name for name in names)


stop = Ranks.stop
during = []


def stop_and_note(ranks):
    during.append(has_gloo_threads())
    stop(ranks)


Ranks.stop = stop_and_note
train.main(sys.argv[1:])
after = has_gloo_threads()
sys.stderr.write(f"gloo threads in the run: {during[0]}, after it: {after}\n")
