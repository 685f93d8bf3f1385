"""
How fast text is generated with GPT-2 124M, against a checkout of nanoGPT; writes benchmarks/results/sample.json.

    python benchmarks/sample.py --peer=../nanoGPT
    python benchmarks/sample.py --peer=../nanoGPT --dtype=bfloat16
    python benchmarks/sample.py --peer=../nanoGPT --device=cuda --dtype=bfloat16 --compile

Both load one untrained checkpoint, and generate 512 tokens after one on the same device in the same dtype. nanoGPT's
sample.py draws its samples one after another, so its speed is that of one sample; its tokens are generated in four
parts, with our runs in between, so that other work on the machine slows both. Loading and printing do not count.
On a CPU nanoGPT computes in float32 whatever its dtype, and so it does here.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from common import GPT2_SHAPE, RESULTS, bytes_per_step, circumstances, make_peer
from onenight.checkpoint import build_model
from onenight.device import autocast, choose_device, compile_model, use_tf32
from onenight.generate import Sampling, draw_uniforms, generate, pack_matrices
from onenight.huggingface import resolve_checkpoint

import torch

from model import GPT, GPTConfig

PROMPT, N_TOKENS, PARTS, AT_ONCE = [198], 512, 4, 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder of nanoGPT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="ours only: nanoGPT compiles anew for every length")
    args = parser.parse_args()
    device = choose_device(args.device)
    use_tf32(device)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1337)
        weights = GPT(GPTConfig(**GPT2_SHAPE)).state_dict()
        torch.save({"model_args": GPT2_SHAPE, "model": weights}, Path(folder) / "ckpt.pt")
        ours = build_model(resolve_checkpoint("resume", Path(folder)), folder, args.dtype).to(device)
        peer = make_peer(args.peer, GPT2_SHAPE)
        peer.load_state_dict(weights)
        peer.eval().to(device)
    bandwidth, step_bytes = read_bandwidth(device), bytes_per_step(ours)
    speeds = race(ours, peer, args, device)
    bandwidth = max(bandwidth, read_bandwidth(device))
    report(speeds, step_bytes, bandwidth, args)


def race(ours: GPT, peer, args, device: torch.device) -> dict[str, list[float]]:
    """Tokens/s of each: nanoGPT's of all its parts together, ours of every run."""
    step = None
    if args.compile:
        torch._inductor.config.triton.cudagraphs = True
        step = compile_model(ours)
    elif device.type == "cpu":
        pack_matrices(ours, AT_ONCE)
    found, peer_s, ids = (
        {"ours, 1 sample": [], f"ours, {AT_ONCE} samples": []},
        0.0,
        torch.tensor([PROMPT], device=device),
    )
    for samples in (1, AT_ONCE) if args.compile else ():
        run_ours(ours, samples, 8, args.dtype, step)  # compiles
    for part in range(PARTS):
        started = time.perf_counter()
        with torch.no_grad(), autocast("float32" if device.type == "cpu" else args.dtype, device):
            ids = peer.generate(ids, N_TOKENS // PARTS, temperature=0.8, top_k=200)
        ids[0, -1].item()  # waits for the device
        peer_s += time.perf_counter() - started
        for name, samples in zip(found, (1, AT_ONCE)):
            found[name].append(samples * N_TOKENS / run_ours(ours, samples, N_TOKENS, args.dtype, step))
        line = ", ".join(f"{name} {speeds[-1]:.1f}" for name, speeds in found.items())
        print(f"part {part + 1} of {PARTS}: nanoGPT {ids.size(1) / peer_s:.2f} so far, {line} tokens/s", flush=True)
    return {"nanoGPT": [N_TOKENS / peer_s], **found}


def run_ours(model: GPT, samples: int, n_tokens: int, dtype: str, step) -> float:
    """Seconds for that many samples at once."""
    started = time.perf_counter()
    uniforms = draw_uniforms(1337, range(samples), n_tokens)
    for _ in generate(model, PROMPT, uniforms, Sampling(temperature=0.8, top_k=200), dtype, step):
        pass
    return time.perf_counter() - started


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s at which this device reads 1 GiB to add it up, the best of ten."""
    numbers, best = torch.ones(2**28, device=device), float("inf")
    for _ in range(10):
        started = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - started)
    return numbers.numel() * numbers.element_size() / best


def report(speeds: dict[str, list[float]], step_bytes: int, bandwidth: float, args):
    """Prints the table and writes it as JSON."""
    over_all = {name: statistics.harmonic_mean(values) for name, values in speeds.items()}  # all tokens by all seconds
    rows = {}
    for (name, speed), samples in zip(over_all.items(), (1, 1, AT_ONCE)):
        rows[name] = {
            "tokens_per_s": round(speed, 2),
            "times_nanogpt": round(speed / over_all["nanoGPT"], 1),
            "share_of_bandwidth": round(speed / samples * step_bytes / bandwidth, 3),
            "all_tokens_per_s": [round(value, 2) for value in speeds[name]],
        }
    print(f"\n{'':18}{'tokens/s':>10}{'times nanoGPT':>15}{'of the bandwidth':>18}")
    for name, row in rows.items():
        print(f"{name:18}{row['tokens_per_s']:10.1f}{row['times_nanogpt']:15.1f}{row['share_of_bandwidth']:18.0%}")
    print(
        f"a step reads {step_bytes / 1e9:.2f} GB of weights; the bandwidth, adding up 1 GiB: {bandwidth / 1e9:.1f} GB/s"
    )
    results = {
        "command": f"python benchmarks/sample.py --peer=NANOGPT --device={args.device} --dtype={args.dtype}"
        + " --compile" * args.compile,
        **circumstances(args.device),
        "threads": torch.get_num_threads(),
        "new_tokens": N_TOKENS,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "rows": rows,
    }
    file = RESULTS / "sample.json"
    runs = json.loads(file.read_text()) if file.exists() else {}
    runs[f"{args.device} {args.dtype}"] = results
    file.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
