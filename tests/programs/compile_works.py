"""Prints whether torch.compile works on the CPU."""

import torch

from onenight.system.device import compile_works

print(compile_works(torch.device("cpu")))
