"""A process of torchrun that uses every method of Ranks, and a Clock that differs from the others'.
Each process writes what it got to FOLDER/RANK.json."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

from onenight import distributed  # noqa: E402
from onenight.schedule import Clock  # noqa: E402
from onenight.settings import TrainConfig  # noqa: E402

SHAPES = [(3, 30), (7,), (), (20, 20), (50,), (2, 3, 4)]


def gloo_threads() -> bool:
    tasks = Path("/proc/self/task").glob("*/comm")
    return any("gloo" in task.read_text() for task in tasks)


ranks, device = distributed.start_ranks("cpu")
print("printed once")
got = {"device": device, "world_size": ranks.world_size, "is_first": ranks.is_first}

# Several messages, of tensors of several formats and shapes.
distributed.BUCKET_BYTES = 400
tensors = [
    torch.full(shape, (i + 1.0) * (ranks.rank + 1), dtype=dtype)
    for i, shape in enumerate(SHAPES)
    for dtype in (torch.float32, torch.float64)
]
ranks.sum(tensors)
got["sums"] = [[list(tensor.shape), tensor.unique().tolist()] for tensor in tensors]
got["any"] = [ranks.any(ranks.rank == 1), ranks.any(True), ranks.any(False)]
got["from_first"] = ranks.from_first(7.5 if ranks.is_first else 1.0)

# Clocks by which the hours are over in some processes only.
seconds = 0.0
clock = Clock(TrainConfig(hours=1.0), ranks, now=lambda: seconds)
clock.fraction(0)
seconds = 900.0 + 2000.0 * ranks.rank
got["fractions"] = [clock.fraction(1)]
seconds = 3600.0 - 3000.0 * ranks.rank
got["fractions"].append(clock.fraction(2))

# A part of torch that keeps the process group alive if it is imported after it exists; the
# optimizers import it.
import torch.distributed.nn  # noqa: E402

got["threads"] = [gloo_threads()]
ranks.stop()
got["threads"].append(gloo_threads())
Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(got))
