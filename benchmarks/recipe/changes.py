"""Changes to muon-qwen3 for which others report gains.

The project does not have them unless they prove useful here (see run.py and gpu_ab.py). The numbers
are those of modded-nanogpt's track 3, with its iterations as fractions of the run:
https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization
"""

from collections import defaultdict

import torch

# The coefficients of torch.optim.Muon, and the number of its steps.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ROW_BETA = 0.95  # NorMuon: of the second moment of a row

# EMA-Nesterov: how far ahead, and in which part of the run.
LOOKAHEAD = 0.6
LOOKAHEAD_FROM = 500 / 3150
LOOKAHEAD_TO = 2400 / 3150

# The average of the weights over the last part of the run.
TAIL = 0.12  # that part, as a fraction of the run
TAIL_RATE = 2720 / 150  # of the moving average, which reaches back over 150 of 2,720 iterations
BLEND = 0.6  # the fraction of the average in the final weights


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, which here processes all matrices of one shape together, with two options.

    Args:
        params: matrices, or parameter groups of matrices.
        row_norm: NorMuon (arXiv:2510.05491): divide each row of an update, along its longer side,
            by the root of that row's second moment, and keep the norm of the whole update.
        cautious: decay a weight only where the update moves it towards zero (arXiv:2510.12402).
    """

    def __init__(
        self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, row_norm=False, cautious=False
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "row_norm": row_norm,
            "cautious": cautious,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for matrices in by_shape.values():
                self.update(matrices, group)

    def update(self, matrices: list[torch.Tensor], group: dict):
        """Update matrices of one shape."""
        rows, columns = matrices[0].shape

        # Nesterov momentum
        gradients = [parameter.grad for parameter in matrices]
        moments = [self.state_of(parameter, "momentum_buffer") for parameter in matrices]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, moments, group["momentum"])

        updates = orthogonal(torch.stack(directions))
        if group["row_norm"]:
            longer_side = -1 if rows >= columns else -2
            updates = self.even_rows(updates, matrices, longer_side)

        lr = group["lr"]
        update_lr = lr * max(1, rows / columns) ** 0.5
        decay = 1 - lr * group["weight_decay"]
        for parameter, update in zip(matrices, updates.to(matrices[0].dtype)):
            if group["cautious"]:
                parameter.mul_(torch.where(update * parameter > 0, decay, 1.0))
            else:
                parameter.mul_(decay)
            parameter.sub_(update, alpha=update_lr)

    def even_rows(self, updates: torch.Tensor, matrices: list[torch.Tensor], dim: int):
        """Return the updates, (N, rows, columns), with their mean squares along `dim` divided by
        the moving averages of them, and with the norms that they had."""
        norms = updates.norm(dim=(-2, -1), keepdim=True)
        squares = updates.float().square().mean(dim, keepdim=True)
        moments = []
        for parameter, square in zip(matrices, squares):
            moments.append(self.state_of(parameter, "row_moment", like=square))
        torch._foreach_lerp_(moments, list(squares), 1 - ROW_BETA)
        updates = updates * torch.stack(moments).clamp(min=1e-10).rsqrt()
        return updates * (norms / updates.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))

    def state_of(self, parameter: torch.Tensor, name: str, like: torch.Tensor | None = None):
        """Return a tensor of the parameter's state; at first zeros, in the shape of `like` or of
        the parameter."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter if like is None else like)
        return state[name]


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return the matrices, (N, rows, columns), with all singular values near 1, in bfloat16: the
    Newton-Schulz iteration of Muon (https://kellerjordan.github.io/posts/muon/)."""
    x = matrices.bfloat16()
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Lookahead:
    """EMA-Nesterov (arXiv:2605.25395). Before each iteration the weights move ahead by a multiple
    of their mean displacement, a moving average over about 3 % of the run, and the iteration
    continues from there.

    Call before_step() and after_step() around each iteration.
    """

    def __init__(self, parameters, iters: int):
        self.parameters = list(parameters)
        self.iters = iters
        self.beta = max(0.9, 1 - 32 / iters)
        self.mean_displacement = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.before = None

    @torch.no_grad()
    def before_step(self, iter_num: int, lr_multiplier: float):
        self.before = [parameter.clone() for parameter in self.parameters]
        if LOOKAHEAD_FROM <= iter_num / self.iters < LOOKAHEAD_TO:
            alpha = LOOKAHEAD * lr_multiplier
            torch._foreach_add_(self.parameters, self.mean_displacement, alpha=alpha)

    @torch.no_grad()
    def after_step(self):
        displacement = torch._foreach_sub(self.parameters, self.before)
        torch._foreach_lerp_(self.mean_displacement, displacement, 1 - self.beta)


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
