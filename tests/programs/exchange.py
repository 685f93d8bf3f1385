"""A process of torchrun that uses every method of Ranks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

from onenight.system.distributed import start_ranks  # noqa: E402

ranks, _ = start_ranks("cpu")
number = ranks.rank + 1.0
tensors = [torch.tensor(number), torch.tensor(10 * number)]
ranks.sum(tensors)
print("sums", [tensor.item() for tensor in tensors])
print("any", ranks.any(ranks.rank == 1), ranks.any(False))
print("from first", ranks.from_first(7.5 if ranks.is_first else 1.0))
ranks.stop()
