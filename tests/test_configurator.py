"""configurator.py: settings from config files and flags; and the settings of the scripts."""

import dataclasses
import os
import re

import pytest

import export as export_script
import make_demo as demo_script
import prepare_single_parquet as prepare_script
import sample as sample_script
import train as train_script
from configurator import configure, setting
from helpers import run_here
from onenight.errors import UserError
from onenight.settings import TrainConfig


@dataclasses.dataclass
class Settings:
    out_dir: str = setting("out", "where files go", path=True)
    max_iters: int = setting(100, "how long", low=1, below=10**9)
    learning_rate: float = setting(6e-4, "how fast", above=0, high=1)
    hours: float = setting(0.0, "without an upper limit", low=0)
    optimizer: str = setting("adamw", "100% of the choice", choices=("adamw", "muon"))
    compile: bool = setting(True, "slow to start, then faster")
    eval_only: bool = setting(False, "evaluate once and exit")
    int8: bool | str = setting(False, "of several types", choices=("auto", True, False))
    note: str = setting("none", "any text")

    def __post_init__(self):
        if self.out_dir == "nowhere":
            raise ValueError("out_dir must be somewhere")


@dataclasses.dataclass
class SettingsWithPaths(Settings):
    paths: list = dataclasses.field(default_factory=list)


def settings(*arguments, cls=Settings):
    return configure(cls, [str(argument) for argument in arguments], "what the script does")[0]


def refusal(*arguments, cls=Settings) -> str:
    """Return the error message, which is one line."""
    with pytest.raises(UserError) as refused:
        settings(*arguments, cls=cls)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="settings.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# -----------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "flags, key, value",
    [
        (["--max_iters", "7"], "max_iters", 7),
        (["--max_iters=6e3"], "max_iters", 6000),
        (["--max_iters=1_000"], "max_iters", 1000),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--compile=False"], "compile", False),
        (["--compile", "false"], "compile", False),
        (["--eval_only"], "eval_only", True),
        (["--int8=auto"], "int8", "auto"),
        (["--int8", "auto"], "int8", "auto"),
        (["--out_dir", "a.py"], "out_dir", "a.py"),  # not a config file
        (["--note", "--max_iters=3"], "note", "--max_iters=3"),
        (["--note=2+2=4"], "note", "2+2=4"),
        (["--note=123"], "note", "123"),  # text that looks like something else is still text
    ],
)
def test_a_flag_has_the_type_of_its_setting(flags, key, value):
    parsed = settings(*flags)
    assert parsed == dataclasses.replace(Settings(), **{key: value})
    assert type(getattr(parsed, key)) is type(value)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--max_itres=3", "max_iters"),  # the nearest name
        ("--max_it=3", "max_iters"),  # no abbreviations
        ("max_iters=3", "max_iters"),
        ("missing.py", "missing.py"),
        ("--max_iters=6000.5", "6000.5"),
        ("--max_iters=0", "max_iters"),
        ("--hours=nan", "nan"),
        ("--compile never", "never"),
        ("--optimizer=sgd", "sgd"),
        ("--out_dir=nowhere", "somewhere"),  # the class refuses it
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(flag, words):
    assert words in refusal(*flag.split(" "))


def test_a_tilde_is_expanded_in_paths_and_only_there(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    home = os.path.expanduser("~")
    assert settings("--out_dir=~/out", "--note=~/out") == Settings(home + "/out", note="~/out")
    assert settings(config_file("out_dir = '~/in_file'")).out_dir == home + "/in_file"
    assert settings("~/a.parquet", cls=SettingsWithPaths).paths == [home + "/a.parquet"]


# -----------------------------------------------------------------------------
# Config files


def test_files_and_flags_are_applied_in_the_order_given(config_file):
    first = config_file("max_iters = 1\nlearning_rate = 1e-3\nout_dir = 'first'", "first.py")
    second = config_file("max_iters = 2", "second.py")
    assert settings(first) == Settings("first", 1, 1e-3)
    assert settings(first, "--max_iters=3") == Settings("first", 3, 1e-3)
    assert settings("--max_iters", "3", first) == Settings("first", 1, 1e-3)
    assert settings(first, "--eval_only", "--max_iters=3", second) == Settings(
        "first", 2, 1e-3, eval_only=True
    )


def test_a_config_file_is_found_in_the_project_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings("config/train_demo.py", cls=TrainConfig).out_dir == "out-demo"
    (tmp_path / "config").mkdir()
    (tmp_path / "config/train_demo.py").write_text("out_dir = 'mine'")
    assert settings("config/train_demo.py", cls=TrainConfig).out_dir == "mine"


def test_what_a_config_file_imports_or_defines_is_not_a_setting(config_file):
    file = config_file(
        "import math\n"
        "from pathlib import Path\n"
        "_per_iter = 16 * 32\n"
        "def iters(tokens):\n"
        "    return tokens // _per_iter\n"
        "max_iters = iters(25_600)\n"
        "learning_rate = math.sqrt(0.25)\n"
        "out_dir = str(Path('a') / 'b')\n"
    )
    assert settings(file) == Settings(os.path.join("a", "b"), 50, 0.5)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("learning_rate = 1", "learning_rate", 1.0),
        ("max_iters = 6e3", "max_iters", 6000),
        ("int8 = 1", "int8", True),
    ],
)
def test_a_value_in_a_file_gets_the_type_of_its_setting(config_file, text, key, value):
    parsed = getattr(settings(config_file(text)), key)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_itres = 3", "max_iters"),  # the nearest name
        ("max_iters = '3'", "max_iters"),
        ("compile = 1", "compile"),
        ("hours = float('nan')", "nan"),
        ("max_iters = ", "settings.py"),
        ("import no_such_module", "settings.py"),
    ],
)
def test_a_wrong_config_file_is_refused(config_file, text, words):
    assert words in refusal(config_file(text))


# -----------------------------------------------------------------------------
# Paths


def test_other_arguments_are_paths_if_the_script_takes_paths(config_file):
    file = config_file("max_iters = 1")
    given = settings(
        *("a.parquet", file, "b c", "--eval_only", "d", "--max_iters", "2", "-", "e=f"),
        cls=SettingsWithPaths,
    )
    assert given.paths == ["a.parquet", "b c", "d", "-", "e=f"]
    assert (given.max_iters, given.eval_only) == (2, True)
    assert "--max_itres" in refusal("a", "--max_itres=3", "b", cls=SettingsWithPaths)


# -----------------------------------------------------------------------------
# The scripts

CLASSES = {
    train_script: TrainConfig,
    sample_script: sample_script.SampleConfig,
    export_script: export_script.ExportConfig,
    prepare_script: prepare_script.PrepareConfig,
    demo_script: demo_script.DemoConfig,
}


@pytest.mark.parametrize("script", CLASSES, ids=lambda script: script.__name__)
def test_help_prints_every_setting_with_its_reason(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks
    result = run_here(script, "--help")
    assert result.returncode == 0
    assert script.__doc__.strip() in result.stdout
    for field in dataclasses.fields(CLASSES[script]):
        if field.name != "paths":
            reason = re.escape(field.metadata["reason"])
            default = re.escape(repr(field.default))
            assert re.search(rf"--{field.name}\s+{reason} .*default: {default}", result.stdout)


@pytest.mark.parametrize("script", CLASSES, ids=lambda script: script.__name__)
def test_a_script_refuses_an_unknown_flag_and_writes_nothing(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_here(script, "--no_such_flag=3")
    assert result.returncode == 1
    assert "--no_such_flag" in result.stderr
    assert os.listdir(tmp_path) == []
