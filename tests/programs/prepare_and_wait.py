"""prepare_single_parquet.py that waits for a line of its input before it finishes the files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import prepare_single_parquet as script  # noqa: E402

finish = script.BinsWriter.finish


def wait_and_finish(writer):
    writer.checkpoint()
    print("waiting")
    sys.stdin.readline()
    finish(writer)


script.BinsWriter.finish = wait_and_finish
script.main(sys.argv[1:])
