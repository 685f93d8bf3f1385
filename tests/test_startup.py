"""onenight/startup.py: output that cannot fail, and how the scripts end."""

from onenight.startup import Output, run_script, set_up_output

import io
import os
import sys

import pytest
import torch

from onenight.errors import UserError


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """Restore what set_up_output() and run_script() change."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(sys, "argv", ["script.py", "a.parquet"])


def test_output_to_a_closed_pipe_goes_silent():
    read_end, write_end = os.pipe()
    with open(write_end, "w", buffering=1) as stream:
        output = Output(stream)
        output.write("heard\n")
        assert os.read(read_end, 100) == b"heard\n"
        os.close(read_end)
        output.write("lost\n")
        output.write("also lost\n")
        output.flush()


def test_output_to_a_closed_stream_goes_silent():
    stream = io.StringIO()
    output = Output(stream)
    stream.close()
    output.write("lost\n")
    output.flush()


def test_output_escapes_what_the_encoding_lacks(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="cp1252"))
    set_up_output("stdout")
    print("ночь")
    assert content.getvalue().strip() == rb"\u043d\u043e\u0447\u044c"


def test_output_that_was_closed_from_the_start_is_the_null_device(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    set_up_output("stdout")
    print("lost")
    assert sys.stdout.name == os.devnull


def how_it_ends(error):
    """Return what run_script() passes to sys.exit() when main() raises an error. Python prints a
    string to stderr, and exits with status 1."""

    def main(arguments):
        assert arguments == ["a.parquet"]
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    return stop.value.code


def test_errors_that_a_user_understands_are_one_sentence():
    assert how_it_ends(UserError("cannot read a.parquet")) == "cannot read a.parquet"
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore.")
    assert "Tried to allocate 3.00 GiB" in how_it_ends(memory)
    assert "\n" not in how_it_ends(memory)
    assert how_it_ends(KeyboardInterrupt()) == 130


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda arguments: 1 / 0)
