"""What benchmarks/gpu.py measures.

Each part is a generator of pairs: the name of a measurement, and its figures.
"""

import functools
import re
import statistics
from collections.abc import Iterator

import common  # noqa: F401  (puts the project on the path)
from gpu_bench import FAST, NIGHT, VRAM_GB, Bench
from onenight.system.memory import GB, RESERVE

Measurements = Iterator[tuple[str, dict]]

NEEDS_GPU = {"skipped": "needs a GPU"}
WORTH_INT8 = 0.03  # the gain in speed from which --int8 is recommended
TUNED_MULTIPROCESSORS = 68  # Inductor tunes matrix products only on GPUs with at least as many


def the_card(bench: Bench) -> Measurements:
    """The limits of the hardware. On a GPU float32 is TF32, as in training."""
    for dtype, speed in bench.card["tflops"].items():
        yield f"matrix products in {dtype}", {"matmul_tflops": speed}
    yield "copying in its memory", {"copy_gb_s": bench.card["copy_gb_s"]}


def train_config(file: str, bench: Bench) -> Measurements:
    """Training with the config's micro-batch, and with the largest one that should fit, judged by
    the plan and by how far the first peak was from it."""
    figures = bench.training(file)
    yield "the config's micro-batch", figures
    if "failed" in figures:
        return

    planned = figures["plan_gb"]
    peak_per_planned = figures.get("allocated_gb", planned) / planned
    free_gb = VRAM_GB - RESERVE / GB
    fitting = [
        int(size)
        for size, planned_gb in figures["larger"].items()
        if planned_gb * peak_per_planned <= free_gb
    ]
    name = f"the largest in {VRAM_GB} GB"
    if not fitting:
        problem = "no larger one: by the plan and this peak, twice the micro-batch does not fit"
        yield name, {"skipped": problem}
        return
    size = max(fitting)
    steps = figures["windows"] // size
    yield name, bench.training(file, batch_size=size, gradient_accumulation_steps=steps)


def int8_products(bench: Bench) -> Measurements:
    """Whether torchao's products are right, and the short night with and without them."""
    exactness = bench.figures("exactness", *bench.flags())
    yield "torchao's products of integers", exactness
    runs = {
        "the short night": False,
        "the short night with --int8": True,
        "the short night, again": False,
    }
    speeds = []
    for name, int8 in runs.items():
        figures = bench.training(FAST, int8=int8)
        yield name, figures
        if "failed" in figures or "failed" in exactness:
            return
        speeds.append(figures["tokens_per_s"])
    gain = speeds[1] / statistics.mean(speeds[::2]) - 1
    advice = "leave out --int8"
    if exactness["difference"] == 0 and gain >= WORTH_INT8:
        advice = "--int8 is worth a try; what it does to the loss is not measured here"
    yield "what --int8 gains", {"gain": gain, "note": advice}


def peer(bench: Bench) -> Measurements:
    """Ours and nanoGPT in turn, twice, each with its largest micro-batch; then ours with
    nanoGPT's."""
    if not bench.peer:
        yield "nanoGPT", {"skipped": "needs --peer=FOLDER, a checkout of nanoGPT"}
        return
    windows = 8 if bench.tiny else 96  # 96 is a multiple of 16, 12, 8, 6, ...
    first_size = 4 if bench.tiny else 16
    sizes = {"ours": first_size, "peer": first_size}
    speeds = {"ours": [], "peer": []}

    def measure(name: str, size: int) -> dict:
        flags = bench.flags(
            batch_size=size, gradient_accumulation_steps=windows // size, peer=bench.peer
        )
        return bench.figures(NIGHT, *flags, f"--only={name}", script="train")

    for attempt in ("first", "second"):
        for name in ("ours", "peer"):
            figures = measure(name, sizes[name])
            yield f"{name}, {attempt}", figures
            if "failed" in figures:
                return
            sizes[name] = figures["batch_size"]  # the largest that fitted
            speeds[name].append(figures["tokens_per_s"])
    peer_speed = statistics.mean(speeds["peer"])
    yield "ours / peer", {"times": statistics.mean(speeds["ours"]) / peer_speed}

    if sizes["ours"] != sizes["peer"]:
        figures = measure("ours", sizes["peer"])
        yield "ours, with the peer's micro-batch", figures
        if "failed" not in figures:
            yield "ours / peer, same micro-batch", {"times": figures["tokens_per_s"] / peer_speed}


def difference(one: dict, other: dict, first: int = 0) -> dict:
    """Return the largest difference of the losses of two runs, from iteration `first` on, and the
    iteration of the first difference."""
    failed = one.get("failed") or other.get("failed")
    if failed:
        return {"failed": failed}
    # A loss that is not finite is not recorded.
    iters = [i for i in one["losses"] if i >= first and i in other["losses"]]
    differences = {i: abs(one["losses"][i] - other["losses"][i]) for i in iters}
    figures = {"loss_difference": max(differences.values()), "iters": len(iters)}
    differing = [i for i in iters if differences[i]]
    if differing:
        figures["differs_from"] = differing[0]
    return figures


def out_of_memory(bench: Bench) -> Measurements:
    """A run with too little memory for its micro-batch, compared with undisturbed runs with that
    micro-batch and with half of it."""
    if bench.tiny:
        yield "less memory than the micro-batch needs", NEEDS_GPU
        return
    whole = bench.train("whole")
    half = bench.train("half", batch_size=8, gradient_accumulation_steps=4)
    yield "losses with half the micro-batch, undisturbed", difference(whole, half)
    if "failed" in whole or "failed" in half:
        return

    # Less than the whole micro-batch allocates, and more than half of it reserves.
    limit_gb = (whole["peak_memory_gb"] + half["peak_reserved_gb"]) / 2 + RESERVE / GB
    disturbed = bench.train("disturbed", vram_limit_gb=limit_gb)
    figures = {"limit_gb": limit_gb, **difference(whole, disturbed)}
    if "failed" not in figures:
        message = r"out of memory: continuing with --batch_size=(\d+)"
        sizes = re.findall(message, disturbed["printed"])
        if sizes:
            figures["went_on_with"] = int(sizes[-1])
        else:
            figures["failed"] = "memory did not run out"
    yield "losses with memory for half, after running out", figures


def resuming(bench: Bench) -> Measurements:
    """A run that stops half-way and is resumed, compared with uninterrupted runs; and the seconds
    that saving takes."""
    first = bench.train("first")
    second = bench.train("second")
    yield "losses of two uninterrupted runs", difference(first, second)
    bench.train("stopped", max_iters=10)
    resumed = bench.train("stopped", init_from="resume")
    yield "losses after a stop, resumed", difference(first, resumed, first=10)
    saving = bench.figures("saving", NIGHT, *bench.flags())
    yield "saving a checkpoint of the long night's model", saving


def sampling(bench: Bench) -> Measurements:
    """1 and 8 samples at once, eager and compiled. Generating a token reads all weights once,
    however many samples there are."""
    for compiled in (False, True):
        mode = "compiled" if compiled else "eager"
        yield f"1 sample, {mode}", sample(bench, NIGHT, 1, compiled)
        yield f"8 samples, {mode}", sample(bench, NIGHT, 8, compiled)
        yield f"the short night's model, 1 sample, {mode}", sample(bench, FAST, 1, compiled)


def sample(bench: Bench, file: str, samples: int, compiled: bool) -> dict:
    """Return the speed of generating so many samples at once with a config's model."""
    if bench.tiny and compiled:
        return NEEDS_GPU
    changes = {"samples": samples, "compile": compiled}
    if bench.tiny:
        changes["new_tokens"] = 16
    figures = bench.figures("sampling", file, *bench.flags(**changes))
    if "weights_gb_s" in figures:
        figures["share_of_copying_speed"] = figures["weights_gb_s"] / bench.card["copy_gb_s"]
    return figures


# The changes to the short night's config: settings of gpu_measure.py and environment variables.
SWITCHES = {
    "as it is": ({}, {}),
    "1,024 rows of the head at once": ({"chunk_rows": 1024}, {}),
    "4,096 rows of the head at once": ({"chunk_rows": 4096}, {}),
    "residual stream in float32": ({"float32_stream": True}, {}),
    "without expandable segments": ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}),
    "CUDA graphs": ({"cuda_graphs": True}, {}),
    "as it is, again": ({}, {}),
    "max-autotune": ({}, {"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}),
}


def switches(bench: Bench) -> Measurements:
    """The short night's config as it is and with one change at a time, and once more as it is, to
    show the noise."""
    unchanged_speed = None
    for name, (settings, environment) in SWITCHES.items():
        multiprocessors = bench.card.get("multiprocessors", TUNED_MULTIPROCESSORS)
        if bench.tiny and (environment or "cuda_graphs" in settings or "chunk_rows" in settings):
            figures = NEEDS_GPU
        elif name == "max-autotune" and multiprocessors < TUNED_MULTIPROCESSORS:
            problem = f"Inductor tunes matrix products from {TUNED_MULTIPROCESSORS} multiprocessors"
            figures = {"skipped": f"{problem} on"}
        else:
            figures = bench.training(FAST, environment, dtype="bfloat16", **settings)
        if name == "as it is":
            unchanged_speed = figures.get("tokens_per_s")
        elif unchanged_speed and "tokens_per_s" in figures:
            figures["gain"] = figures["tokens_per_s"] / unchanged_speed - 1
        yield name, figures


# The parts in their order, and the seconds that each may take.
PARTS = {
    "card": (the_card, 60),
    "the long night": (functools.partial(train_config, NIGHT), 240),
    "the short night": (functools.partial(train_config, FAST), 240),
    "int8": (int8_products, 360),
    "nanoGPT": (peer, 480),
    "out of memory": (out_of_memory, 150),
    "resuming": (resuming, 150),
    "sampling": (sampling, 240),
    "the first evening": (
        functools.partial(train_config, "config/train_fineweb_4070_small.py"),
        180,
    ),
    "finetuning": (functools.partial(train_config, "config/finetune_gpt2.py"), 240),
    "switches": (switches, 720),
}
