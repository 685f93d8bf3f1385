"""Settings of a script: a dataclass, Python config files, and --key=value flags.

    @dataclass
    class Settings:
        learning_rate: float = setting(6e-4, "peak learning rate", above=0)

    settings, _ = configure(Settings, sys.argv[1:], __doc__)

    $ python script.py config/small.py --learning_rate=1e-3 --compile=False

Arguments are applied in the order given, and later ones override earlier ones. Values from files
and from flags pass the same checks of name, type and range.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import math
import operator
import os
import runpy
from pathlib import Path
from types import ModuleType

from onenight.errors import UserError, first_line

PROJECT = Path(__file__).parent
IN_RANGE = {"low": operator.ge, "above": operator.gt, "high": operator.le, "below": operator.lt}
RANGE_WORDS = {"low": "at least", "above": "more than", "high": "at most", "below": "less than"}
SWITCH_VALUES = {"true": True, "false": False}
TYPE_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def setting(default, reason: str, choices: tuple = (), path: bool = False, **bounds):
    """Return a dataclass field with a default, a help text and the values that it accepts.

    Args:
        default: the default, whose type is the setting's.
        reason: what the setting does, or why one would change it; printed by --help.
        choices: the accepted values, which may be of several types; any value if empty.
        path: whether ~ is expanded in the value.
        bounds: limits of a number: ``low`` and ``high`` (inclusive), ``above`` and ``below``
            (exclusive).
    """
    metadata = {"reason": reason, "choices": choices, "path": path, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


def configure(cls, arguments: list[str], doc: str):
    """Return an instance of the dataclass `cls`, and the values that later arguments have replaced.

    An argument is a config file (its name ends in .py), ``--key=value`` or ``--key value``,
    ``--key`` alone (True, for a setting that may be True), ``--help`` (prints `doc` and every
    setting, and exits), or a plain path, which is appended to ``paths`` if the class has a field of
    that name. Raises UserError.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "paths"}
    parser = make_parser(cls, fields, doc)
    parsed, unknown = parser.parse_known_intermixed_args(with_equals(arguments, fields))
    if unknown:
        name = unknown[0].partition("=")[0]
        raise UserError(f"there is no setting {name}{did_you_mean(name, fields)} (see --help)")
    values = {"paths": parsed.paths} if "paths" in parsed else {}
    replaced = {}
    for key, value in parsed.settings:
        if key in values:
            replaced[key] = values[key]
        values[key] = value
    try:
        return cls(**values), replaced
    except ValueError as error:  # from __post_init__
        raise UserError(str(error))


# -----------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


class Append(argparse.Action):
    """Appends (key, value) to parsed.settings: one pair of a flag, all those of a config file."""

    def __call__(self, parser, parsed, value, option_string=None):
        pairs = value.items() if self.dest == "config_file" else [(self.dest, value)]
        parsed.settings = [*parsed.settings, *pairs]


def make_parser(cls, fields: dict[str, dataclasses.Field], doc: str) -> Parser:
    parser = Parser(
        usage="%(prog)s [CONFIG_FILE.py ...] [--key=value ...]",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(settings=[])
    if len(fields) < len(dataclasses.fields(cls)):
        paths_type = os.path.expanduser
        parser.add_argument("paths", nargs="*", type=paths_type, help=argparse.SUPPRESS)
    read_file = functools.partial(read_config_file, fields)
    parser.add_argument("--config_file", action=Append, type=read_file, help=argparse.SUPPRESS)
    for key, field in fields.items():
        notes = [f"default: {field.default!r}", *accepted_values(field)]
        parser.add_argument(
            f"--{key}",
            action=Append,
            type=functools.partial(read_text, field),
            metavar="",
            help=f"{field.metadata['reason']} ({'; '.join(notes)})".replace("%", "%%"),
        )
    return parser


def with_equals(arguments: list[str], fields: dict[str, dataclasses.Field]) -> list[str]:
    """Return the arguments with --key=value for --key value and --key, and --config_file=FILE.py
    for FILE.py: argparse applies flags in order, but not flags and files."""
    result = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        field = fields.get(argument[2:])
        if argument.startswith("--") and field:
            value = remaining[0] if remaining else ""
            if is_switch(field) and not is_switch_value(field, value):
                value = "True"
            else:
                remaining = remaining[1:]
            argument += f"={value}"
        elif argument.endswith(".py") and not argument.startswith("-"):
            argument = f"--config_file={argument}"
        result.append(argument)
    return result


def is_switch(field: dataclasses.Field) -> bool:
    """Return whether --key alone means True."""
    return field.type is bool or True in field.metadata["choices"]


def is_switch_value(field: dataclasses.Field, text: str) -> bool:
    """Return whether the argument after a switch is its value."""
    return text.lower() in SWITCH_VALUES or text in field.metadata["choices"]


def read_text(field: dataclasses.Field, text: str):
    """Return the value that a flag gives. Raises UserError."""
    value = text
    if is_switch(field):
        value = SWITCH_VALUES.get(text.lower(), text)
    elif field.type in (int, float):
        with contextlib.suppress(ValueError):  # check() says what it should be
            value = float(text)  # 6e3 is a whole number too
    return check(field, value)


# -----------------------------------------------------------------------------
# Config files and values


def read_config_file(fields: dict[str, dataclasses.Field], name: str) -> dict:
    """Run a Python config file and return the settings that it assigns: all names but those that
    begin with an underscore, modules, functions and classes. A relative path is looked up in the
    working directory, then in the project's folder. Raises UserError."""
    path = Path(name)
    if not path.is_file():
        path = PROJECT / name
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"{name}: {type(error).__name__} ({first_line(error)})")
    settings = {}
    for key, value in names.items():
        if key.startswith("_") or callable(value) or isinstance(value, ModuleType):
            continue
        if key not in fields:
            raise UserError(f"{name}: there is no setting {key}{did_you_mean(key, fields)}")
        settings[key] = check(fields[key], value, f"{name}: ")
    return settings


def check(field: dataclasses.Field, value, where: str = ""):
    """Return `value`, as a float or an int if that is the setting's type and changes nothing.
    Raises UserError, with a sentence that begins with `where`, if the setting does not accept
    it."""
    kinds = {field.type, type(value)}
    if kinds == {int, float} and math.isfinite(value) and value % 1 == 0:
        value = field.type(value)
    choices = field.metadata["choices"]
    if choices:
        is_accepted = value in choices
    else:
        is_accepted = type(value) is field.type and is_in_range(value, field.metadata["bounds"])
    if not is_accepted:
        expected = " and ".join(accepted_values(field)) or TYPE_WORDS[field.type]
        raise UserError(f"{where}{field.name} must be {expected}, not {value!r:.80}")
    if choices:
        return choices[choices.index(value)]  # True for 1
    return os.path.expanduser(value) if field.metadata["path"] else value


def is_in_range(value, bounds: dict) -> bool:
    """Return whether a value is within the bounds; no number that is infinite or NaN is."""
    if isinstance(value, str):
        return True
    return math.isfinite(value) and all(
        IN_RANGE[name](value, bound) for name, bound in bounds.items()
    )


def accepted_values(field: dataclasses.Field) -> list[str]:
    """Return the choices or the limits of a setting in words."""
    choices = field.metadata["choices"]
    if choices:
        return [" or ".join(repr(choice) for choice in choices)]
    bounds = field.metadata["bounds"]
    return [f"{RANGE_WORDS[name]} {bound}" for name, bound in bounds.items()]


def did_you_mean(name: str, fields: dict[str, dataclasses.Field]) -> str:
    """Return "; did you mean X?" for the setting whose name is closest, or ""."""
    close = difflib.get_close_matches(name.lstrip("-"), fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""
