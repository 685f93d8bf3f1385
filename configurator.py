"""Settings of a script: a dataclass, Python config files, and --key=value flags.

    @dataclass
    class Settings:
        learning_rate: float = setting(6e-4, "peak learning rate", above=0)

    settings = configure(Settings, sys.argv[1:], __doc__)

    $ python script.py config/small.py --learning_rate=1e-3 --compile=False

Arguments are applied in the order given, and later ones override earlier ones. Values from files
and from flags pass the same checks of name, type and range. All problems are reported at once.
"""

import ast
import dataclasses
import difflib
import functools
import operator
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROJECT = Path(__file__).parent
DASHES = "-–—"  # word processors turn -- into one of the longer ones
IN_RANGE = {"low": operator.ge, "above": operator.gt, "high": operator.le, "below": operator.lt}
RANGE_WORDS = {"low": "at least", "above": "more than", "high": "at most", "below": "less than"}
# What people look for that is not a setting of any script: nanoGPT's names.
NOT_SETTINGS = {
    "vocab_size": "it follows from the data or the checkpoint; leave it out",
    "backend": "it follows from the device; leave it out",
}
FILE_SUFFIXES = (".pt", ".bin", ".parquet", ".safetensors")  # no name of a folder ends so
TYPE_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


class UserError(Exception):
    """A problem that the user can solve.

    The message is one clear sentence that says what is wrong and how to fix it. The scripts print
    it to stderr without a traceback, and exit with status 1 (onenight.system.console.run_script).
    """


def setting(
    default, reason: str, choices: tuple = (), path: bool = False, folder: bool = False, **bounds
):
    """Return a dataclass field with a default, a help text and the values that it accepts.

    Args:
        default: the default, which must be of the field's type and is not checked.
        reason: what the setting does, or why one would change it; printed by --help.
        choices: the accepted values; any value if empty.
        path: whether the value is the path of a file or folder, in which ~ is expanded.
        folder: whether the value is the path of a folder; a file is refused.
        bounds: limits of a number: ``low`` and ``high`` (inclusive), ``above`` and ``below``
            (exclusive).
    """
    metadata = {
        "reason": reason,
        "choices": choices,
        "path": path or folder,
        "folder": folder,
        "bounds": bounds,
    }
    return dataclasses.field(default=default, metadata=metadata)


def configure(cls, arguments: list[str], doc: str | None):
    """Return an instance of the dataclass `cls` with the command-line arguments applied in order.

    An argument is a config file (its name ends in .py), ``--key=value``, ``--key`` (sets a bool to
    True), ``--help`` (prints `doc` and every setting, and exits with status 0), or a plain path,
    which is appended to ``paths`` if the class has a field of that name.

    The fields of `cls` are declared by setting(), and their types are bool, int, float or str. A
    rule that involves several settings is checked in ``__post_init__``, which raises ValueError.

    Raises:
        UserError: if anything is wrong with the arguments. The message has a line per problem.
    """
    if any(is_help_flag(argument) for argument in arguments):
        print(help_text(cls, doc))
        raise SystemExit(0)

    fields = {field.name: field for field in dataclasses.fields(cls)}
    takes_paths = fields.pop("paths", None) is not None
    values = {"paths": []} if takes_paths else {}
    problems = []

    remaining = iter(arguments)  # read_flag() takes a second argument from it at times
    for argument in remaining:
        try:
            given = read_argument(argument, remaining, fields, takes_paths)
        except ValueError as problem:
            problems.append(f"{argument or '(empty)'}: {problem}")
            continue
        if given is None:
            values["paths"].append(os.path.expanduser(argument))
            continue
        for key, value in given.items():
            try:
                values[key] = check(fields, key, value)
            except ValueError as problem:
                problems.append(f"{argument}: {problem}")

    # Built even after other problems, so that those that __post_init__ finds are listed as well.
    try:
        settings = cls(**values)
    except ValueError as problem:
        problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))
    return settings


def read_argument(
    argument: str,
    remaining: Iterator[str],
    fields: dict[str, dataclasses.Field],
    takes_paths: bool,
) -> dict | None:
    """Return the settings that an argument gives, not yet checked, or None for a plain path.

    Raises ValueError if the argument is not a flag, a config file or, with `takes_paths`, a path.
    """
    given = read_flag(argument, remaining, fields)
    if given is not None:
        return given
    if argument.endswith(".py"):
        return read_config_file(argument, fields)
    if argument and takes_paths:
        return None
    raise ValueError(
        "neither a config file (*.py) nor --key=value (no spaces around =; "
        "quote a value that contains spaces)"
    )


# -----------------------------------------------------------------------------
# Flags


def is_help_flag(argument: str) -> bool:
    """Return whether an argument asks for help: -h, --help, --HELP, --help=learning_rate, ..."""
    name = argument.lstrip(DASHES).partition("=")[0]
    return argument[:1] in DASHES and name.lower() in ("h", "help")


def read_flag(
    argument: str, remaining: Iterator[str], fields: dict[str, dataclasses.Field]
) -> dict | None:
    """Return {key: value} for --key=value or --key, or None if the argument is not a flag.

    Raises ValueError if the key does not exist, or if the flag is not written exactly like this;
    the message then gives the flag to write. If that is because of ``--key value``, the value is
    taken from `remaining`, so that it is not reported as a second problem.
    """
    name, equals, text = argument.lstrip(DASHES).partition("=")
    key = name.lower().replace("-", "_")
    if key not in fields:
        if argument.startswith("--"):
            raise ValueError(f"there is no key '{name}'{hint_for_flag(key, fields)}")
        return None

    flag = f"--{key}{equals}{text}"
    if not equals and fields[key].type is not bool:
        flag += f"={value_after_space(remaining)}"
    if argument != flag:
        raise ValueError(f"write {flag}")
    return {key: parse(text, fields[key].type) if equals else True}


def value_after_space(remaining: Iterator[str]) -> str:
    """Return the value of ``--key value``, or VALUE if the next argument does not look like one."""
    value = next(remaining, "")
    is_other_argument = value.startswith(("--", "=")) or value.endswith(".py")
    return "VALUE" if not value or is_other_argument else value


def hint_for_flag(key: str, fields: dict[str, dataclasses.Field]) -> str:
    """Return what to write instead of --key, which is not a setting."""
    for name, field in fields.items():
        if field.type is bool and key in (f"no{name}", f"no_{name}"):
            return f"; did you mean --{name}=False?"
    return hint_for_key(key, fields) or "; see --help"


def parse(text: str, kind: type):
    """Return the text of a flag as a value of type `kind`.

    For an int it may be a float, such as 6e3, which check() converts. If the text cannot be
    converted, it is returned as it is, and check() refuses it.
    """
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    for convert in (int, float) if kind is int else (kind,):
        with suppress(ValueError):
            return convert(text)
    return text


# -----------------------------------------------------------------------------
# Config files


def read_config_file(path: str, keys=()) -> dict:
    """Run a Python config file and return the settings in it: the names that it assigns.

    Names with a leading underscore, imported names, functions and classes belong to the file
    itself. They are returned only if they are in `keys`. A relative path is looked up in the
    working directory, then in the project's folder. Raises ValueError if the file is missing or
    fails.
    """
    found = Path(path)
    if not found.is_file():
        found = PROJECT / os.path.expanduser(path)
    if not found.is_file():
        candidates = [*Path(path).parent.glob("*.py"), *Path("config").glob("*.py")]
        hint = did_you_mean(path, [str(candidate) for candidate in candidates])
        raise ValueError(f"no such file in {Path.cwd()} or {PROJECT}{hint}")
    try:
        names, imported = run_config_file(str(found), found.stat().st_mtime_ns)
    except (Exception, SystemExit) as error:
        message = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(f"this config file raises {type(error).__name__} ({message})") from None

    settings = {}
    for key, value in names.items():
        is_private = key.startswith("_") or key in imported or callable(value)
        if key in keys or not is_private:
            settings[key] = value
    return settings


@functools.cache
def run_config_file(path: str, modified_ns: int) -> tuple[dict, set[str]]:
    """Run a config file, once for each time that it was modified. Return the names that it defines
    and those that it imports."""
    return runpy.run_path(path), imported_names(Path(path).read_bytes())


def imported_names(source: bytes) -> set[str]:
    """Return the names that the import statements of a Python file bind."""
    aliases = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.alias)]
    return {(alias.asname or alias.name).partition(".")[0] for alias in aliases}


# -----------------------------------------------------------------------------
# Checks


def check(fields: dict[str, dataclasses.Field], key: str, value):
    """Return `value` for the setting `key`, converted to the setting's type if that is exact.

    Raises ValueError if the key does not exist or the value is not accepted.
    """
    if key not in fields:
        hint = hint_for_key(key.lower(), fields)
        raise ValueError(
            f"there is no key '{key}'{hint or '; a leading underscore makes it a name of your own'}"
        )
    field = fields[key]
    value = convert_number(value, field.type)
    if not has_type(value, field):
        type_words = "a path" if field.metadata["path"] else TYPE_WORDS[field.type]
        raise ValueError(f"{key} takes {type_words}, not {value!r:.80}")
    if not is_accepted(value, field):
        raise ValueError(f"{key} must be {accepted_values(field)}, not {value!r}")
    if field.metadata["path"]:
        value = os.path.expanduser(value)
    if field.metadata["folder"]:
        refuse_file(key, value, fields)
    return value


def refuse_file(key: str, value: str, fields: dict[str, dataclasses.Field]):
    """Raise ValueError, with what to write instead, if the value of a setting that takes a folder
    is a file, or has the name of one."""
    if not is_file(value):
        return
    path = Path(value)
    remedy = f"write --{key}={path.parent}"
    if path.suffix == ".pt" and "init_from" in fields:
        remedy += f", or --init_from={path} to start from this checkpoint"
    raise ValueError(f"{key} takes a folder, not a file; {remedy}")


def is_file(path: str) -> bool:
    """Return whether a path is that of a file, or would be by its name."""
    return os.path.isfile(path) or (path.endswith(FILE_SUFFIXES) and not os.path.isdir(path))


def convert_number(value, kind: type):
    """Return an int as a float or a float as an int, if `kind` is the other and nothing is lost.

    A NumPy scalar becomes Python's number first. Anything else is returned unchanged.
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    is_other_kind = {kind, type(value)} == {int, float}
    if is_other_kind and is_finite(value) and value % 1 == 0:
        return kind(value)
    return value


def is_finite(value: int | float) -> bool:
    """Return whether a number is neither NaN, nor infinite, nor an int too large for a float."""
    return abs(value) <= sys.float_info.max


def has_type(value, field: dataclasses.Field) -> bool:
    """Return whether a value has the setting's type, and is finite if a number, valid if a path."""
    if type(value) is not field.type:
        return False
    if field.type in (int, float):
        return is_finite(value)
    if field.metadata["path"] and value != field.default:
        return value != "" and not value.startswith("=")  # --out_dir==x is a typo
    return True


def is_accepted(value, field: dataclasses.Field) -> bool:
    """Return whether a value of the right type is within the setting's bounds and choices."""
    for name, bound in field.metadata["bounds"].items():
        if not IN_RANGE[name](value, bound):
            return False
    choices = field.metadata["choices"]
    return not choices or value in choices


# -----------------------------------------------------------------------------
# Words


def accepted_values(field: dataclasses.Field) -> str:
    """Return the choices or the range of a setting in words, or "" if there are none."""
    if field.metadata["choices"]:
        return " or ".join(repr(choice) for choice in field.metadata["choices"])
    bounds = field.metadata["bounds"]
    return " and ".join(f"{RANGE_WORDS[name]} {bound}" for name, bound in bounds.items())


def hint_for_key(key: str, fields: dict[str, dataclasses.Field]) -> str:
    """Return "; " and what to do about a key that is not a setting, or "" if that is not known."""
    if key in NOT_SETTINGS:
        return f"; {NOT_SETTINGS[key]}"
    return did_you_mean(key, list(fields))


def did_you_mean(name: str, candidates: list[str]) -> str:
    """Return "; did you mean X?" for the candidate closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(name, candidates, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def help_text(cls, doc: str | None) -> str:
    """Return what --help prints: `doc`, then every setting with its default, reason and range.

    `doc` is None if Python was told to leave out docstrings (-OO).
    """
    lines = [doc.strip(), ""] if doc else []
    lines += [
        "settings (in a config file: key = value; on the command line: --key=value)",
        "",
    ]
    for field in dataclasses.fields(cls):
        if field.name == "paths":
            continue
        flag = f"--{field.name}={field.default!r}"
        line = f"  {flag:38}  {field.metadata['reason']}"
        accepted = accepted_values(field)
        if accepted:
            line += f" ({accepted})"
        lines.append(line)
    return "\n".join(lines)
