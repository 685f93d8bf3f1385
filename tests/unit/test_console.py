"""onenight/system/console.py: output that cannot fail, stop signals, and the scripts' errors."""

import io
import os
import signal
import sys

import pytest
import torch

from configurator import UserError
from onenight.system.console import Output, run_script, set_up_output
from onenight.system.signals import StopSignal

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


@pytest.fixture
def signal_handlers():
    """Restore the handlers that a test changes."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


@pytest.mark.usefixtures("signal_handlers")
def test_output_is_set_up_once_and_escapes_what_the_encoding_lacks(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="cp1252"))
    set_up_output("stdout")
    first = sys.stdout
    set_up_output("stdout")
    assert sys.stdout is first
    print("ночь")
    assert content.getvalue().strip() == rb"\u043d\u043e\u0447\u044c"


@pytest.mark.usefixtures("signal_handlers")
def test_output_that_was_closed_from_the_start_is_the_null_device(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    set_up_output("stdout")
    print("lost")
    assert sys.stdout.name == os.devnull


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_requests_a_stop_and_a_second_ctrl_c_interrupts(number, capfd):
    signal.signal(number, signal.SIG_DFL)
    stop = StopSignal()
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested
    assert stop.exit_status == 128 + number
    message = "saving and stopping; press Ctrl-C again to stop without saving"
    assert message in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    stop = StopSignal()
    signal.raise_signal(number)
    assert not stop.requested


@pytest.mark.skipif(not hasattr(signal, "SIGXCPU"), reason="Windows has no SIGXCPU")
@pytest.mark.usefixtures("signal_handlers")
def test_the_exit_status_is_that_of_the_first_signal_and_only_the_first_is_reported(capfd):
    stop = StopSignal()
    signal.raise_signal(signal.SIGXCPU)
    for number in (signal.SIGXCPU, signal.SIGTERM):
        signal.raise_signal(number)
    assert stop.exit_status == 128 + signal.SIGXCPU
    assert capfd.readouterr().err.count("saving and stopping") == 1


def test_a_user_error_is_one_sentence_on_stderr_and_exit_status_1(monkeypatch):
    def main(arguments):
        raise UserError(f"cannot read {arguments[0]}")

    monkeypatch.setattr(sys, "argv", ["script.py", "a.parquet"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    # Python prints a string to stderr, and exits with status 1.
    assert stop.value.code == "cannot read a.parquet"


def test_out_of_memory_is_one_sentence_and_exit_status_1(monkeypatch):
    def main(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore.")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == (
        "out of memory (CUDA out of memory. Tried to allocate 3.00 GiB.); close other programs "
        "that use much memory, on the GPU too, or use a smaller model"
    )


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(ZeroDivisionError):
        run_script(lambda arguments: 1 / 0)
