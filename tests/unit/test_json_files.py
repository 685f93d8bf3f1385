"""onenight/system/json_files.py: what is accepted as the content of a JSON file."""

import pytest

from configurator import UserError
from onenight.system.json_files import fits, read_json, write_json


def test_what_is_written_is_read(tmp_path):
    content = {"tokens": 3, "sources": [{"path": "a"}]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json", {"tokens": int}) == content


def test_a_missing_file_is_empty(tmp_path):
    (tmp_path / "file").write_text("")
    assert read_json(tmp_path / "missing.json", {}) == {}
    assert read_json(tmp_path / "file" / "missing.json", {}) == {}


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "Expecting property name"),
        ("[]", "not a JSON object"),
        ('{"tokens": "many"}', 'tokens cannot be "many"'),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path, text, words):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match="correct it, or delete it and prepare again") as refused:
        read_json(path, {"tokens": int})
    assert str(refused.value).startswith(f"{path}: cannot be read (")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "value, shape, expected",
    [
        (1, int, True),
        ("1", int, False),
        (None, (str, type(None)), True),
        (7, range(8), True),
        (8, range(8), False),
        (True, range(8), False),
        (1.0, range(8), False),
        ([1, 2], [int], True),
        ([1, "2"], [int], False),
        (1, [int], False),
        ({"a": 1, "other": "x"}, {"a": int, "b": int}, True),
        ({"a": "x"}, {"a": int}, False),
        ([], {"a": int}, False),
        ({"a": [{"b": 9}]}, {"a": [{"b": range(9)}]}, False),
    ],
)
def test_a_value_fits_its_shape_or_not(value, shape, expected):
    assert fits(value, shape) is expected
