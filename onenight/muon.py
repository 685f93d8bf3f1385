"""Muon, the optimizer of the matrices of the blocks, with four improvements by others.

Muon (https://kellerjordan.github.io/posts/muon/) makes the update of a matrix orthogonal, so that
it changes all directions equally. Here matrices of one shape are updated together, which is much
faster on a GPU than one after the other.
"""

from collections import defaultdict

import torch

from onenight.device import supports_bfloat16

# torch.optim.Muon's coefficients and number of steps of the Newton-Schulz iteration.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7
MOMENTUM = 0.95
# Two-speed momentum, with the rates of modded-nanogpt's pull request 340 (where it is bi-Maxwell
# momentum): instead of one moving average of the gradients, a weighted mean of a fast and a slow
# one. Unlike there, the slow one exists from the first update on, so that the memory of a run does
# not grow later.
FAST_MOMENTUM = 0.85
SLOW_MOMENTUM = 0.98
# The weight of the slow one, and the part of the run from which on it has it, of 3,250 iterations.
SLOW_SHARE = 0.5615
SLOW_FROM = 1000 / 3250
# EMA-Nesterov: the lookahead at the peak learning rate, with which it decays, and the part of the
# run that has it: result 39 of modded-nanogpt's track 3, in iterations of its 3,150. The mean
# displacement reaches back over about 1/32 of the run's iterations: there, over 100 of them.
LOOKAHEAD = 0.6
LOOKAHEAD_FROM = 500 / 3150
LOOKAHEAD_TO = 2400 / 3150
DISPLACEMENTS_PER_RUN = 32
# The most matrices that are updated together: the layers of the short night. With a limit, the
# memory of an update does not grow with the number of layers.
MATRICES_AT_ONCE = 12

# NorMuon (arXiv:2510.05491): for the moving average of a row's mean square.
ROW_BETA = 0.95
ROW_EPS = 1e-10


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. Without the four improvements it is torch.optim.Muon.

    Args:
        params: matrices, or parameter groups of matrices.
        lr: the learning rate; an update of a matrix with more rows than columns is scaled by
            sqrt(rows / columns).
        weight_decay: relative to lr.
        row_norm: NorMuon: divide each row of an update, or each column if there are more of these,
            by the root of the moving average of its mean square, and keep the norm of the whole
            update.
        cautious: decay only the weights that the update moves towards zero (arXiv:2510.12402).
        lookahead: EMA-Nesterov (arXiv:2605.25395): after each update move the weights further, by
            this multiple of their mean displacement, and compute the next gradient there. None:
            off, and no displacement is stored. set_progress() changes it along a run.
        displacement_beta: for the moving average that is the mean displacement.
        slow_share: two-speed momentum: the weight of the slow average. While it is positive, the
            other one has FAST_MOMENTUM instead of MOMENTUM. None: off, and no slow average is
            stored. set_progress() changes it along a run.
    """

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float = 0.0,
        row_norm: bool = False,
        cautious: bool = False,
        lookahead: float | None = None,
        displacement_beta: float = 0.99,
        slow_share: float | None = None,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "row_norm": row_norm,
            "cautious": cautious,
            "lookahead": lookahead,
            "displacement_beta": displacement_beta,
            "slow_share": slow_share,
        }
        super().__init__(params, defaults)

    def set_progress(self, fraction: float, lr_multiplier: float):
        """Set the lookahead and the weight of the slow momentum for the next update, when
        `fraction` of the run is done and the learning rate is this multiple of its peak."""
        has_lookahead = LOOKAHEAD_FROM <= fraction < LOOKAHEAD_TO
        for group in self.param_groups:
            if group["lookahead"] is not None:
                group["lookahead"] = LOOKAHEAD * lr_multiplier if has_lookahead else 0.0
            if group["slow_share"] is not None:
                group["slow_share"] = SLOW_SHARE if fraction >= SLOW_FROM else 0.0

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for matrices in by_shape.values():
                for first in range(0, len(matrices), MATRICES_AT_ONCE):
                    self.update(matrices[first : first + MATRICES_AT_ONCE], group)

    def update(self, matrices: list[torch.Tensor], group: dict):
        """Update matrices of one shape."""
        rows, columns = matrices[0].shape
        updates = orthogonal(self.directions(matrices, group))
        if group["row_norm"]:
            updates = self.divide_rows(updates, matrices)
        lr = group["lr"]
        updates = updates.float() * (-lr * max(1, rows / columns) ** 0.5)
        decayed = torch.stack(matrices)
        if group["cautious"]:
            decayed *= updates * decayed < 0
        updates.add_(decayed, alpha=-lr * group["weight_decay"])
        torch._foreach_add_(matrices, list(updates))
        if group["lookahead"] is not None:
            self.look_ahead(matrices, updates, group)

    def directions(self, matrices: list[torch.Tensor], group: dict) -> torch.Tensor:
        """Return the gradients with Nesterov momentum: float32 (N, rows, columns)."""
        gradients = [parameter.grad for parameter in matrices]
        momenta = self.states("momentum_buffer", matrices, matrices)
        beta = FAST_MOMENTUM if group["slow_share"] else MOMENTUM
        torch._foreach_lerp_(momenta, gradients, 1 - beta)
        if group["slow_share"] is not None:
            slow = self.states("slow_momentum", matrices, matrices)
            torch._foreach_lerp_(slow, gradients, 1 - SLOW_MOMENTUM)
            momenta = torch._foreach_lerp(momenta, slow, group["slow_share"])
        return torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))

    def divide_rows(self, updates: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
        """Return the updates, (N, rows, columns), rescaled row by row as NorMuon does."""
        rows, columns = updates.shape[-2:]
        squares = updates.float().square().mean(dim=-1 if rows >= columns else -2, keepdim=True)
        moments = self.states("row_moment", matrices, squares)
        torch._foreach_lerp_(moments, list(squares), 1 - ROW_BETA)
        divided = updates * torch.stack(moments).clamp(min=ROW_EPS).rsqrt()
        return divided * (matrix_norm(updates) / matrix_norm(divided).clamp(min=ROW_EPS))

    def look_ahead(self, matrices: list[torch.Tensor], updates: torch.Tensor, group: dict):
        """Move the weights further along the moving average of their displacement, which in an
        iteration is the update and the movement ahead before it."""
        distance = group["lookahead"]
        rate = 1 - group["displacement_beta"]
        displacements = self.states("displacement", matrices, matrices)
        torch._foreach_mul_(displacements, 1 - rate * (1 - distance))
        torch._foreach_add_(displacements, list(updates), alpha=rate)
        torch._foreach_add_(matrices, displacements, alpha=distance)

    def states(self, name: str, matrices: list[torch.Tensor], like) -> list[torch.Tensor]:
        """Return the state of that name of each matrix; at first zeros, in the shapes of `like`."""
        states = []
        for parameter, example in zip(matrices, like):
            state = self.state[parameter]
            if name not in state:
                state[name] = torch.zeros_like(example)
            states.append(state[name])
        return states


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return the matrices, (N, rows, columns), with all singular values near 1, in bfloat16, or in
    float32 where that is faster."""
    x = matrices.bfloat16() if supports_bfloat16(matrices.device) else matrices.float()
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:
        x = x.mT
    x = x / matrix_norm(x).clamp(min=EPS)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def matrix_norm(matrices: torch.Tensor) -> torch.Tensor:
    """Return the Frobenius norms of matrices, (N, rows, columns), as (N, 1, 1)."""
    return matrices.norm(dim=(-2, -1), keepdim=True)
