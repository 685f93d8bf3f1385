"""configurator.py: config files and flags, accepted and refused."""

import builtins
import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from onenight.train_config import TrainConfig

import pytest
from conftest import ROOT, TINY, assert_one_sentence, make_bins, run

import configurator
from configurator import allowed_values, configure, read_config_file, setting
from export import ExportConfig
from prepare_single_parquet import PrepareConfig
from sample import SampleConfig


@dataclass
class Settings:
    out_dir: str = setting("out", "where things go", path=True)
    max_iters: int = setting(100, "how long", low=1)
    learning_rate: float = setting(6e-4, "how fast", above=0, high=1)
    optimizer: str = setting("adamw", "which way", choices=("adamw", "muon"))
    compile: bool = setting(True, "slow to start, then faster")
    eval_only: bool = setting(False, "evaluate once and stop")
    export_dir: str = setting("", "where else", path=True)
    note: str = setting("none", "any text")

    def __post_init__(self):
        if self.out_dir == "nowhere":
            raise ValueError("out_dir must be somewhere")


@dataclass
class PrepareLike(Settings):
    paths: list = dataclasses.field(default_factory=list)


def settings(*arguments):
    return configure(Settings, list(map(str, arguments)), "what the script does")


def refusal(*arguments, cls=Settings) -> list[str]:
    """The lines of the error message."""
    with pytest.raises(SystemExit) as stop:
        configure(cls, list(map(str, arguments)), "")
    assert isinstance(stop.value.code, str)  # Python prints it to stderr and exits with 1
    return stop.value.code.splitlines()


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="settings.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# ---- what is accepted


def test_no_argument_gives_the_defaults():
    assert settings() == Settings("out", 100, 6e-4, "adamw", True, False, "", "none")


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--eval_only", True),
        ("--eval_only=true", True),
        ("--eval_only=True", True),
        ("--compile=false", False),
        ("--compile=False", False),
        ("--max_iters=7", 7),
        ("--learning_rate=1", 1.0),
        ("--learning_rate=5e-4", 5e-4),
        ("--learning_rate=.5", 0.5),
        ("--out_dir=a b/c", "a b/c"),
        ("--out_dir=2+2=4", "2+2=4"),
        ("--out_dir=--max_iters=3", "--max_iters=3"),
        ("--note=", ""),
        ("--export_dir=", ""),  # whose default is empty as well
        ("--max_iters=6e3", 6000),
        ("--max_iters=6000.0", 6000),
        ("--max_iters=1_000", 1000),
        ("--out_dir=123", "123"),  # a text stays the text, whatever it looks like
        ("--out_dir=True", "True"),
        ("--out_dir='quoted'", "'quoted'"),
        ("--out_dir=x.py", "x.py"),
    ],
)
def test_a_flag_is_parsed_as_the_type_of_its_key(flag, value):
    key = flag[2:].partition("=")[0]
    given = getattr(settings(flag), key)
    assert given == value
    assert type(given) is type(value)
    assert settings(flag) == dataclasses.replace(Settings(), **{key: value})  # and nothing else has changed


def test_files_and_flags_apply_in_the_order_given(config_file):
    first = config_file("max_iters = 1\nlearning_rate = 1e-3\nout_dir = 'first'", "first.py")
    second = config_file("max_iters = 2", "second.py")
    assert settings(first) == Settings("first", 1, 1e-3)
    assert settings(first, "--max_iters=3") == Settings("first", 3, 1e-3)
    assert settings("--max_iters=3", first) == Settings("first", 1, 1e-3)
    assert settings(first, "--max_iters=3", second) == Settings("first", 2, 1e-3)
    assert settings("--max_iters=3", "--max_iters=4") == Settings(max_iters=4)


def test_a_config_file_is_python_with_its_own_helpers(config_file):
    file = config_file(
        "import math\n"
        "from pathlib import Path\n"
        "_per_iter = 16 * 32\n"
        "def iters(tokens):\n    return tokens // _per_iter\n"
        "max_iters = iters(51_200)\n"
        "learning_rate = math.sqrt(0.25)\n"
        "out_dir = str(Path('a') / 'b')\n"
        "compile = not True\n"
    )
    assert settings(file) == Settings(os.path.join("a", "b"), 100, 0.5, "adamw", False, False)
    assert read_config_file(file).keys() == {"max_iters", "learning_rate", "out_dir", "compile"}


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("learning_rate = 1", "learning_rate", 1.0),
        ("max_iters = 6e3", "max_iters", 6000),
        ("max_iters = 51_200 / 512", "max_iters", 100),
        ("import numpy\nlearning_rate = numpy.float64(0.1)", "learning_rate", 0.1),
        ("import numpy\nlearning_rate = numpy.float32(0.5)", "learning_rate", 0.5),
        ("import numpy\nmax_iters = numpy.int64(3)", "max_iters", 3),
        ("import numpy\nmax_iters = numpy.float64(3)", "max_iters", 3),
        ("import numpy\ncompile = numpy.bool_(False)", "compile", False),
    ],
)
def test_a_number_in_a_file_is_taken_as_the_type_of_its_key(config_file, text, key, value):
    given = getattr(settings(config_file(text)), key)
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "from __future__ import annotations\nmax_iters: int = 7",
        "from math import pi\nmax_iters = int(pi * 2) + 1",
        "from math import pi as half\nmax_iters = round(half * 2) + 1",
        "from os import sep, path\nimport os.path\nimport math as maths\nmax_iters = maths.ceil(6.5)",
        "try:\n    from sys import maxsize\nexcept ImportError:\n    pass\nmax_iters = min(7, maxsize)",
        "class Week:\n    days = 7\nmax_iters = Week.days",
        "_iters = [day for day in range(8)]\nfor _day in _iters:\n    max_iters = _day",
    ],
)
def test_what_a_config_file_imports_and_defines_is_its_own(config_file, text):
    assert settings(config_file(text)) == Settings(max_iters=7)


def test_a_key_counts_also_where_a_config_file_imports_it(config_file, tmp_path, monkeypatch):
    config_file("max_iters = 7\nlearning_rate = 0.5", "shared_settings.py")
    monkeypatch.syspath_prepend(tmp_path)
    file = config_file("from shared_settings import learning_rate, max_iters\nlearning_rate = learning_rate / 2")
    assert settings(file) == Settings(max_iters=7, learning_rate=0.25)


def test_a_tilde_is_the_home_folder_in_every_path(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    home = os.path.expanduser("~")
    assert home == str(tmp_path)
    config_file("out_dir = '~/in_file'")
    assert settings("~/settings.py") == Settings(out_dir=home + "/in_file")
    assert settings("--out_dir=~/out", "--note=~/out") == Settings(out_dir=home + "/out", note="~/out")
    assert configure(PrepareConfig, ["~/a.parquet"], "").paths == [home + "/a.parquet"]
    keys = {TrainConfig: ("out_dir", "init_from", "dataset"), SampleConfig: ("out_dir", "init_from")}
    keys |= {ExportConfig: ("out_dir", "init_from", "export_dir"), PrepareConfig: ("out_dir",)}
    for cls, paths in keys.items():
        given = configure(cls, [f"--{key}=~/x" for key in paths], "")
        assert [getattr(given, key) for key in paths] == [home + "/x"] * len(paths)


def test_a_dataset_may_be_given_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dataset in ("t", "t/", "data/t", "data/t/", "./data/t"):
        assert TrainConfig(dataset=dataset).data_dir == Path("data/t")
    assert TrainConfig(dataset=str(tmp_path / "data/t")).data_dir == tmp_path / "data/t"
    assert TrainConfig(dataset="data").data_dir == Path("data/data")
    (tmp_path / "data/data/t").mkdir(parents=True)
    assert TrainConfig(dataset="data/t").data_dir == Path("data/data/t")


def test_a_config_file_has_no_side_effects(config_file):
    names = "max_iters = 1\n_helper = 2\ndef leaked():\n    pass\nout_dir = __name__"
    file = config_file(names)
    before = [set(vars(configurator)), set(vars(builtins)), set(globals()), set(sys.modules), list(sys.argv)]
    assert settings(file).out_dir != "__main__"  # so that a script can serve as a config file without running
    after = [set(vars(configurator)), set(vars(builtins)), set(globals()), set(sys.modules), list(sys.argv)]
    assert after == before
    assert settings() == Settings("out", 100)


def test_plain_arguments_are_paths_if_the_script_takes_paths(config_file):
    @dataclass
    class WithPaths:
        paths: list = dataclasses.field(default_factory=list)
        max_iters: int = setting(100, "how long")

    file = config_file("max_iters = 1")
    given = configure(WithPaths, ["a.parquet", file, "folder", "--max_iters=2"], "")
    assert given == WithPaths(["a.parquet", "folder"], 2)
    assert configure(WithPaths, [], "") == WithPaths()
    assert "no key 'paths'" in refusal("--paths=a", cls=WithPaths)[0]


# ---- what is refused: one line for each problem


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--max_itres=3", "there is no key 'max_itres'; did you mean max_iters?"),
        ("--MAX_ITRES=3", "there is no key 'MAX_ITRES'; did you mean max_iters?"),
        ("--learning-rate=3", "write --learning_rate=3"),
        ("--MAX_ITERS=3", "write --max_iters=3"),
        ("--no-compile", "there is no key 'no-compile'; did you mean --compile=False?"),
        ("--nocompile", "did you mean --compile=False?"),
        ("--no_eval_only", "did you mean --eval_only=False?"),
        ("--no_zzz", "there is no key 'no_zzz'; see --help"),
        ("--zzz=3", "there is no key 'zzz'; see --help"),
        ("--max_iters=many", "max_iters takes a whole number, not 'many'"),
        ("--max_iters=6000.5", "max_iters takes a whole number, not 6000.5"),
        ("--max_iters=1e400", "max_iters takes a whole number, not inf"),
        ("--max_iters=nan", "max_iters takes a whole number, not nan"),
        ("--max_iters=1" + 400 * "0", "max_iters takes a whole number, not 1000"),
        ("--max_iters=True", "max_iters takes a whole number"),
        ("--max_iters=", "max_iters takes a whole number, not ''"),
        ("--max_iters==3", "max_iters takes a whole number, not '=3'"),
        ("--max_iters", "--max_iters: write --max_iters=VALUE"),
        ("--max_iters={[]:1}", "max_iters takes a whole number"),
        ("--learning_rate=fast", "learning_rate takes a number, not 'fast'"),
        ("--learning_rate=nan", "learning_rate takes a number, not nan"),
        ("--learning_rate=1e999", "learning_rate takes a number, not inf"),
        ("--compile=maybe", "compile takes True or False, not 'maybe'"),
        ("--compile=1", "compile takes True or False"),
        ("--out_dir", "write --out_dir=VALUE"),
        ("--out_dir=", "out_dir takes a path, not ''"),
        ("--out_dir==x", "out_dir takes a path, not '=x'"),
        ("max_iters=3", "max_iters=3: write --max_iters=3"),
        ("-max_iters=3", "write --max_iters=3"),
        ("---max_iters=3", "write --max_iters=3"),
        ("\N{EN DASH}max_iters=3", "write --max_iters=3"),  # as a word processor writes --
        ("\N{EM DASH}max_iters=3", "write --max_iters=3"),
        ("-\N{EN DASH}Max-Iters=3", "write --max_iters=3"),
        ("out_dir=x.py", "write --out_dir=x.py"),
        ("\N{EN DASH}compile", "write --compile"),
        ("zzz=3", "zzz=3: neither a config file (*.py) nor --key=value"),
        ("", "(empty): neither a config file"),
        ("--", "there is no key ''"),
        ("--max_iters=0", "max_iters must be at least 1, not 0"),
        ("--learning_rate=0", "learning_rate must be more than 0 and at most 1, not 0.0"),
        ("--learning_rate=1.5", "learning_rate must be more than 0 and at most 1, not 1.5"),
        ("--optimizer=sgd", "optimizer must be 'adamw' or 'muon', not 'sgd'"),
        ("--out_dir=nowhere", "out_dir must be somewhere"),  # what the class itself refuses
    ],
)
def test_a_wrong_flag_is_refused(flag, words):
    (line,) = refusal(flag)
    assert words in line


@pytest.mark.parametrize(
    "arguments, flag",
    [
        (("--max_iters", "4"), "--max_iters=4"),
        (("max_iters", "4"), "--max_iters=4"),
        (("\N{EN DASH}max_iters", "4"), "--max_iters=4"),
        (("--learning_rate", "-1"), "--learning_rate=-1"),
        (("--out_dir", "a b"), "--out_dir=a b"),
        (("--max_iters", "--compile=False"), "--max_iters=VALUE"),
        (("--max_iters", "settings.py"), "--max_iters=VALUE"),
    ],
)
def test_a_value_after_a_space_is_refused_once_with_the_flag_to_write(arguments, flag):
    assert refusal(*arguments) == [f"{arguments[0]}: write {flag}"]
    assert refusal(*arguments, cls=PrepareLike) == refusal(*arguments)
    assert len(refusal(*arguments, "--compile=maybe")) == 2  # and what follows is checked as well


@pytest.mark.parametrize("arguments", [("--compile", "False"), ("--note=once", "upon")])
def test_a_value_in_two_arguments_is_refused_with_a_hint(arguments):  # the first of them is right by itself
    hint = "neither a config file (*.py) nor --key=value (no space at the =, spaces in quotes)"
    assert refusal(*arguments) == [f"{arguments[1]}: {hint}"]


def test_a_path_is_not_taken_for_a_flag():
    given = configure(PrepareLike, ["--eval_only", "a=b/max_iters.parquet", "-", "no_compile"], "")
    assert given.paths == ["a=b/max_iters.parquet", "-", "no_compile"] and given.eval_only
    assert "write --max_iters=3" in refusal("a.parquet", "max_iters=3", cls=PrepareLike)[0]
    assert "(empty): neither" in refusal("", cls=PrepareLike)[0]  # an unset variable of the shell


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_itres = 3", "there is no key 'max_itres'; did you mean max_iters?"),
        ("max_iters = 1.5", "max_iters takes a whole number, not 1.5"),
        ("max_iters = '3'", "max_iters takes a whole number, not '3'"),
        ("max_iters = True", "max_iters takes a whole number, not True"),
        ("max_iters = 3,", "max_iters takes a whole number, not (3,)"),
        ("learning_rate = '5e-4'", "learning_rate takes a number, not '5e-4'"),
        ("learning_rate = float('nan')", "learning_rate takes a number, not nan"),
        ("compile = 'False'", "compile takes True or False, not 'False'"),
        ("compile = 1", "compile takes True or False, not 1"),
        ("note = 123", "note takes text, not 123"),
        ("note = None", "note takes text, not None"),
        ("out_dir = 123", "out_dir takes a path, not 123"),
        ("out_dir = ''", "out_dir takes a path, not ''"),
        ("max_iters = 10**400", "max_iters takes a whole number, not 1000"),
        ("learning_rate = 10**400", "learning_rate takes a number, not 1000"),
        ("import numpy; max_iters = numpy.float64(1.5)", "max_iters takes a whole number, not 1.5"),
        ("import numpy; learning_rate = numpy.bool_(True)", "learning_rate takes a number, not True"),
        ("import math; learning_rate = math.sqrt", "learning_rate takes a number, not <built-in function sqrt>"),
        ("helper = 3", "there is no key 'helper'; a leading underscore makes it a name of your own"),
        ("for i in range(3): max_iters = i + 1", "there is no key 'i'; a leading underscore"),
        ("MAX_ITERS = 3", "there is no key 'MAX_ITERS'; did you mean max_iters?"),
    ],
)
def test_a_wrong_value_in_a_file_is_refused_and_the_file_named(config_file, text, words):
    file = config_file(text)
    (line,) = refusal(file)
    assert line.startswith(f"{file}: ")
    assert words in line


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_iters = ", "SyntaxError"),
        ("max_iters = 1\n  out_dir = 'x'", "IndentationError"),
        ("max_iters = 1 / 0", "ZeroDivisionError (division by zero)"),
        ("max_iters = undefined", "NameError (name 'undefined' is not defined)"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("open('other.txt')", "FileNotFoundError"),  # not this file, but one it asks for
        ("raise ValueError('first line\\nsecond line')", "ValueError (first line)"),
        ("import sys; sys.exit()", "SystemExit"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("max_iters = '\0'", "this config file raises"),
    ],
)
def test_a_file_that_raises_gets_one_sentence(config_file, text, words):
    file = config_file(text)
    (line,) = refusal(file)
    assert line.startswith(f"{file}: ")
    assert words in line


def test_a_missing_file_names_the_nearest(config_file, tmp_path, monkeypatch):
    near = config_file("", "train_small.py")
    config_file("", "unlike.py")
    missing = tmp_path / "train_smal.py"
    places = f"no such file in {Path.cwd()} or {ROOT}"
    assert refusal(missing) == [f"{missing}: {places}; did you mean {near}?"]
    assert refusal("no/where/at_all.py") == [f"no/where/at_all.py: {places}"]
    monkeypatch.chdir(ROOT)  # where the shipped ones lie in config/
    (line,) = refusal("train_demo.py")
    assert line.endswith(f"did you mean {os.path.join('config', 'train_demo.py')}?")


def test_all_problems_are_reported_at_once(config_file):
    file = config_file("max_itres = 1\nlearning_rate = 'fast'")
    lines = refusal("--compile=maybe", file, "missing.py", "word", "--lr=1", "--out_dir=nowhere")
    words = ["compile takes", "no key 'max_itres'", "learning_rate takes", "missing.py: no such file", "word: neither"]
    words += ["no key 'lr'", "out_dir must be somewhere"]
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines))


# ---- as a process


@pytest.mark.parametrize("flag", ["-h", "-help", "--HELP", "--help=settings", "\N{EN DASH}help"])
def test_help_is_printed_however_it_is_asked_for(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        settings("--max_iters=many", flag)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("what the script does")


@pytest.mark.parametrize("script, cls", [("train.py", TrainConfig), ("sample.py", SampleConfig)])
def test_help_lists_every_key_with_default_reason_and_range(script, cls):
    result = run(script, "--help")
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    for field in dataclasses.fields(cls):
        (line,) = [line for line in lines if line.strip().startswith(f"--{field.name}=")]
        assert f"={field.default!r} " in line
        assert field.metadata["reason"] in line
        allowed = allowed_values(field)
        assert line.endswith(f"({allowed})" if allowed else field.metadata["reason"])


def test_a_script_reports_all_problems_and_writes_nothing(tmp_path):
    (tmp_path / "bad.py").write_text("max_itres = 3\n")
    result = run("train.py", "bad.py", "--compile=maybe", "--n_embd=512", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["bad.py:", "--compile=maybe:", "n_embd=512"]
    assert os.listdir(tmp_path) == ["bad.py"]


def test_a_mistyped_flag_gets_one_sentence(tmp_path):
    refused = run("train.py", "--batch_size", "4", "--n_layer=2", cwd=tmp_path)
    assert_one_sentence(refused, "--batch_size: write --batch_size=4")
    refused = run("prepare_single_parquet.py", "--num_workers", "4", "a.parquet", cwd=tmp_path)
    assert_one_sentence(refused, "--num_workers: write --num_workers=4")
    assert_one_sentence(run("prepare_single_parquet.py", "--out_dir=", cwd=tmp_path), "out_dir takes a path, not ''")
    assert os.listdir(tmp_path) == []


def test_the_plan_finds_a_dataset_in_data_and_in_the_home_folder(tmp_path):
    folder = tmp_path / "data/t"
    folder.mkdir(parents=True)
    make_bins(folder)
    tiny = [f"--{key}={value}" for key, value in TINY.items()]
    for dataset in ("data/t/", "~/data/t"):
        result = run("train.py", *tiny, "--plan", f"--dataset={dataset}", cwd=tmp_path, env={"HOME": str(tmp_path)})
        assert "epochs of 20,000" in result.stdout, result.stderr


def test_a_config_file_cannot_exit_silently(tmp_path):
    (tmp_path / "quits.py").write_text("raise SystemExit(0)\n")
    assert_one_sentence(run("sample.py", "quits.py", cwd=tmp_path), "quits.py: this config file raises SystemExit")


def test_importing_has_no_effects(tmp_path):
    code = "import sys; sys.argv[1:] = ['--bogus', 'missing.py']; import configurator, train, sample"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []
