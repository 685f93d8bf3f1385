"""onenight/system/device.py: the device, its number formats, and whether torch.compile works."""

import os
import subprocess
import sys

import pytest
import torch
from torch._inductor.exc import CppCompileError, InductorError

from configurator import UserError
from helpers import PROGRAMS, ROOT
from onenight.system.device import (
    COPIES,
    autocast,
    choose_compile_caches,
    choose_device,
    choose_dtype,
    compile_works,
    describe_compile_failure,
    is_compile_failure,
    measure_bandwidth,
    measure_tflops,
    set_up_device,
    time_copy,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def bfloat16(monkeypatch):
    """Set whether devices have bfloat16 instructions."""

    def set_support(supported):
        monkeypatch.setattr("onenight.system.device.supports_bfloat16", lambda device: supported)

    return set_support


@pytest.mark.parametrize(
    "has_cuda, has_mps, name",
    [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_is_the_gpu_if_there_is_one(monkeypatch, has_cuda, has_mps, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    ones = torch.ones
    chosen = []
    monkeypatch.setattr(torch, "ones", lambda size, device: chosen.append(device) or ones(size))
    choose_device("auto")
    assert chosen == [name]


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="device=cuda:99 is not available here .*; try --device="):
        choose_device("cuda:99")
    with pytest.raises(UserError, match="device=gpu is not available here"):
        choose_device("gpu")


@pytest.mark.parametrize("device", ["meta", "lazy", "hpu", "xla"])
def test_a_device_that_holds_no_numbers_is_refused(device):
    with pytest.raises(UserError, match=f"device={device} is not available here .*; try --device="):
        choose_device(device)


@pytest.mark.parametrize(
    "asked, device, supported, chosen",
    [
        ("auto", CUDA, True, "bfloat16"),
        ("auto", CUDA, False, "float16"),
        ("auto", CPU, True, "float32"),
        ("auto", CPU, False, "float32"),
        ("float32", CUDA, True, "float32"),
        ("float16", CUDA, True, "float16"),
        ("bfloat16", CPU, True, "bfloat16"),
    ],
)
def test_the_number_format_is_what_was_asked_for(
    bfloat16, capsys, asked, device, supported, chosen
):
    bfloat16(supported)
    assert choose_dtype(asked, device) == chosen
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "asked, device, chosen, message",
    [
        ("bfloat16", CPU, "float32", "this CPU has no bfloat16 instructions: using float32\n"),
        ("bfloat16", CUDA, "float16", "this GPU has no bfloat16 instructions: using float16\n"),
        ("float16", CPU, "float32", "float16 needs a GPU: using float32\n"),
    ],
)
def test_a_number_format_that_the_device_lacks_is_replaced_with_a_message(
    bfloat16, capsys, asked, device, chosen, message
):
    bfloat16(False)
    assert choose_dtype(asked, device) == chosen
    assert capsys.readouterr().out == message


@pytest.mark.filterwarnings("error")  # autocast warns of float32
def test_autocast_computes_matrix_products_in_the_format_and_float32_switches_it_off():
    matrix = torch.ones(4, 4)
    with autocast("bfloat16", CPU):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast("float32", CPU):
        assert (matrix @ matrix).dtype == torch.float32


def test_without_a_compiler_torch_compile_is_disabled_with_the_remedy(tmp_path):
    """In a process of its own, because torch reads the environment variable once."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, PROGRAMS / "compile_works.py"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    message, answer = result.stdout.splitlines()
    assert message.startswith("torch.compile: disabled (")
    assert "). To enable it: " in message
    assert answer == "False"


# What CppCompileError has in it, and the line and the remedy that are shown for it.
COMPILERS_OUTPUT = {
    "full": (
        "In file included from /tmp/t/a.h:1:\n"
        "/tmp/t/a.cpp:9:1: fatal error: error writing to /tmp/cc.s: No space left on device\n"
        "compilation terminated.",
        "/tmp/t/a.cpp:9:1: fatal error: error writing to /tmp/cc.s: No space left on device",
        "set TMPDIR to a folder with free space",
    ),
    "full for the linker": (
        "/usr/bin/ld: final link failed: No space left on device\ncollect2: error: ld returned 1",
        "/usr/bin/ld: final link failed: No space left on device",
        "set TMPDIR to a folder with free space",
    ),
    "no headers": (
        "/tmp/t/a.cpp:2:10: fatal error: Python.h: No such file or directory",
        "/tmp/t/a.cpp:2:10: fatal error: Python.h: No such file or directory",
        "install a C++ compiler and Python's headers",
    ),
    "in another language": ("g++: nichts da", "g++: nichts da", "install a C++ compiler"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="another remedy")
@pytest.mark.parametrize("output, line, remedy", COMPILERS_OUTPUT.values(), ids=COMPILERS_OUTPUT)
def test_the_compilers_own_line_is_shown_with_a_remedy_that_fits(output, line, remedy):
    error = InductorError(CppCompileError(["g++", "-Werror"], output), None)
    assert is_compile_failure(error)
    message = describe_compile_failure(error)
    assert message.startswith(f"torch.compile: disabled ({line}). To enable it: {remedy}")


@pytest.mark.skipif(sys.platform == "win32", reason="another remedy")
def test_a_temporary_folder_in_which_nothing_may_be_executed_is_named(monkeypatch, capsys):
    reason = "/tmp/t/a.so: failed to map segment from shared object"

    def fail(function):
        raise InductorError(ImportError(reason), None)

    monkeypatch.setattr(torch, "compile", fail)
    assert not compile_works(CPU)
    assert capsys.readouterr().out == (
        f"torch.compile: disabled (ImportError: {reason}). To enable it: "
        "set TMPDIR to a folder with free space from which programs can be executed\n"
    )


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_cache_folder_of_torch_compile_that_cannot_be_created_is_replaced(
    variable, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    choose_compile_caches()
    assert os.path.isdir(os.environ[variable])
    assert f"cannot be written to (Not a directory): using {variable}=" in capsys.readouterr().out


def test_other_errors_are_no_failures_to_compile():
    out_of_memory = InductorError(torch.OutOfMemoryError("CUDA out of memory."), None)
    for error in (OSError("train.bin"), RuntimeError("illegal memory access"), out_of_memory):
        assert not is_compile_failure(error)


def test_compiling_is_tried_only_if_it_was_asked_for(monkeypatch):
    monkeypatch.setattr("onenight.system.device.compile_works", lambda device: 1 / 0)
    assert set_up_device("cpu", "float32", compiled=False) == (CPU, "float32", False)


def test_the_measured_speed_is_that_of_the_fastest_product(monkeypatch):
    seconds = iter([5.0, 2e-3, 1e-3])  # the first is not counted
    monkeypatch.setattr("onenight.system.device.MEASURE_S", 0.0)
    monkeypatch.setattr("onenight.system.device.time_product", lambda matrix: next(seconds))
    assert measure_tflops(CPU, "float32") == pytest.approx(2 * 512**3 / 2e-3 / 1e12)


def test_the_measured_bandwidth_is_that_of_the_fastest_copy(monkeypatch):
    seconds = iter([5.0, 2e-3, 1e-3])
    monkeypatch.setattr("onenight.system.device.MEASURE_S", 0.0)
    monkeypatch.setattr("onenight.system.device.time_copy", lambda source, target: next(seconds))
    assert measure_bandwidth(CPU) == pytest.approx(COPIES * 2 * 2**27 / 2e-3 / 1e9)


def test_a_copy_is_timed_in_full():
    source = torch.arange(10)
    target = torch.zeros_like(source)
    assert time_copy(source, target) > 0
    assert target.equal(source)
