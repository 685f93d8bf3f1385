"""Imports each benchmark as if Python had just started it, except that libraries stay imported."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARIES = sys.path[1:]
NEEDS_PYTHONPATH = ("prepare_ways.py",)  # to contain the project


def forget_the_project():
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if Path(file).is_relative_to(ROOT) and ".venv" not in file and name != "__main__":
            del sys.modules[name]


for script in sorted((ROOT / "benchmarks").rglob("*.py")):
    if "__main__" not in script.read_text():
        continue
    forget_the_project()
    sys.path[:] = [str(script.parent), *LIBRARIES]
    if script.name in NEEDS_PYTHONPATH:
        sys.path.append(str(ROOT))
    runpy.run_path(str(script))
    print(script.relative_to(ROOT).as_posix())
