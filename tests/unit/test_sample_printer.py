"""onenight/models/sample_printer.py."""

import pytest

from onenight.data.tokenizer import EOT, get_encoding
from onenight.models.sample_printer import SEPARATOR, SamplePrinter


def test_the_current_sample_is_printed_token_by_token_and_the_next_after_its_end(capsys):
    printed = ""
    printed_before_each_token = []

    def tokens():
        nonlocal printed
        a, b, c, d = (get_encoding().encode_single_token(letter) for letter in "abcd")
        for ids in [(a, d), (b, EOT), (EOT, d), (c, d)]:
            printed += capsys.readouterr().out
            printed_before_each_token.append(printed)
            yield list(ids)

    n_tokens = SamplePrinter(">", first=5).print_samples(tokens(), range(5, 7), stop=True)
    printed += capsys.readouterr().out
    assert printed == f">ab{SEPARATOR}>d{SEPARATOR}"
    # The fourth token is not generated, because both samples have ended.
    assert printed_before_each_token == [">", ">a", ">ab"]
    assert n_tokens == 5


def print_tokens(ids, capsys):
    """Print one sample of these ids. Return what was printed before each id, and in total."""
    printed = ""
    printed_before_each_token = []

    def tokens():
        nonlocal printed
        for token in ids:
            printed += capsys.readouterr().out
            printed_before_each_token.append(printed)
            yield [token]

    SamplePrinter("> ", first=0).print_samples(tokens(), range(1), stop=True)
    printed += capsys.readouterr().out
    return printed_before_each_token, printed.removesuffix(SEPARATOR)


@pytest.mark.parametrize("text", ["naïve 日本語 🤦🏽‍♀️ ﷽ \U0001f9d1", "plain"])
def test_an_incomplete_character_is_held_back(text, capsys):
    before_each_token, printed = print_tokens(get_encoding().encode(text), capsys)
    assert printed == f"> {text}"
    assert all(printed.startswith(part) for part in before_each_token)


def test_a_character_that_stays_incomplete_is_printed_as_a_replacement_character(capsys):
    ids = get_encoding().encode("🤦🏽")[:-1]
    before_each_token, printed = print_tokens(ids, capsys)
    assert "\ufffd" not in "".join(before_each_token)
    assert "\ufffd" in printed
    assert printed == "> " + get_encoding().decode(ids)


def print_until(stop_at, pieces, capsys, prompt="> ", stop=True):
    """Print one sample of these tokens with `stop_at`. Return what was printed before each token,
    the whole, and the number of tokens."""
    printed = ""
    printed_before_each_token = []

    def tokens():
        nonlocal printed
        for piece in pieces:
            printed += capsys.readouterr().out
            printed_before_each_token.append(printed)
            yield [get_encoding().encode_single_token(piece)]

    printer = SamplePrinter(prompt, first=0, stop_at=stop_at)
    n_tokens = printer.print_samples(tokens(), range(1), stop)
    printed += capsys.readouterr().out
    return printed_before_each_token, printed.removesuffix(SEPARATOR), n_tokens


@pytest.mark.parametrize(
    "stop_at, pieces, expected, n_tokens",
    [
        ("\n\n", ["one", "\n\n", "two"], "> one", 2),
        ("\n\n", ["one", "\n", "\n", "two"], "> one", 3),
        ("\n\n", ["one", "\n", " two"], "> one\n two", 3),
        ("\n\n", ["one", "\n"], "> one\n", 2),
        (" tw", ["one", " two", " three"], "> one", 2),  # inside a token
        ("abac", ["ab", "ab", "ac", "x"], "> ab", 3),  # begins again inside its own beginning
        ("é", ["one", b"\xc3", b"\xa9", "x"], "> one", 3),  # half a character in each token
        ("", ["one", "\n\n", "two"], "> one\n\ntwo", 3),
    ],
)
def test_a_sample_ends_before_the_stop_text(stop_at, pieces, expected, n_tokens, capsys):
    before_each_token, printed, n_generated = print_until(stop_at, pieces, capsys)
    assert printed == expected
    assert n_generated == n_tokens
    # What is printed is never taken back, and only what may become the stop text is held back.
    assert all(printed.startswith(part) for part in before_each_token)


def test_the_stop_text_is_not_looked_for_in_the_prompt(capsys):
    pieces = ["one", "\n\n", "two"]
    _, printed, _ = print_until("\n\n", pieces, capsys, prompt="a\n\nb\n")
    assert printed == "a\n\nb\none"


def test_each_of_several_samples_ends_before_its_own_stop_text(capsys):
    a, b, line = (get_encoding().encode_single_token(piece) for piece in ("a", "b", "\n"))
    tokens = iter([[a, b], [line, b], [a, line]])
    printer = SamplePrinter(">", first=0, stop_at="\n")
    assert printer.print_samples(tokens, range(2), stop=True) == 5
    assert capsys.readouterr().out == f">a{SEPARATOR}>bb{SEPARATOR}"


def test_a_second_attempt_with_a_stop_text_does_not_repeat_what_the_first_has_printed(capsys):
    ids = get_encoding().encode("one\ntwo\n\nthree")

    def interrupted():
        yield from ([token] for token in ids[:2])
        raise MemoryError

    printer = SamplePrinter("> ", first=0, stop_at="\n\n")
    with pytest.raises(MemoryError):
        printer.print_samples(interrupted(), range(1), stop=True)
    printer.print_samples(([token] for token in ids), range(1), stop=True)
    assert capsys.readouterr().out == f"> one\ntwo{SEPARATOR}"


def test_a_second_attempt_does_not_repeat_what_the_first_has_printed(capsys):
    ids = get_encoding().encode("one two three")

    def interrupted():
        yield [ids[0]]
        raise MemoryError

    printer = SamplePrinter("> ", first=0)
    with pytest.raises(MemoryError):
        printer.print_samples(interrupted(), range(1), stop=True)
    printer.print_samples(([token] for token in ids), range(1), stop=True)
    assert capsys.readouterr().out == f"> one two three{SEPARATOR}"
