"""
The changes to muon-qwen3 that others report gains from, as the proxy tries them (see run.py): what the project does not
have unless it stays. The numbers are those of modded-nanogpt's track 3, its steps as shares of the run:
https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization
"""

from collections import defaultdict

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # torch.optim.Muon's coefficients and 5 steps
ROW_BETA = 0.95  # NorMuon's, of the second moment of a row
LOOKAHEAD, LOOKAHEAD_FROM, LOOKAHEAD_TO = 0.6, 500 / 3150, 2400 / 3150  # EMA-Nesterov's
TAIL = 0.12  # of the run, over whose end the weights are averaged
BLEND = 0.6  # the share of the average in the weights at the end


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, with the matrices of one shape made orthogonal together, and two options. `row_norm` (NorMuon,
    arXiv:2510.05491): the longer side's rows of an update are divided by the root of their own second moment, the
    update's norm kept. `cautious` (arXiv:2510.12402): weights decay only where the update moves them towards zero."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, row_norm=False, cautious=False):
        options = {"momentum": momentum, "row_norm": row_norm, "cautious": cautious}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for (rows, columns), matrices in by_shape.items():
                moments = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in matrices]
                torch._foreach_lerp_(moments, [p.grad for p in matrices], 1 - group["momentum"])
                nesterov = torch._foreach_lerp([p.grad for p in matrices], moments, group["momentum"])
                updates = orthogonal(torch.stack(nesterov))
                if group["row_norm"]:
                    updates = self.even_rows(updates, matrices, dim=-1 if rows >= columns else -2)
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for parameter, update in zip(matrices, updates.to(matrices[0].dtype)):
                    shrink = 1 - group["lr"] * group["weight_decay"]
                    if group["cautious"]:
                        shrink = torch.where(update * parameter > 0, shrink, 1.0)
                    parameter.mul_(shrink).sub_(update, alpha=rate)

    def even_rows(self, updates, matrices, dim: int):
        norm, squares = updates.norm(dim=(-2, -1), keepdim=True), updates.float().square().mean(dim, keepdim=True)
        moments = [self.state[p].setdefault("row_moment", torch.zeros_like(s)) for p, s in zip(matrices, squares)]
        torch._foreach_lerp_(moments, list(squares), 1 - ROW_BETA)
        updates = updates * torch.stack(moments).clamp(min=1e-10).rsqrt()
        return updates * (norm / updates.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


def orthogonal(matrices):
    """The matrices (N, rows, columns) with all singular values near 1, by Newton-Schulz in bfloat16."""
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Lookahead:
    """EMA-Nesterov (arXiv:2605.25395): before each iteration the weights move ahead, by a share of the moving average
    of their displacement over about 3 % of the run; the iteration goes on from there."""

    def __init__(self, parameters, iters: int):
        self.parameters, self.iters, self.beta = list(parameters), iters, max(0.9, 1 - 32 / iters)
        self.mean = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def move(self, iter_num: int, lr_share: float):
        self.before = [parameter.clone() for parameter in self.parameters]
        if LOOKAHEAD_FROM <= iter_num / self.iters < LOOKAHEAD_TO:
            torch._foreach_add_(self.parameters, self.mean, alpha=LOOKAHEAD * lr_share)

    @torch.no_grad()
    def note(self):
        moved = torch._foreach_sub(self.parameters, self.before)
        torch._foreach_lerp_(self.mean, moved, 1 - self.beta)


class TailAverage:
    """A moving average of the weights over the last part of the run (but not of the embeddings), with a horizon of 150
    in 2,720 iterations; at the end the weights are moved towards it."""

    def __init__(self, named_parameters, iters: int):
        self.parameters = [parameter for name, parameter in named_parameters if "wte" not in name]
        self.first, self.iters, self.rate, self.mean = round((1 - TAIL) * iters), iters, 2720 / 150 / iters, None

    @torch.no_grad()
    def note(self, iters_done: int):
        if iters_done == self.first:
            self.mean = [parameter.clone() for parameter in self.parameters]
        elif iters_done > self.first:
            torch._foreach_lerp_(self.mean, self.parameters, self.rate)
        if iters_done == self.iters:
            torch._foreach_lerp_(self.parameters, self.mean, BLEND)
