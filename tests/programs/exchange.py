"""A process of torchrun that uses every method of Ranks, and a Clock that differs from the
other's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

from onenight import distributed  # noqa: E402
from onenight.schedule import Clock  # noqa: E402
from onenight.settings import TrainConfig  # noqa: E402

SHAPES = [(3, 30), (7,), (), (20, 20), (50,), (2, 3, 4)]


def has_threads_of_the_group() -> bool:
    tasks = Path("/proc/self/task").glob("*/comm")
    return any("gloo" in task.read_text() for task in tasks)


ranks, device = distributed.start_ranks("cpu")
assert (device, ranks.world_size) == ("cpu", 2)
assert ranks.is_first == (ranks.rank == 0)
print("printed once")

for dtype in (torch.float32, torch.float64):
    tensors = [
        torch.full(shape, (i + 1.0) * (ranks.rank + 1), dtype=dtype)
        for i, shape in enumerate(SHAPES)
    ]
    ranks.sum(tensors)
    for i, (tensor, shape) in enumerate(zip(tensors, SHAPES)):
        assert tensor.shape == shape
        assert tensor.unique().tolist() == [(i + 1.0) * (1 + 2)]
assert ranks.any(ranks.rank == 1)
assert not ranks.any(False)
assert ranks.from_first(7.5 if ranks.is_first else 1.0) == 7.5

# By the clock of the first process a quarter of the hours is over, and then all; by the other's
# more, and then less. If one of them did another iteration, it would wait for the other for ever.
seconds = 0.0
clock = Clock(TrainConfig(hours=1.0), ranks, now=lambda: seconds)
clock.fraction(0)
seconds = 900.0 + 2000.0 * ranks.rank
assert clock.fraction(1) == 0.25
seconds = 3600.0 - 3000.0 * ranks.rank
assert clock.fraction(2) == 1.0

# A part of torch that keeps the process group alive if it is imported after it exists; the
# optimizers import it. A thread of the group that frees a tensor while Python exits aborts the
# process, once in many runs.
import torch.distributed.nn  # noqa: E402

assert has_threads_of_the_group()
ranks.stop()
assert not has_threads_of_the_group()
