"""
How fast the iterations go, and how long the rest takes.
"""

import time

from trainer import Trainer


class Pace:
    """
    Times the iterations. The first 20 of a start, in which compilation and caches settle, and the evaluations are no
    measure and left out. `ceiling`: the TFLOP/s that MFU is measured against.
    """

    SETTLING = 20

    def __init__(self, trainer: Trainer, ceiling: float):
        self.trainer, self.ceiling = trainer, ceiling
        self.started = time.monotonic() - trainer.elapsed_s
        self.steps, self.last_s, self.eval_s = 0, 0.0, 0.0
        self.counted, self.counted_s = 0, 0.0  # iterations since the settling
        self.lap_start = (0, 0.0)
        self.per_iter_s = 0.0

    def elapsed(self) -> float:
        """Seconds of this run so far, those before a resume included; also kept in the trainer."""
        self.trainer.elapsed_s = round(time.monotonic() - self.started, 2)
        return self.trainer.elapsed_s

    def add_step(self, seconds: float):
        self.steps, self.last_s = self.steps + 1, seconds
        if self.steps > self.SETTLING:
            self.counted, self.counted_s = self.counted + 1, self.counted_s + seconds

    def lap(self) -> float:
        """Mean seconds of the iterations since the last call; 0 as long as none counts."""
        iters, seconds = self.counted - self.lap_start[0], self.counted_s - self.lap_start[1]
        if iters:
            self.per_iter_s = seconds / iters
            self.lap_start = (self.counted, self.counted_s)
        return self.per_iter_s

    def tokens_per_s(self, seconds_per_iter: float) -> float:
        return self.trainer.config.tokens_per_iter / seconds_per_iter

    def mfu(self, seconds_per_iter: float) -> float:
        """The share of the ceiling that training reaches, over all processes' devices."""
        flops = self.tokens_per_s(seconds_per_iter) * self.trainer.model.flops_per_token()
        return flops / 1e12 / self.ceiling / self.trainer.ranks.world_size

    def eta(self) -> float:
        """Seconds to the end, at the present speed and with each evaluation that is due taking as long as the last."""
        config, done = self.trainer.config, self.trainer.iter_num
        evals = -(-config.max_iters // config.eval_interval) - (done - 1) // config.eval_interval
        return (config.max_iters - done) * self.per_iter_s + evals * self.eval_s
