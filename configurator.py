"""
Settings: one dataclass per script, Python config files, then --key=value overrides, in the order given.

    @dataclass
    class Settings:
        learning_rate: float = setting(6e-4, "peak learning rate")

    settings = configure(Settings, sys.argv[1:], __doc__)

reads `train.py config/small.py --learning_rate=1e-3 --compile=false`. Files and flags go through the same
typed check, and all problems are told at once.
"""

import dataclasses
import difflib
import math
import runpy
import types
from pathlib import Path

from words import first_line


def setting(default, reason: str):
    """A dataclass field with its default and, for --help, the reason to change it."""
    return dataclasses.field(default=default, metadata={"reason": reason})


def configure(cls, arguments: list[str], doc: str):
    """
    An instance of the dataclass `cls`, whose fields are bool, int, float or str, with the arguments applied in order.
    An argument is a config file (ends in .py), --key=value, --key (True), --help (prints `doc` and every key, exits
    0), or a plain path, which a class with a `paths` field collects. A class checks what needs more than a type in
    __post_init__, by ValueError. Raises SystemExit, naming every problem, if there is any.
    """
    if "--help" in arguments or "-h" in arguments:
        print(help_text(cls, doc))
        raise SystemExit(0)
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    takes_paths = kinds.pop("paths", None) is not None
    values, paths, problems = {}, [], []
    for argument in arguments:
        given = {}
        if argument.startswith("--"):
            key, has_value, text = argument[2:].partition("=")
            given[key] = parse(text, kinds.get(key, str)) if has_value else True
        elif argument.endswith(".py"):
            try:
                given = read_config_file(argument)
            except ValueError as problem:
                problems.append(str(problem))
        elif takes_paths:
            paths.append(argument)
        else:
            problems.append(f"'{argument}' is neither a config file (*.py) nor --key=value")
        for key, value in given.items():
            try:
                values[key] = check(kinds, key, value)
            except ValueError as problem:
                problems.append(f"{argument}: {problem}")
    if takes_paths:
        values["paths"] = paths
    try:
        settings = cls(**values)
    except ValueError as problem:
        problems.append(str(problem))
    if problems:
        raise SystemExit("\n".join(problems))
    return settings


def read_config_file(path: str) -> dict:
    """
    The plain names that a Python config file sets. Names with a leading underscore, and the modules, functions and
    classes it imports or defines, are its own business. Raises ValueError if the file is missing or raises.
    """
    if not Path(path).is_file():
        others = [*Path(path).parent.glob("*.py"), *Path("config").glob("*.py")]
        raise ValueError(f"{path}: no such file{nearest(path, [str(other) for other in others])}")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: this config file raises {type(error).__name__} ({first_line(error)})") from None
    return {
        key: value
        for key, value in names.items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType) and not callable(value)
    }


def parse(text: str, kind: type):
    """The text of a flag as a value of `kind`; the text itself, for check() to refuse, where it is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def check(kinds: dict[str, type], key: str, value):
    """`value` for `key`, with an int made a float where `kinds` wants one. Raises ValueError for any other mismatch."""
    if key not in kinds:
        raise ValueError(f"there is no key '{key}'{nearest(key, list(kinds)) or '; --help lists the keys'}")
    kind = kinds[key]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        wanted = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[kind]
        raise ValueError(f"{key} takes {wanted}, not {value!r}")
    return value


def nearest(name: str, names: list[str]) -> str:
    """'; did you mean X?', or nothing when no name is close."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def help_text(cls, doc: str) -> str:
    """What --help prints: `doc`, then every key, its default and its reason."""
    lines = [doc.strip(), "", "settings (in a config file: key = value; on the command line: --key=value)", ""]
    for field in dataclasses.fields(cls):
        if field.name != "paths":
            flag = f"--{field.name}={field.default!r}"
            lines += [f"  {flag:38}  {field.metadata['reason']}"]
    return "\n".join(lines)
