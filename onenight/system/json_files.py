"""JSON files whose content is checked when it is read."""

import json
from pathlib import Path

from configurator import UserError
from onenight.system.files import replacing


def read_json(path: Path, shape: dict) -> dict:
    """Return the JSON object in a file, or {} if the file does not exist.

    `shape` says what each key may hold (see fits()); keys that it lacks may hold anything. Raises
    UserError if the file cannot be read, is not a JSON object, or does not fit.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        for key in content.keys() & shape.keys():
            if not fits(content[key], shape[key]):
                raise ValueError(f"{key} cannot be {json.dumps(content[key]):.60}")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); correct it, or delete it and prepare again"
        ) from None


def fits(value, shape) -> bool:
    """Return whether a JSON value has a shape.

    A shape is a type or a tuple of types, a range of whole numbers, a list with the shape of every
    item, or a dict with the shapes of its keys, any of which may be missing from the value.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            fits(value[key], shape[key]) for key in value.keys() & shape.keys()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, range):
        return type(value) is int and value in shape
    return isinstance(value, shape)


def write_json(path: Path, content: dict):
    """Write a JSON object to a file, which it replaces atomically. Raises OSError."""
    with replacing(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
