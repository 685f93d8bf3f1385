"""
Kills prepare_single_parquet.py with kill -9 at random moments, and starts the same command again.

    python tests/torture/prepare.py FILE.parquet ... --kills=20 --seed=1

After each kill there must be no train.bin but the finished one, and no row lost that was saved before. Whenever a run
reaches its end, bins and meta.json must be bit for bit those of an undisturbed run. Fails with a traceback otherwise.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "prepare_single_parquet.py"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture(args.files, Path(folder), args.kills, random.Random(args.seed))


def torture(files: list[Path], folder: Path, kills: int, rng: random.Random):
    started = time.monotonic()
    prepare(files, folder / "undisturbed")
    whole_s, expected = time.monotonic() - started, contents(folder / "undisturbed")
    print(f"undisturbed: {whole_s:.1f} s")
    out_dir, killed, finished, rows = folder / "killed", 0, 0, 0
    while killed < kills or rows:
        moment = rng.uniform(0, whole_s) if killed < kills else None  # after the last kill, to the end
        output, was_killed = prepare(files, out_dir, moment)
        assert not rows or f"continuing at row {rows:,}\n" in output or not output or "complete" in output, output
        if was_killed:
            killed += 1
            found = contents(out_dir)
            assert found.get("train.bin") in (None, expected["train.bin"])
            safe = json.loads(found["prepare.json"])["state"]["rows"] if "prepare.json" in found else 0
            assert safe >= rows or "meta.json" in found
            rows = safe
            print(f"kill {killed} after {moment:.2f} s: {rows:,} rows are saved; {', '.join(found) or 'no files yet'}")
        else:
            assert contents(out_dir) == expected
            shutil.rmtree(out_dir)
            finished, rows = finished + 1, 0
    print(f"{killed} kills, {finished} times to the end, each time bit for bit as undisturbed")


def prepare(files: list[Path], out_dir: Path, kill_after_s: float | None = None) -> tuple[str, bool]:
    """Its output, and whether it was killed before its end."""
    command = [sys.executable, SCRIPT, *files, f"--out_dir={out_dir}"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0], True
    assert process.returncode == 0
    return output, False


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


if __name__ == "__main__":
    main()
