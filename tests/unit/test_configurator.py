"""configurator.py: which config files and flags are accepted, and what refusals say."""

import builtins
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import configurator
from configurator import UserError, accepted_values, configure, help_text, read_config_file, setting
from helpers import ROOT


@dataclass
class Settings:
    out_dir: str = setting("out", "where files go", path=True)
    max_iters: int = setting(100, "how long", low=1)
    learning_rate: float = setting(6e-4, "how fast", above=0, high=1)
    optimizer: str = setting("adamw", "which optimizer", choices=("adamw", "muon"))
    compile: bool = setting(True, "slow to start, then faster")
    eval_only: bool = setting(False, "evaluate once and exit")
    export_dir: str = setting("", "where else files go", path=True)
    note: str = setting("none", "any text")

    def __post_init__(self):
        if self.out_dir == "nowhere":
            raise ValueError("out_dir must be somewhere")


@dataclass
class SettingsWithPaths(Settings):
    paths: list = dataclasses.field(default_factory=list)


def settings(*arguments):
    return configure(Settings, [str(argument) for argument in arguments], "what the script does")


def refusal(*arguments, cls=Settings) -> list[str]:
    """Return the lines of the error message."""
    with pytest.raises(UserError) as refused:
        configure(cls, [str(argument) for argument in arguments], "")
    return str(refused.value).splitlines()


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="settings.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# -----------------------------------------------------------------------------
# Accepted


def test_without_arguments_the_settings_are_the_defaults():
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
        ("--export_dir=", ""),  # its default is empty, too
        ("--max_iters=6e3", 6000),
        ("--max_iters=6000.0", 6000),
        ("--max_iters=1_000", 1000),
        ("--out_dir=123", "123"),  # text that looks like something else is still text
        ("--out_dir=True", "True"),
        ("--out_dir='quoted'", "'quoted'"),
        ("--out_dir=x.py", "x.py"),
    ],
)
def test_a_flag_is_parsed_as_the_type_of_its_setting(flag, value):
    key = flag[2:].partition("=")[0]
    parsed = getattr(settings(flag), key)
    assert parsed == value
    assert type(parsed) is type(value)
    assert settings(flag) == dataclasses.replace(Settings(), **{key: value})


def test_files_and_flags_are_applied_in_the_order_given(config_file):
    first = config_file("max_iters = 1\nlearning_rate = 1e-3\nout_dir = 'first'", "first.py")
    second = config_file("max_iters = 2", "second.py")
    assert settings(first) == Settings("first", 1, 1e-3)
    assert settings(first, "--max_iters=3") == Settings("first", 3, 1e-3)
    assert settings("--max_iters=3", first) == Settings("first", 1, 1e-3)
    assert settings(first, "--max_iters=3", second) == Settings("first", 2, 1e-3)
    assert settings("--max_iters=3", "--max_iters=4") == Settings(max_iters=4)


def test_a_config_file_may_compute_its_settings(config_file):
    file = config_file(
        "import math\n"
        "from pathlib import Path\n"
        "_per_iter = 16 * 32\n"
        "def iters(tokens):\n"
        "    return tokens // _per_iter\n"
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
def test_a_number_in_a_file_is_converted_to_the_type_of_its_setting(config_file, text, key, value):
    converted = getattr(settings(config_file(text)), key)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "from __future__ import annotations\nmax_iters: int = 7",
        "from math import pi\nmax_iters = int(pi * 2) + 1",
        "from math import pi as half\nmax_iters = round(half * 2) + 1",
        "from os import sep, path\nimport os.path\nimport math as m\nmax_iters = m.ceil(6.5)",
        "if True:\n    from sys import maxsize\nmax_iters = min(7, maxsize)",
        "class Week:\n    days = 7\nmax_iters = Week.days",
        "_iters = [day for day in range(8)]\nfor _day in _iters:\n    max_iters = _day",
    ],
)
def test_names_that_a_config_file_imports_or_defines_are_not_settings(config_file, text):
    assert settings(config_file(text)) == Settings(max_iters=7)


def test_settings_may_be_imported_from_another_config_file(config_file, tmp_path, monkeypatch):
    config_file("max_iters = 7\nlearning_rate = 0.5", "shared_settings.py")
    monkeypatch.syspath_prepend(tmp_path)
    file = config_file(
        "from shared_settings import learning_rate, max_iters\nlearning_rate = learning_rate / 2"
    )
    assert settings(file) == Settings(max_iters=7, learning_rate=0.25)


def test_a_tilde_is_expanded_in_paths_and_only_there(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    home = os.path.expanduser("~")
    assert home == str(tmp_path)
    config_file("out_dir = '~/in_file'")
    assert settings("~/settings.py") == Settings(out_dir=home + "/in_file")
    expanded = Settings(out_dir=home + "/out", note="~/out")
    assert settings("--out_dir=~/out", "--note=~/out") == expanded
    assert configure(SettingsWithPaths, ["~/a.parquet"], "").paths == [home + "/a.parquet"]


def test_a_config_file_has_no_side_effects(config_file):
    file = config_file("max_iters = 1\n_helper = 2\ndef leaked():\n    pass\nout_dir = __name__\n")

    def state():
        namespaces = [vars(configurator), vars(builtins), globals(), sys.modules]
        return [set(names) for names in namespaces], list(sys.argv)

    before = state()
    name = settings(file).out_dir
    assert state() == before
    assert name != "__main__"  # a script that is used as a config file must not start
    assert settings() == Settings("out", 100)


def test_other_arguments_are_paths_if_the_script_takes_paths(config_file):
    file = config_file("max_iters = 1")
    given = configure(SettingsWithPaths, ["a.parquet", file, "folder", "--max_iters=2"], "")
    assert given == SettingsWithPaths(max_iters=2, paths=["a.parquet", "folder"])
    assert configure(SettingsWithPaths, [], "") == SettingsWithPaths()
    assert "no key 'paths'" in refusal("--paths=a", cls=SettingsWithPaths)[0]


def test_a_path_is_not_mistaken_for_a_flag():
    arguments = ["--eval_only", "a=b/max_iters.parquet", "-", "no_compile"]
    given = configure(SettingsWithPaths, arguments, "")
    assert given.paths == ["a=b/max_iters.parquet", "-", "no_compile"]
    assert given.eval_only
    assert "write --max_iters=3" in refusal("a.parquet", "max_iters=3", cls=SettingsWithPaths)[0]
    # An unset variable of the shell:
    assert "(empty): neither" in refusal("", cls=SettingsWithPaths)[0]


# -----------------------------------------------------------------------------
# Refused, with a line per problem


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
        ("\N{EN DASH}max_iters=3", "write --max_iters=3"),  # what a word processor makes of --
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
        ("--out_dir=nowhere", "out_dir must be somewhere"),  # the class refuses it
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
        (("--max_iters", ""), "--max_iters=VALUE"),
        (("--max_iters", "--compile=False"), "--max_iters=VALUE"),
        (("--max_iters", "settings.py"), "--max_iters=VALUE"),
    ],
)
def test_a_value_after_a_space_is_one_problem_and_the_message_has_the_flag(arguments, flag):
    assert refusal(*arguments) == [f"{arguments[0]}: write {flag}"]
    assert refusal(*arguments, cls=SettingsWithPaths) == refusal(*arguments)
    # The arguments after it are still checked.
    assert len(refusal(*arguments, "--compile=maybe")) == 2


# The first of each pair is valid on its own.
@pytest.mark.parametrize("arguments", [("--compile", "False"), ("--note=once", "upon")])
def test_the_second_half_of_a_split_value_is_refused_with_a_hint(arguments):
    hint = (
        "neither a config file (*.py) nor --key=value (no spaces around =; "
        "quote a value that contains spaces)"
    )
    assert refusal(*arguments) == [f"{arguments[1]}: {hint}"]


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
        (
            "import numpy; learning_rate = numpy.bool_(True)",
            "learning_rate takes a number, not True",
        ),
        (
            "import math; learning_rate = math.sqrt",
            "learning_rate takes a number, not <built-in function sqrt>",
        ),
        (
            "helper = 3",
            "there is no key 'helper'; a leading underscore makes it a name of your own",
        ),
        ("for i in range(3): max_iters = i + 1", "there is no key 'i'; a leading underscore"),
        ("MAX_ITERS = 3", "there is no key 'MAX_ITERS'; did you mean max_iters?"),
    ],
)
def test_a_wrong_value_in_a_file_is_refused_with_the_name_of_the_file(config_file, text, words):
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
        ("open('other.txt')", "FileNotFoundError"),  # about another file, not the config file
        ("raise ValueError('first line\\nsecond line')", "ValueError (first line)"),
        ("import sys; sys.exit()", "SystemExit"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("max_iters = '\0'", "this config file raises"),
    ],
)
def test_a_file_that_raises_is_refused_with_one_sentence(config_file, text, words):
    file = config_file(text)
    (line,) = refusal(file)
    assert line.startswith(f"{file}: ")
    assert words in line


def test_the_refusal_of_a_missing_file_names_the_closest_one(config_file, tmp_path, monkeypatch):
    similar = config_file("", "train_small.py")
    config_file("", "unlike.py")
    missing = tmp_path / "train_smal.py"
    places = f"no such file in {Path.cwd()} or {ROOT}"
    assert refusal(missing) == [f"{missing}: {places}; did you mean {similar}?"]
    assert refusal("no/where/at_all.py") == [f"no/where/at_all.py: {places}"]
    monkeypatch.chdir(ROOT)  # its configs are in config/
    (line,) = refusal("train_demo.py")
    assert line.endswith(f"did you mean {os.path.join('config', 'train_demo.py')}?")


def test_all_problems_are_reported_at_once(config_file):
    file = config_file("max_itres = 1\nlearning_rate = 'fast'")
    lines = refusal("--compile=maybe", file, "missing.py", "word", "--lr=1", "--out_dir=nowhere")
    expected = [
        "compile takes",
        "no key 'max_itres'",
        "learning_rate takes",
        "missing.py: no such file",
        "word: neither",
        "no key 'lr'",
        "out_dir must be somewhere",
    ]
    for words, line in zip(expected, lines, strict=True):
        assert words in line


# -----------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("flag", ["-h", "-help", "--HELP", "--help=settings", "\N{EN DASH}help"])
def test_every_spelling_of_help_prints_the_help_and_exits(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        settings("--max_iters=many", flag)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("what the script does")


def test_help_lists_every_setting_with_its_default_reason_and_range():
    lines = help_text(Settings, "what the script does").splitlines()
    fields = dataclasses.fields(Settings)
    for field, line in zip(fields, lines[-len(fields) :], strict=True):
        assert line.strip().startswith(f"--{field.name}={field.default!r} ")
        assert field.metadata["reason"] in line
    assert lines[-len(fields) + 2].endswith("how fast (more than 0 and at most 1)")
    assert lines[-len(fields) + 3].endswith("which optimizer ('adamw' or 'muon')")
    assert lines[-1].endswith("any text")
    assert accepted_values(fields[-1]) == ""
