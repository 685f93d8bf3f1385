"""A training run with parts of the recipe on or off, for run.py and gpu_ab.py."""

import time
from dataclasses import dataclass, replace

import common
from configurator import setting
from onenight.training.optimizers import make_optimizers
from onenight.training.recovery import Recovery
from onenight.training.schedule import LOOKAHEAD, set_rates
from onenight.training.settings import TrainConfig
from onenight.training.trainer import Progress, Trainer
from rounded import PRODUCTS, round_products
from tail_average import TailAverage

EVALS = 8  # in a run, at equal distances


@dataclass
class ChangedConfig(TrainConfig):
    """train.py's settings, a schedule in fractions of the run, and the changes."""

    warmup: float = setting(0.0, "warmup_iters as a fraction of max_iters", low=0, high=1)
    warmdown: float = setting(
        0.0, "warmdown_iters as a fraction of max_iters; 0: cosine decay", low=0, high=1
    )
    matrix_warmdown: float = setting(
        0.0, "warmdown of the matrices, as a fraction of max_iters; 0: warmdown", low=0, high=1
    )
    normuon: bool = setting(False, "divide each row of Muon's update by the root of its moment")
    cautious: bool = setting(False, "with Muon, decay only weights that the update makes smaller")
    lookahead: float = setting(0.0, "EMA-Nesterov's lookahead of the matrices", low=0)
    two_speeds: bool = setting(False, "with Muon, the mean of a fast and a slow momentum")
    tail_average: bool = setting(
        False, "at the end, blend the weights with their average over the last 12 %"
    )
    int8_products: str = setting("", f"products from int8, some of {','.join(PRODUCTS)}")
    int8_last: bool = setting(False, "with int8_products, also those of the MLP's last layer")
    int8_reuse: bool = setting(
        False, "with int8_products, grad_weight from the integers of the output's product"
    )
    float32_stream: bool = setting(False, "carry the residual stream in float32, not bfloat16")

    def __post_init__(self):
        super().__post_init__()
        changes_muon = self.normuon or self.cautious or self.lookahead or self.two_speeds
        if changes_muon and self.optimizer != "muon":
            raise ValueError("normuon, cautious, lookahead and two_speeds need --optimizer=muon")
        if self.int8 and self.int8_products:
            raise ValueError("int8_products emulates int8: use one of them")
        if self.int8_reuse and "grad_weight" not in self.int8_products:
            raise ValueError("int8_reuse needs grad_weight among int8_products")
        if not set(self.int8_products.split(",")) <= {"", *PRODUCTS}:
            raise ValueError(
                f"int8_products must be some of {','.join(PRODUCTS)}, not {self.int8_products}"
            )


def with_length(config: ChangedConfig, iters: int) -> ChangedConfig:
    """Return the settings of a run of that many iterations, with its schedule."""
    return replace(
        config,
        max_iters=iters,
        lr_decay_iters=iters,
        warmup_iters=round(config.warmup * iters),
        warmdown_iters=round(config.warmdown * iters),
        matrix_warmdown_iters=round(config.matrix_warmdown * iters),
    )


class ChangedRun:
    """Trains with the changes that the config of a new trainer asks for."""

    def __init__(self, trainer: Trainer):
        config = trainer.config
        model = trainer.model
        self.trainer = trainer
        self.config = config
        self.recovery = Recovery(trainer)
        if config.optimizer == "muon":
            (self.matrices,) = trainer.optimizers["muon"].param_groups
            self.matrices["row_norm"] = config.normuon
            self.matrices["cautious"] = config.cautious
            if not config.lookahead:
                self.matrices["lookahead"] = None
            if not config.two_speeds:
                self.matrices["slow_share"] = None
        if config.int8_products:
            products = tuple(config.int8_products.split(","))
            round_products(model, products, config.int8_last, config.int8_reuse)
        self.tail_average = None
        if config.tail_average:
            self.tail_average = TailAverage(model.named_parameters(), config.max_iters)

    def step(self) -> float:
        """Train for one iteration of the schedule, and return its loss."""
        progress = self.trainer.progress
        set_rates(self.trainer.optimizers, self.config, progress.iter_num)
        if self.config.lookahead:
            self.matrices["lookahead"] *= self.config.lookahead / LOOKAHEAD
        loss = common.step(self.trainer, self.recovery)
        if self.tail_average:
            self.tail_average.after_step(progress.iter_num)
        return loss

    def val_loss(self, eval_iters: int) -> float:
        """Return the val loss, over a pass of `eval_iters` units of 16,384 tokens."""
        trainer = self.trainer
        trainer.config = replace(trainer.config, eval_iters=eval_iters)
        return self.recovery.within_memory(trainer.mean_loss, trainer.val_tokens)

    def train(self, eval_iters: int, last_eval_iters: int) -> tuple[list[tuple], list[float]]:
        """Train to the end.

        Args:
            eval_iters: the size of the evaluation after each eighth of the run.
            last_eval_iters: that of the last one.

        Returns:
            The evaluations as pairs of the tokens trained on and the val loss, and the seconds of
            each iteration.
        """
        trainer = self.trainer
        last = self.config.max_iters
        due = {round(n * last / EVALS) for n in range(1, EVALS + 1)}
        evaluations = []
        seconds = []
        started = time.perf_counter()
        while trainer.progress.iter_num < last:
            iter_started = time.perf_counter()
            self.step()
            iter_num = trainer.progress.iter_num
            if iter_num in due:
                common.wait(trainer.device)  # for the update, which the evaluation is not part of
            seconds.append(time.perf_counter() - iter_started)
            if iter_num in due:
                loss = self.val_loss(last_eval_iters if iter_num == last else eval_iters)
                evaluations.append((trainer.progress.tokens, round(loss, 4)))
                elapsed = time.perf_counter() - started
                print(f"iter {iter_num}: val loss {loss:.4f}, {elapsed:.0f}s", flush=True)
        return evaluations, seconds


def start_anew(trainer: Trainer, weights: dict, config: ChangedConfig):
    """Reset the trainer to iteration 0, with these weights and settings of the same shape. What has
    been compiled is kept."""
    trainer.config = config
    trainer.model.load_state_dict(weights)
    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizers = make_optimizers(trainer.model, config, trainer.device)
    trainer.progress = Progress()
