"""A change to the recipe that the project does not have: averaged weights, for which others report
a gain, with the numbers of modded-nanogpt's track 3, its iterations as fractions of the run:
https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization
"""

import torch

# The average of the weights over the last part of the run.
TAIL = 0.12  # that part, as a fraction of the run
TAIL_RATE = 2720 / 150  # of the moving average, which reaches back over 150 of 2,720 iterations
BLEND = 0.6  # the fraction of the average in the final weights


class TailAverage:
    """A moving average of the weights, except those of the embeddings, over the last part of the
    run. After the last iteration the weights are moved towards it."""

    def __init__(self, named_parameters, iters: int):
        self.parameters = [parameter for name, parameter in named_parameters if "wte" not in name]
        self.iters = iters
        self.first = round((1 - TAIL) * iters)
        self.rate = TAIL_RATE / iters
        self.mean = None

    @torch.no_grad()
    def after_step(self, iters_done: int):
        if iters_done == self.first:
            self.mean = [parameter.clone() for parameter in self.parameters]
        elif iters_done > self.first:
            torch._foreach_lerp_(self.mean, self.parameters, self.rate)
        if iters_done == self.iters:
            torch._foreach_lerp_(self.parameters, self.mean, BLEND)
