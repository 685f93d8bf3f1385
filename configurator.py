"""Settings: one dataclass per script, Python config files, then --key=value overrides, in the order given.

    learning_rate: float = setting(6e-4, "peak learning rate", low=0)  # a field of the dataclass Settings
    settings = configure(Settings, sys.argv[1:], __doc__)  # config/small.py --learning_rate=1e-3 --compile=false

Files and flags pass the same checks of name, type and range, and all problems are reported at once."""

import ast
import dataclasses
import difflib
import operator
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parent
DASHES = "-–—"  # the longer ones are what a word processor makes of --
RANGES = {"low": operator.ge, "above": operator.gt, "high": operator.le, "below": operator.lt}
WORDS = {"low": "at least", "above": "more than", "high": "at most", "below": "less than"}


def setting(default, reason: str, choices: tuple = (), path: bool = False, **bounds):
    """A dataclass field with its default and, for --help, the reason to change it. `choices` are the values allowed;
    `path`: it names a file or folder, and ~ is expanded; `bounds`: low, high (inclusive), above, below (exclusive)."""
    return dataclasses.field(default=default, metadata=dict(reason=reason, choices=choices, path=path, bounds=bounds))


def configure(cls, arguments: list[str], doc: str):
    """An instance of the dataclass `cls`, whose fields are bool, int, float or str, with the arguments applied in
    order. An argument is a config file (ends in .py), --key=value, --key (True), --help (prints `doc` and every key,
    exits 0), or a plain path, collected by a class that has a `paths` field. What depends on more than one key the
    class checks in __post_init__, by ValueError. Raises SystemExit, naming every problem, if there is any."""
    if any(flag[:1] in DASHES and flag.lstrip(DASHES).partition("=")[0].lower() in ("h", "help") for flag in arguments):
        print(help_text(cls, doc))
        raise SystemExit(0)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values, problems, rest = {"paths": []} if fields.pop("paths", None) else {}, [], iter(arguments)
    for argument in rest:
        given = {}
        try:
            given = read_flag(argument, rest, fields)
            if not given and argument.endswith(".py"):
                given = read_config_file(argument, fields)
            elif not given and argument and "paths" in values:
                values["paths"].append(os.path.expanduser(argument))
            elif not given:
                raise ValueError("neither a config file (*.py) nor --key=value (no space at the =, spaces in quotes)")
        except ValueError as problem:
            problems.append(f"{argument or '(empty)'}: {problem}")
        for key, value in given.items():
            try:
                values[key] = check(fields, key, value)
            except ValueError as problem:
                problems.append(f"{argument}: {problem}")
    try:
        settings = cls(**values)
    except ValueError as problem:
        problems.append(str(problem))
    if problems:
        raise SystemExit("\n".join(problems))
    return settings


def read_flag(argument: str, rest: Iterator[str], fields: dict[str, dataclasses.Field]) -> dict:
    """{key: value} of --key=value or --key; {} if the argument is no flag. Raises ValueError if there is no such key or
    it is not written like this, with the flag to write; for `--key value` that takes the value from `rest`."""
    name, equals, text = argument.lstrip(DASHES).partition("=")
    key = name.lower().replace("-", "_")
    if key in fields:
        kind, flag = fields[key].type, f"--{key}{equals}{text}"
        if kind is not bool and not equals:
            value = next(rest, "=")
            flag += f"={'VALUE' if value.startswith(('--', '=')) or value.endswith('.py') else value}"
        if argument != flag:
            raise ValueError(f"write {flag}")
        return {key: parse(text, kind) if equals else True}
    if argument.startswith("--"):
        off = [f"--{on}=False" for on in fields if key in ("no" + on, "no_" + on) and fields[on].type is bool]
        raise ValueError(f"there is no key '{name}'{nearest([*off, key][0], off or list(fields)) or '; see --help'}")
    return {}


def read_config_file(path: str, keys=()) -> dict:
    """The settings in a Python config file: the names that it sets. Unless they are among `keys`, names with a leading
    underscore, imported names, functions and classes are the file's own. A relative path is looked for in the working
    directory, then in the project's folder. Raises ValueError if the file is missing or fails."""
    found = Path(path) if Path(path).is_file() else PROJECT / os.path.expanduser(path)
    if not found.is_file():
        others = map(str, [*Path(path).parent.glob("*.py"), *Path("config").glob("*.py")])
        raise ValueError(f"no such file in {Path.cwd()} or {PROJECT}{nearest(path, list(others))}")
    try:
        names = runpy.run_path(str(found))
        tree = ast.parse(found.read_bytes())
    except (Exception, SystemExit) as error:
        message = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(f"this config file raises {type(error).__name__} ({message})") from None
    own = {(node.asname or node.name).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.alias)}
    own |= {key for key, value in names.items() if key.startswith("_") or callable(value)}
    return {key: value for key, value in names.items() if key in keys or key not in own}


def parse(text: str, kind: type):
    """The text of a flag as a value of `kind`, or a float for an int (6e3); if it is none, the text, for check()."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return parse(text, float) if kind is int else text


def check(fields: dict[str, dataclasses.Field], key: str, value):
    """`value` for `key`, an int as a float, or the reverse if that is exact. Raises ValueError if it is not allowed."""
    if key not in fields:
        near = nearest(key.lower(), list(fields))
        raise ValueError(f"there is no key '{key}'{near or '; a leading underscore makes it a name of your own'}")
    field, kind, path = fields[key], fields[key].type, fields[key].metadata.get("path")
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # one of numpy's
    if {kind, type(value)} == {int, float} and abs(value) <= sys.float_info.max and value % 1 == 0:
        value = kind(value)
    too_large = type(value) in (int, float) and not abs(value) <= sys.float_info.max  # or not a number
    if type(value) is not kind or too_large or (path and value != field.default and value[:1] in ("", "=")):
        wanted = {bool: "True or False", int: "a whole number", float: "a number", str: "a path" if path else "text"}
        raise ValueError(f"{key} takes {wanted[kind]}, not {value!r:.80}")
    in_range = all(RANGES[name](value, bound) for name, bound in field.metadata.get("bounds", {}).items())
    if not in_range or (field.metadata.get("choices") and value not in field.metadata["choices"]):
        raise ValueError(f"{key} must be {allowed_values(field)}, not {value!r}")
    return os.path.expanduser(value) if path else value


def allowed_values(field: dataclasses.Field) -> str:
    """The range or the choices of a setting in words; '' if any value of its type will do."""
    if field.metadata.get("choices"):
        return " or ".join(map(repr, field.metadata["choices"]))
    return " and ".join(f"{WORDS[name]} {bound}" for name, bound in field.metadata.get("bounds", {}).items())


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
