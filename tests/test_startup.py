"""onenight/startup.py: what is printed in any encoding, and how the scripts end."""

from onenight.startup import run_script, set_up_output

import io
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """Restore what set_up_output() and run_script() change."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)


def test_output_escapes_what_the_encoding_lacks(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="cp1252"))
    set_up_output("stdout")
    print("ночь")
    assert content.getvalue().strip() == rb"\u043d\u043e\u0447\u044c"


def test_memory_that_runs_out_is_one_sentence_and_ctrl_c_has_its_exit_status():
    def how_it_ends(error):
        def main(arguments):
            raise error

        with pytest.raises(SystemExit) as stop:
            run_script(main)
        return stop.value.code

    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore.")
    assert "Tried to allocate 3.00 GiB" in how_it_ends(memory)
    assert "\n" not in how_it_ends(memory)
    assert how_it_ends(KeyboardInterrupt()) == 130
