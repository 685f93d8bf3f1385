"""
Compares recipes at full size on a large GPU: the 124M model of config/train_fineweb_4070_fast.py.

    python benchmarks/recipe/gpu_ab.py --dataset=FOLDER --minutes=4
    python benchmarks/recipe/gpu_ab.py --dataset=FOLDER --arms=plain,stack --save=FILE.json

FOLDER contains train.bin and val.bin with GPT-2 ids. The arms (see ARMS) are trained one after the
other, each in a process of its own; if one fails, the others still run. All have the same seed, the
same initial weights, the same order of the data and the same number of iterations, to which the
learning-rate schedule is scaled. The first arm compiles, measures its speed, and starts anew from
the initial weights. It then trains for its part of the minutes, and the other arms have as many
iterations; a slower arm takes longer. Starting and compiling are not part of the minutes: on an
H100 they took 70 s for each form of the model, and 8 s where it had been compiled before; with int8
113 s on an H200, where torchao's kernel is also tuned.

An iteration has 65,536 tokens, an eighth of the config's: the runs are short, and small batches
give them more iterations. The peak learning rates are scaled by the square root of that. Change the
batch with --batch_size and --gradient_accumulation_steps. Any other setting of train.py changes all
arms.

It prints the val loss (on 524,288 tokens) after each eighth of the run, the tokens/s without
evaluations and compiling, and the differences to the first arm. --save writes the figures as JSON
after each arm. Without a GPU a tiny model is trained, which shows only that the script works.
"""

import time

STARTED = time.perf_counter()  # before torch is imported, which takes seconds

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import common
from changed_run import EVALS, ChangedConfig, ChangedRun, start_anew, with_length
from configurator import UserError, configure, setting
from onenight.system.console import run_script
from onenight.system.device import choose_device
from onenight.system.distributed import Ranks
from onenight.system.json_files import write_json
from onenight.system.memory import peak_memory_gb
from onenight.training.optimizers import GROUPS
from onenight.training.schedule import LOOKAHEAD
from onenight.training.settings import resolve
from onenight.training.trainer import Trainer

# The arms in their order, and the settings in which they differ from the config. `plain` is Muon
# without improvements, with nanochat's learning rates; `stack` is the config's recipe.
PLAIN = {
    "learning_rate": 0.02,
    "embedding_lr": 0.28,
    "head_lr": 0.0078,
    "weight_decay": 0.05,
    "warmdown": 0.7,
}
STACK = {
    "normuon": True,
    "cautious": True,
    "lookahead": LOOKAHEAD,
    "two_speeds": True,
    "matrix_warmdown": 0.8,
    "warmdown": 0.4,
}
ARMS = {
    "plain": PLAIN,
    "stack": STACK,
    "stack-int8": {**STACK, "int8": True},
    "stack-float32-residual": {**STACK, "float32_stream": True},
}
REFERENCE_TOKENS = 524_288  # an iteration of the config, for which the rates are given

CONFIG = "config/train_fineweb_4070_fast.py"
DEFAULTS = {"batch_size": 32, "gradient_accumulation_steps": 2, "warmup": 0.01, "eval_iters": 32}
# Without a GPU
TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "dtype": "bfloat16",
    "compile": False,
}

TRIAL_ITERS = 1000  # the nominal length of the run that compiles and measures the speed
TRIAL_FRACTION = 0.05  # of an arm's time, to measure the speed in


@dataclass
class AbConfig(ChangedConfig):
    minutes: float = setting(4.0, "training time of all arms together, without compiling", above=0)
    arms: str = setting(",".join(ARMS), "arms to train, separated by commas")
    iters: int = setting(0, "iterations of each arm; 0: as many as the minutes allow", low=0)
    save: str = setting("", "JSON file for the figures", path=True)
    arm: str = setting("", "train only this arm, in this process; print JSON")

    def __post_init__(self):
        super().__post_init__()
        unknown = [name for name in self.arm_names if name not in ARMS]
        if unknown:
            raise ValueError(f"arms must be some of {', '.join(ARMS)}, not {', '.join(unknown)}")
        if 0 < self.iters < EVALS:
            raise ValueError(f"iters must be 0 or at least {EVALS}, not {self.iters}")

    @property
    def arm_names(self) -> list[str]:
        return self.arms.split(",")

    @property
    def seconds_per_arm(self) -> float:
        return 60 * self.minutes / len(self.arm_names)


def main(arguments: list[str]):
    config = read_settings(arguments)
    if config.arm:
        print(json.dumps(train_arm(config)))
        return
    for split in ("train", "val"):
        path = config.data_dir / f"{split}.bin"
        if not path.is_file():
            raise UserError(f"{path}: no such file; --dataset must contain train.bin and val.bin")
    try:
        results = compare(config, arguments)
    except KeyboardInterrupt:
        print("stopped; the figures of the finished arms have been printed", file=sys.stderr)
        raise SystemExit(130) from None
    failures = [figures["failed"] for figures in results.values() if "failed" in figures]
    if len(failures) == len(results):
        raise UserError(f"no arm could be trained: {failures[0]}")
    print_table(results)


def read_settings(arguments: list[str]) -> AbConfig:
    """Return the settings from the config, the defaults above, and the arguments."""
    config = configure(AbConfig, [CONFIG, *as_flags(DEFAULTS), *arguments], __doc__)
    on_gpu = config.device.startswith("cuda")
    if config.device == "auto":
        on_gpu = torch.cuda.is_available()
    if on_gpu:
        return config
    return configure(AbConfig, [CONFIG, *as_flags({**DEFAULTS, **TINY}), *arguments], __doc__)


def as_flags(settings: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


# ---- all arms


def compare(config: AbConfig, arguments: list[str]) -> dict[str, dict]:
    """Train the arms, print a line about each, and save their figures. Return them by the names of
    the arms."""
    about = {
        "command": " ".join(["python benchmarks/recipe/gpu_ab.py", *arguments]),
        **common.circumstances(choose_device(config.device)),
        "tokens_per_iter": config.tokens_per_iter,
        "seed": config.seed,
    }
    results = {}
    iters = config.iters
    for name in config.arm_names:
        figures = run_alone(name, arguments, iters)
        # The first arm that was trained sets the length for those after it.
        iters = figures.get("iterations", iters)
        results[name] = figures
        print(f"{name}: {describe(figures, results)}", flush=True)
        if config.save:
            write_json(Path(config.save), {**about, "arms": results})
    return results


def run_alone(name: str, arguments: list[str], iters: int) -> dict:
    """Train an arm in a new process, and print what it prints. Return its figures, or {"failed":
    the reason}."""
    flags = [*as_flags(ARMS[name]), *arguments, f"--iters={iters}", f"--arm={name}"]
    command = [sys.executable, "-u", __file__, *flags]
    figures = {}
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    figures = json.loads(line)
                else:
                    print(f"{name}: {line}", end="", flush=True)
            exit_status = process.wait()
        finally:
            process.kill()  # has no effect if the process has ended
        if exit_status:
            stderr.seek(0)
            return {"failed": common.failure_reason(stderr.read(), exit_status)}
    return figures


def describe(figures: dict, results: dict[str, dict]) -> str:
    """Return the figures of an arm in words, compared with those of the first arm in `results`."""
    if "failed" in figures:
        return f"failed: {figures['failed']}"
    first_name, first = next(iter(results.items()))
    loss = f"val loss {final_loss(figures):.4f}"
    speed = f"{figures['tokens_per_s']:,.0f} tokens/s"
    if figures is not first and "failed" not in first:
        loss += f" ({final_loss(figures) - final_loss(first):+.4f} against {first_name})"
        speed += f" ({figures['tokens_per_s'] / first['tokens_per_s'] - 1:+.1%})"
    length = f"{figures['iterations']:,} iterations, {figures['tokens']:,} tokens"
    return f"{loss}, {speed}, {length}, {figures['epochs']:.2f} epochs"


def final_loss(figures: dict) -> float:
    _, loss = figures["val_loss"][-1]
    return loss


def print_table(results: dict[str, dict]):
    """Print the val losses after each eighth of the run, and the differences to the first arm."""
    eighths = " | ".join(f"{n}/{EVALS}" for n in range(1, EVALS + 1))
    print(f"\n| arm | {eighths} | tokens/s |\n|---|{'---|' * EVALS}---|")
    for name, figures in results.items():
        if "failed" in figures:
            print(f"| {name} | failed: {figures['failed'].replace('|', '/')} |{' |' * EVALS}")
            continue
        losses = " | ".join(f"{loss:.4f}" for _, loss in figures["val_loss"])
        print(f"| {name} | {losses} | {figures['tokens_per_s']:,.0f} |")

    (first_name, first), *others = results.items()
    for name, figures in others:
        if "failed" in first or "failed" in figures:
            continue
        pairs = zip(figures["val_loss"], first["val_loss"])
        differences = " | ".join(f"{loss - of_first:+.4f}" for (_, loss), (_, of_first) in pairs)
        gain = figures["tokens_per_s"] / first["tokens_per_s"] - 1
        print(f"| {name} - {first_name} | {differences} | {gain:+.1%} |")


# ---- one arm


def train_arm(config: AbConfig) -> dict:
    """Train an arm, and return its figures."""
    config = with_scaled_rates(resolve(config, config.device))
    eval_iters = config.eval_iters
    trainer = Trainer(with_length(config, TRIAL_ITERS), Ranks())
    if config.float32_stream:
        common.use_float32_stream(trainer.model)
    initial_weights = {name: w.clone() for name, w in trainer.model.state_dict().items()}

    # Compile, and find out how long the run can be
    trial = ChangedRun(trainer)
    compile_s = warm_up(trial)
    print(f"compiled in {compile_s:.0f} s", flush=True)
    iters = config.iters
    if not iters:
        s_per_iter, eval_s = measure_speed(trial, TRIAL_FRACTION * config.seconds_per_arm)
        iters = iterations_within(config.seconds_per_arm, s_per_iter, eval_s)
        print(f"{s_per_iter:.4f} s per iteration: {iters:,} iterations", flush=True)
    del trial

    # The run, from the initial weights
    start_anew(trainer, initial_weights, with_length(config, iters))
    del initial_weights
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    evaluations, seconds = ChangedRun(trainer).train(eval_iters, eval_iters)
    peak_memory, _ = peak_memory_gb(trainer.device)
    return {
        "iterations": iters,
        "tokens": trainer.progress.tokens,
        "epochs": round(trainer.epoch, 3),
        "val_loss": evaluations,
        "tokens_per_s": round(trainer.progress.tokens / sum(seconds), 1),
        "compile_s": round(compile_s, 1),
        "seconds": round(time.perf_counter() - STARTED, 1),
        "micro_batch_size": trainer.micro_batch_size,
        "peak_memory_gb": round(peak_memory, 2),
        "learning_rates": {name: getattr(config, name) for name in GROUPS.values()},
        "settings": ARMS[config.arm],
    }


def with_scaled_rates(config: AbConfig) -> AbConfig:
    """Return the settings with the peak learning rates for the tokens of this iteration: those
    given, times the square root of its ratio to REFERENCE_TOKENS."""
    factor = math.sqrt(config.tokens_per_iter / REFERENCE_TOKENS)
    rates = {name: factor * getattr(config, name) for name in GROUPS.values()}
    return replace(config, **rates)


def warm_up(run: ChangedRun) -> float:
    """Compile and allocate with an iteration and an evaluation. Return the seconds."""
    started = time.perf_counter()
    run.step()
    run.val_loss(eval_iters=1)
    return time.perf_counter() - started


def measure_speed(run: ChangedRun, seconds: float) -> tuple[float, float]:
    """Train for about that many seconds, but at least three iterations. Return the mean seconds of
    an iteration, and those of an evaluation."""
    iters = 0
    common.wait(run.trainer.device)
    started = time.perf_counter()
    while iters < 3 or time.perf_counter() - started < seconds:
        run.step()
        iters += 1
    common.wait(run.trainer.device)
    trained = time.perf_counter()
    run.val_loss(run.config.eval_iters)
    evaluated = time.perf_counter()
    return (trained - started) / iters, evaluated - trained


def iterations_within(seconds: float, s_per_iter: float, eval_s: float) -> int:
    """Return how many iterations, beside EVALS evaluations, fit into the seconds; at least EVALS,
    with a message if fewer fit."""
    iters = int((seconds - EVALS * eval_s) / s_per_iter)
    if iters < EVALS:
        print(f"the time is too short for {EVALS} iterations: use more --minutes", flush=True)
        return EVALS
    return iters


if __name__ == "__main__":
    run_script(main)
