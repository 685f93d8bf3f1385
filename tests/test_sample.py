"""sample.py: the text, compared with transformers' generate(), where the prompt comes from, and how
the text goes out."""

import os
import re
import subprocess
import sys

import pytest
import torch

import sample as sample_script
from helpers import ROOT, assert_one_sentence, gpt2_of, run_here, start
from onenight.checkpoint import build_model
from onenight.hf import make_tokenizer, to_transformers, write_folder
from random_models import random_checkpoint
from reference import GPT2
from sample import SEPARATOR, Sample, encode_prompt

EOT = 50256


def save(folder, change=None, name="ckpt.pt"):
    """Save a random model as a checkpoint, and return it. `change` may change the weights."""
    checkpoint = random_checkpoint()
    if change:
        change(checkpoint["model"])
    folder.mkdir(exist_ok=True)
    torch.save(checkpoint, folder / name)
    return checkpoint


def always_predict(number):
    """Return a change of the weights, with which the model always predicts this id."""

    def change(weights):
        weights["transformer.ln_f.weight"].zero_()
        weights["transformer.ln_f.bias"].fill_(1.0)  # the input of the head at every position
        weights["lm_head.weight"][number] = 10.0

    return change


def token(text):
    """Return the id of a text, or of bytes, that are one token."""
    return GPT2.encode_single_token(text)


def arguments_of(out_dir, flags):
    fast = ["--device=cpu", "--num_samples=1", "--max_new_tokens=30"]
    return [f"--out_dir={out_dir}", *fast, *flags]


def sample(out_dir, *flags, stdin=b""):
    """Run sample.py in this process."""
    return run_here(sample_script, *arguments_of(out_dir, flags), stdin=stdin)


def sample_in_bash(command, out_dir, *flags, stdin=b""):
    """Run a command in which "$@" is sample.py as a user starts it. Return what it printed, as
    bytes."""
    script = [sys.executable, ROOT / "sample.py", *arguments_of(out_dir, flags)]
    command = ["bash", "-c", f"export OMP_NUM_THREADS=1; {command}", "", *map(str, script)]
    return subprocess.run(command, input=stdin, capture_output=True)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """The folder of a model whose predictions vary, which tests read but do not change."""
    folder = tmp_path_factory.mktemp("model")
    save(folder)
    return folder


# -----------------------------------------------------------------------------
# The text


def test_greedy_text_is_that_of_transformers(tmp_path):
    model = gpt2_of(save(tmp_path)).eval()
    ids = model.generate(
        torch.tensor([GPT2.encode("Once upon a time")]),
        do_sample=False,
        max_new_tokens=30,
        suppress_tokens=list(range(50257, 50304)),  # the ids that pad the vocabulary
        pad_token_id=0,
        eos_token_id=None,
        repetition_penalty=1.5,
    )
    expected = GPT2.decode(ids[0].tolist()) + SEPARATOR
    flags = ("--start=Once upon a time", "--repetition_penalty=1.5")
    greedy = sample(tmp_path, *flags, "--temperature=0")
    assert greedy.stdout == expected, greedy.stderr
    assert sample(tmp_path, *flags, "--top_k=1").stdout == expected


def test_text_from_a_hugging_face_folder_is_the_same(out_dir, tmp_path):
    model = build_model(random_checkpoint(), "the model")
    folder = tmp_path / "exported"
    write_folder(folder, to_transformers(model, torch.float32), make_tokenizer(48), "the card")
    result = sample("", f"--init_from={folder}", "--temperature=0")
    assert result.stdout == sample(out_dir, "--temperature=0").stdout
    assert len(result.stderr.splitlines()) == 1, result.stderr  # transformers adds nothing


def test_several_samples_differ_and_each_is_followed_by_a_line_of_dashes(out_dir):
    flags = ("--num_samples=3", "--start=So", "--seed=1")
    result = sample(out_dir, *flags)
    *samples, rest = result.stdout.split("\n---------------\n")
    assert len(set(samples)) == 3
    assert all(text.startswith("So") and len(text) > 30 for text in samples)
    assert rest == ""
    # Only the text is on stdout.
    assert re.fullmatch(r"90 tokens in \d+\.\d s: [\d,]+\.\d tokens/s\n", result.stderr)
    assert sample(out_dir, *flags).stdout == result.stdout
    assert sample(out_dir, *flags, "--seed=2").stdout != result.stdout


def test_end_of_text_ends_a_sample_unless_stop_is_false(tmp_path):
    save(tmp_path, always_predict(EOT))
    result = sample(tmp_path, "--start=The end.", "--num_samples=2")
    assert result.stdout == 2 * f"The end.{SEPARATOR}"
    assert result.stderr.startswith("2 tokens in ")
    result = sample(tmp_path, "--start=The end.", "--stop=false", "--max_new_tokens=3")
    assert result.stdout == f"The end.{3 * '<|endoftext|>'}{SEPARATOR}"


def test_stop_at_may_have_line_breaks_as_a_shell_passes_them_on(tmp_path):
    save(tmp_path, always_predict(token("\n")))
    result = sample(tmp_path, r"--start=Once\n\nupon", r"--stop_at=\n\n", "--num_samples=2")
    assert result.stdout == 2 * f"Once\n\nupon{SEPARATOR}"  # the prompt is not searched
    assert result.stderr.startswith("4 tokens in ")


# -----------------------------------------------------------------------------
# What is printed while a sample grows


def grow(pieces, stop_at=""):
    """Return what is printed of a sample after each of these tokens, and then at its end."""
    growing = Sample("> ", stop=True, stop_at=stop_at)
    printed = [growing.take()]
    for piece in pieces:
        growing.add(token(piece))
        printed.append(printed[-1] + growing.take())
        if growing.is_complete:
            return printed
    growing.is_complete = True
    return [*printed, printed[-1] + growing.take()]


@pytest.mark.parametrize(
    "stop_at, pieces, expected, n_tokens",
    [
        ("\n\n", ["one", "\n", "\n", "two"], "> one", 3),
        ("\n\n", ["one", "\n", " two"], "> one\n two", 3),
        ("\n\n", ["one", "\n"], "> one\n", 2),
        (" tw", ["one", " two", " three"], "> one", 2),  # inside a token
        ("abac", ["ab", "ab", "ac", "x"], "> ab", 3),  # begins again inside its own beginning
        ("é", ["one", b"\xc3", b"\xa9", "x"], "> one", 3),  # half a character in each token
    ],
)
def test_a_sample_ends_before_the_stop_text(stop_at, pieces, expected, n_tokens):
    printed = grow(pieces, stop_at)
    assert printed[-1] == expected
    assert len(printed) == 1 + n_tokens + (n_tokens == len(pieces))
    assert all(expected.startswith(part) for part in printed)  # nothing is taken back


def test_text_is_printed_at_once_except_incomplete_characters():
    text = "naïve 日本語 🤦🏽‍♀️ ﷽ \U0001f9d1"
    ids = GPT2.encode(text)
    printed = grow([GPT2.decode_single_token_bytes(number) for number in ids])
    complete = [GPT2.decode(ids[:end]).rstrip("\ufffd") for end in range(len(ids) + 1)]
    assert printed == [*(f"> {part}" for part in complete), f"> {text}"]


def test_a_character_that_stays_incomplete_is_printed_as_a_replacement_character():
    printed = grow([b"\xf0\x9f", b"\xa4"])
    assert printed == ["> ", "> ", "> ", "> \ufffd"]


# -----------------------------------------------------------------------------
# The prompt


def test_the_prompt_may_have_line_breaks_as_a_shell_passes_them_on(out_dir):
    result = sample(out_dir, r"--start=one\ntwo\tC:\\new \d+")
    assert result.stdout.startswith("one\ntwo\tC:\\new \\d+")


def test_prompts_from_a_file_and_from_stdin_are_utf8_and_not_unescaped(out_dir, tmp_path):
    text = "Ünïcödé, C:\\new\ncaf\ufffd"
    content = "Ünïcödé, C:\\new\r\ncaf".encode() + b"\xe9"  # the last byte is not UTF-8
    expected = sample(out_dir, "--start=" + text.replace("\\", r"\\")).stdout
    assert expected.startswith(text)
    assert sample(out_dir, "--start=-", stdin=content).stdout == expected
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + content)  # as Windows' editors write it
    result = sample(out_dir, f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert result.stdout == expected, result.stderr


def test_an_empty_prompt_starts_a_document(out_dir):
    """As after end-of-text, which is not printed."""
    empty = sample(out_dir, "--start=").stdout
    assert sample(out_dir, "--start=<|endoftext|>").stdout == "<|endoftext|>" + empty
    assert sample(out_dir, r"--start=\n").stdout != "\n" + empty


def test_end_of_text_in_a_prompt_is_the_token():
    text = "So<|endoftext|><|endoftext|> it's"
    assert encode_prompt(text) == GPT2.encode(text, allowed_special="all")


def test_a_prompt_longer_than_the_context_is_continued(out_dir, tmp_path):
    """Also one that tiktoken cannot encode, with a million spaces."""
    prompt = "word " * 100 + " " * 1_000_001 + "So"
    (tmp_path / "prompt.txt").write_text(prompt)
    result = sample(out_dir, f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert result.stdout.startswith(prompt), result.stderr
    assert len(result.stdout) > len(prompt) + len(SEPARATOR)


# -----------------------------------------------------------------------------
# Interactive


def test_interactive_prompts_get_one_sample_each(out_dir):
    """The same prompt gets another sample the second time, and the same ones in another session.
    An empty line starts a document, and a line need not be UTF-8."""
    lines = b"So\n\ncaf\xe9\nSo\n"
    result = sample(out_dir, "--interactive", "--num_samples=7", stdin=lines)
    assert result.returncode == 0, result.stderr
    first, empty, not_utf8, last, rest = result.stdout.split(SEPARATOR)
    assert first.startswith("So")
    assert len(empty) > 1
    assert not_utf8.startswith("caf\ufffd")
    assert last.startswith("So")
    assert last != first
    assert rest == ""
    assert sample(out_dir, "--interactive", stdin=lines).stdout == result.stdout
    assert sample(out_dir, "--start=So").stdout == first + SEPARATOR


# -----------------------------------------------------------------------------
# The output


def test_text_arrives_while_it_is_written_and_a_closed_pipe_ends_the_script(out_dir):
    """As with `head`."""
    flags = arguments_of(out_dir, ["--max_new_tokens=1000000"])
    process = start(["-E", ROOT / "sample.py"], *flags)  # without start()'s PYTHONUNBUFFERED
    first = os.read(process.stdout.fileno(), 100_000)
    assert 0 < len(first) < 4096  # the size of the buffer of a pipe
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    stderr = process.stderr.read()
    assert len(stderr.splitlines()) == 1
    assert "the model's context" in stderr


def test_text_is_utf8_whatever_the_locale(out_dir):
    text = "a → b".encode()
    result = sample_in_bash('PYTHONIOENCODING=cp1252 "$@"', out_dir, "--interactive", stdin=text)
    assert result.stdout.startswith(text), result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_ends_the_script(out_dir):
    result = sample_in_bash('"$@" > /dev/full', out_dir)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert b"No space left" in result.stderr


# -----------------------------------------------------------------------------
# Which model


def test_without_out_dir_the_newest_run_is_used(tmp_path, monkeypatch):
    for number, name in enumerate(["out-b", "out-c", "out-a", "other"]):
        save(tmp_path / name, always_predict(token(name[-1])))
        os.utime(tmp_path / name / "ckpt.pt", (number, number))
    (tmp_path / "out-empty").mkdir()
    monkeypatch.chdir(tmp_path)
    result = sample("", "--start=")
    assert result.stdout == 30 * "a" + SEPARATOR
    assert "out-a" in result.stderr


def test_best_pt_is_used_by_its_name(tmp_path):
    save(tmp_path, always_predict(token("a")))
    save(tmp_path, always_predict(token("b")), name="best.pt")
    result = sample("", f"--init_from={tmp_path / 'best.pt'}", "--start=")
    assert result.stdout == 30 * "b" + SEPARATOR


@pytest.mark.parametrize(
    "flag, word",
    [
        ("--out_dir=nowhere", "nowhere"),
        ("--out_dir=", "--out_dir"),
        ("--start=FILE:nowhere.txt", "nowhere.txt"),
    ],
)
def test_what_is_not_there_is_named(flag, word, out_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(sample(out_dir, flag), word)


def test_a_nan_in_the_weights_is_refused_with_its_tensor(tmp_path):
    name = "transformer.h.1.mlp.c_fc.weight"
    save(tmp_path, lambda weights: weights[name][3, 5].fill_(float("nan")))
    result = sample(tmp_path)
    assert_one_sentence(result, name)
    assert result.stdout == ""
