"""prepare_single_parquet.py that saves its state every 20 ms, so that a short run does so often."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from onenight.startup import run_script  # noqa: E402

import prepare_single_parquet  # noqa: E402


def main(arguments):
    prepare_single_parquet.main(arguments, checkpoint_s=0.02)


run_script(main)
