"""
Settings: one dataclass per script, Python config files, then --key=value overrides, in the order given.

    @dataclass
    class Settings:
        learning_rate: float = setting(6e-4, "peak learning rate", low=0)

    settings = configure(Settings, sys.argv[1:], __doc__)

reads `train.py config/small.py --learning_rate=1e-3 --compile=false`. Config files and flags pass the same checks of
name, type and range, and all problems are reported at once.
"""

import dataclasses
import difflib
import math
import runpy
import types
from pathlib import Path

PROJECT = Path(__file__).parent
# How a range is written in setting(): the comparison it stands for, and its words.
RANGES = {
    "low": (lambda value, bound: value >= bound, "at least"),
    "above": (lambda value, bound: value > bound, "more than"),
    "high": (lambda value, bound: value <= bound, "at most"),
    "below": (lambda value, bound: value < bound, "less than"),
}


def setting(default, reason: str, choices: tuple = (), **bounds):
    """A dataclass field with its default and, for --help, the reason to change it. `choices` are the values allowed;
    `bounds` the range: low, high (inclusive), above, below (exclusive)."""
    assert bounds.keys() <= RANGES.keys()
    return dataclasses.field(default=default, metadata={"reason": reason, "choices": choices, "bounds": bounds})


def configure(cls, arguments: list[str], doc: str):
    """An instance of the dataclass `cls`, whose fields are bool, int, float or str, with the arguments applied in
    order. An argument is a config file (ends in .py), --key=value, --key (True), --help (prints `doc` and every key,
    exits 0), or a plain path, collected by a class that has a `paths` field. What depends on more than one key the
    class checks in __post_init__, by ValueError. Raises SystemExit, naming every problem, if there is any."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(cls, doc))
        raise SystemExit(0)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    takes_paths = fields.pop("paths", None) is not None
    values, paths, problems = {}, [], []
    for argument in arguments:
        given = {}
        if argument.startswith("--"):
            key, has_value, text = argument[2:].partition("=")
            given[key] = parse(text, fields[key].type if key in fields else str) if has_value else True
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
                values[key] = check(fields, key, value)
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
    """The settings in a Python config file: the plain names that it sets. Names with a leading underscore, modules,
    functions and classes are the file's own. A relative path is looked for in the working directory, then in the
    project's folder. Raises ValueError if the file is missing or fails."""
    found = Path(path) if Path(path).is_file() else PROJECT / path
    if not found.is_file():
        others = map(str, [*Path(path).parent.glob("*.py"), *Path("config").glob("*.py")])
        raise ValueError(f"{path}: no such file in {Path.cwd()} or {PROJECT}{nearest(path, list(others))}")
    try:
        names = runpy.run_path(str(found))
    except (Exception, SystemExit) as error:
        message = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(f"{path}: this config file raises {type(error).__name__} ({message})") from None
    return {
        key: value
        for key, value in names.items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType) and not callable(value)
    }


def parse(text: str, kind: type):
    """The text of a flag as a value of `kind`; the text itself, for check() to refuse, if it is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def check(fields: dict[str, dataclasses.Field], key: str, value):
    """`value` for `key`, an int turned into a float where the field is one. Raises ValueError if it is not allowed."""
    if key not in fields:
        raise ValueError(f"there is no key '{key}'{nearest(key, list(fields)) or '; --help lists the keys'}")
    kind = fields[key].type
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        wanted = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[kind]
        raise ValueError(f"{key} takes {wanted}, not {value!r}")
    allowed, metadata = allowed_values(fields[key]), fields[key].metadata
    in_range = all(RANGES[name][0](value, bound) for name, bound in metadata.get("bounds", {}).items())
    if not in_range or (metadata.get("choices") and value not in metadata["choices"]):
        raise ValueError(f"{key} must be {allowed}, not {value!r}")
    return value


def allowed_values(field: dataclasses.Field) -> str:
    """The range or the choices of a setting in words; '' if any value of its type will do."""
    if field.metadata.get("choices"):
        return " or ".join(map(repr, field.metadata["choices"]))
    return " and ".join(f"{RANGES[name][1]} {bound}" for name, bound in field.metadata.get("bounds", {}).items())


def nearest(name: str, names: list[str]) -> str:
    """'; did you mean X?', or nothing if no name is close."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def help_text(cls, doc: str) -> str:
    """What --help prints: `doc`, then every key with its default, its reason and its range."""
    lines = [doc.strip(), "", "settings (in a config file: key = value; on the command line: --key=value)", ""]
    for field in dataclasses.fields(cls):
        if field.name != "paths":
            flag, allowed = f"--{field.name}={field.default!r}", allowed_values(field)
            lines += [f"  {flag:38}  {field.metadata['reason']}{f' ({allowed})' if allowed else ''}"]
    return "\n".join(lines)
