"""
Kills prepare_single_parquet.py with SIGKILL at random moments and starts the same command again.

    python tests/torture/prepare.py FILE.parquet ... --kills=20 --seed=1

After each kill there must be no train.bin except the finished one, and no saved row may be lost.
Whenever a run reaches its end, the bins and meta.json must be, bit for bit, those of an undisturbed
run. Otherwise it fails with a traceback.
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture(args.files, Path(folder), args.kills, random.Random(args.seed))


def torture(files: list[Path], folder: Path, kills: int, rng: random.Random):
    started = time.monotonic()
    prepare(files, folder / "undisturbed")
    whole_s = time.monotonic() - started
    expected = contents(folder / "undisturbed")
    print(f"undisturbed: {whole_s:.1f} s")

    out_dir = folder / "killed"
    killed = 0
    finished = 0
    saved_rows = 0
    while killed < kills or out_dir.exists():
        # After the last kill the preparation runs to its end.
        kill_after_s = rng.uniform(0, whole_s) if killed < kills else None
        output, was_killed = prepare(files, out_dir, kill_after_s)
        check_output(output, saved_rows)
        if was_killed:
            killed += 1
            found = contents(out_dir)
            saved_rows = check_killed(found, expected, saved_rows)
            names = ", ".join(found) or "no files yet"
            print(f"kill {killed} after {kill_after_s:.2f} s: {saved_rows:,} rows saved; {names}")
        else:
            finished += 1
            saved_rows = 0
            assert contents(out_dir) == expected
            shutil.rmtree(out_dir)
    print(f"{killed} kills; {finished} times to the end, each bit for bit as undisturbed")


def check_output(output: str, saved_rows: int):
    """Assert that a run continued where the last one had saved, if it came to print anything."""
    is_continued = f"continuing at row {saved_rows:,}\n" in output
    is_complete = "complete" in output
    assert saved_rows == 0 or is_continued or is_complete or output == "", output


def check_killed(found: dict, expected: dict, saved_rows: int) -> int:
    """Check the files that a kill left, and return how many rows are saved.

    There must be at least `saved_rows`, unless the preparation is finished.
    """
    assert found.get("train.bin") in (None, expected["train.bin"])
    rows = 0
    if "prepare.json" in found:
        rows = json.loads(found["prepare.json"])["state"]["rows"]
    assert rows >= saved_rows or "meta.json" in found
    return rows


def prepare(
    files: list[Path], out_dir: Path, kill_after_s: float | None = None
) -> tuple[str, bool]:
    """Run the preparation. Return its output, and whether it was killed before its end."""
    command = [sys.executable, SCRIPT, *files, f"--out_dir={out_dir}"]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return output, True
    assert process.returncode == 0
    return output, False


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


if __name__ == "__main__":
    main()
