"""
Measure how fast GPT-2 124M generates text, here and in a checkout of nanoGPT, and write
benchmarks/results/sample.json.

    python benchmarks/sample.py --peer=../nanoGPT
    python benchmarks/sample.py --peer=../nanoGPT --dtype=bfloat16
    python benchmarks/sample.py --peer=../nanoGPT --device=cuda --dtype=bfloat16 --compile

Both load the same untrained checkpoint, and generate 512 tokens after one on the same device with
the same dtype. nanoGPT's sample.py draws its samples one after another, so its speed is that of one
sample. Its tokens are generated in four parts, with our runs in between, so that other work on the
machine slows both. Loading and printing are not measured. On a CPU nanoGPT always computes in
float32, whatever its dtype, and so it does here.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from common import GPT2_SHAPE, RESULTS, bytes_per_step, circumstances, make_peer
from model import GPT, GPTConfig
from onenight.models.checkpoint import build_model
from onenight.models.generate import Sampling, draw_uniforms, generate, pack_matrices
from onenight.models.huggingface import resolve_checkpoint
from onenight.system.device import autocast, choose_device, compile_model, use_tf32

PROMPT = [198]  # a line break
N_TOKENS = 512
PARTS = 4
AT_ONCE = 8  # samples
NANOGPT = "nanoGPT"
ONE = "ours, 1 sample"
SEVERAL = f"ours, {AT_ONCE} samples"
SAMPLES = {NANOGPT: 1, ONE: 1, SEVERAL: AT_ONCE}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, required=True, help="folder of nanoGPT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ours only: nanoGPT would compile again for every length",
    )
    args = parser.parse_args()
    device = choose_device(args.device)
    use_tf32(device)

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1337)
        weights = GPT(GPTConfig(**GPT2_SHAPE)).state_dict()
        torch.save({"model_args": GPT2_SHAPE, "model": weights}, Path(folder) / "ckpt.pt")
        checkpoint = resolve_checkpoint("resume", Path(folder))
        ours = build_model(checkpoint, folder, args.dtype).to(device)
    peer = make_peer(args.peer, GPT2_SHAPE)
    peer.load_state_dict(weights)
    peer.eval().to(device)

    step_bytes = bytes_per_step(ours)  # before the matrices are packed
    bandwidth_before = measure_bandwidth(device)
    speeds = race(ours, peer, args, device)
    bandwidth = max(bandwidth_before, measure_bandwidth(device))
    report(speeds, step_bytes, bandwidth, args)


def race(ours: GPT, peer, args, device: torch.device) -> dict[str, list[float]]:
    """Return tokens/s of all samples together: nanoGPT's over all its parts, ours for each run."""
    step = None
    if args.compile:
        torch._inductor.config.triton.cudagraphs = True
        step = compile_model(ours)
        for name in (ONE, SEVERAL):  # compiles
            seconds_of_ours(ours, SAMPLES[name], 8, args.dtype, step)
    elif device.type == "cpu":
        pack_matrices(ours, AT_ONCE)

    peer_dtype = "float32" if device.type == "cpu" else args.dtype
    peer_s = 0.0
    peer_ids = torch.tensor([PROMPT], device=device)
    speeds = {ONE: [], SEVERAL: []}
    for part in range(1, PARTS + 1):
        started = time.perf_counter()
        with torch.no_grad(), autocast(peer_dtype, device):
            peer_ids = peer.generate(peer_ids, N_TOKENS // PARTS, temperature=0.8, top_k=200)
        peer_ids[0, -1].item()  # waits for the device
        peer_s += time.perf_counter() - started
        for name, found in speeds.items():
            seconds = seconds_of_ours(ours, SAMPLES[name], N_TOKENS, args.dtype, step)
            found.append(SAMPLES[name] * N_TOKENS / seconds)
        line = ", ".join(f"{name} {found[-1]:.1f}" for name, found in speeds.items())
        peer_speed = peer_ids.size(1) / peer_s
        print(
            f"part {part} of {PARTS}: nanoGPT {peer_speed:.2f} so far, {line} tokens/s", flush=True
        )
    return {NANOGPT: [N_TOKENS / peer_s], **speeds}


def seconds_of_ours(model: GPT, samples: int, n_tokens: int, dtype: str, step) -> float:
    """Return the seconds for so many samples of n_tokens, generated at the same time."""
    sampling = Sampling(temperature=0.8, top_k=200)
    started = time.perf_counter()
    uniforms = draw_uniforms(1337, range(samples), n_tokens)
    for _ in generate(model, PROMPT, uniforms, sampling, dtype, step):
        pass
    return time.perf_counter() - started


def measure_bandwidth(device: torch.device) -> float:
    """Return the bytes/s at which this device reads 1 GiB to add it up, the best of ten."""
    numbers = torch.ones(2**28, device=device)
    best_s = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        numbers.sum().item()
        best_s = min(best_s, time.perf_counter() - started)
    return numbers.numel() * numbers.element_size() / best_s


def report(speeds: dict[str, list[float]], step_bytes: int, bandwidth: float, args):
    """Print the table, and write it as JSON."""
    # All tokens divided by all seconds.
    overall = {name: statistics.harmonic_mean(found) for name, found in speeds.items()}
    rows = {}
    for name, speed in overall.items():
        steps_per_s = speed / SAMPLES[name]
        rows[name] = {
            "tokens_per_s": round(speed, 2),
            "times_nanogpt": round(speed / overall[NANOGPT], 1),
            "share_of_bandwidth": round(steps_per_s * step_bytes / bandwidth, 3),
            "all_tokens_per_s": [round(value, 2) for value in speeds[name]],
        }

    print(f"\n{'':18}{'tokens/s':>10}{'times nanoGPT':>15}{'of the bandwidth':>18}")
    for name, row in rows.items():
        print(
            f"{name:18}{row['tokens_per_s']:10.1f}{row['times_nanogpt']:15.1f}"
            f"{row['share_of_bandwidth']:18.0%}"
        )
    print(
        f"a step reads {step_bytes / 1e9:.2f} GB of weights; "
        f"the bandwidth, measured by adding up 1 GiB, is {bandwidth / 1e9:.1f} GB/s"
    )

    command = (
        f"python benchmarks/sample.py --peer=NANOGPT --device={args.device} --dtype={args.dtype}"
    )
    if args.compile:
        command += " --compile"
    file = RESULTS / "sample.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[f"{args.device} {args.dtype}"] = {
        "command": command,
        **circumstances(args.device),
        "threads": torch.get_num_threads(),
        "new_tokens": N_TOKENS,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "rows": rows,
    }
    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
