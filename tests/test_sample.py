"""sample.py against transformers' generate."""

import io
import os
import re
import subprocess
import sys

from onenight.tokenizer import EOT, EOT_TEXT, get_encoding

import pytest
import torch
from conftest import ROOT, SmallMemory, assert_one_sentence, gpt2_of, run, run_here

import sample as sample_script
from configurator import configure
from model import GPT, GPTConfig
from sample import Page, SampleConfig, write_samples

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "bias": True, "dropout": 0.1, "vocab_size": 50304}


def save(folder, change=lambda weights: None, prefix=""):
    """An untrained model as a checkpoint, with weights enlarged so that its predictions are clear."""
    torch.manual_seed(0)
    weights = {name: value * 8 for name, value in GPT(GPTConfig(**SHAPE)).state_dict().items()}
    change(weights)
    checkpoint = {"model": {prefix + name: value for name, value in weights.items()}, "model_args": SHAPE}
    torch.save(checkpoint, folder / "ckpt.pt")
    return checkpoint


def flags_of(out_dir, flags):
    return [f"--out_dir={out_dir}", "--device=cpu", "--num_samples=1", "--max_new_tokens=30", *flags]


def door(out_dir, *flags, stdin=None):
    """sample.py as a process."""
    command = [sys.executable, ROOT / "sample.py", *flags_of(out_dir, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads only wait for one another in models this small
    return subprocess.run(command, env=env, input=stdin, capture_output=True, encoding="utf-8")


def sample(out_dir, *flags, stdin=b""):
    """sample.py in this process, which is faster."""
    sample_script.say_once.cache_clear()
    stdin = stdin if isinstance(stdin, bytes) else stdin.encode()
    return run_here(sample_script, *flags_of(out_dir, flags), stdin=stdin)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_is_that_of_transformers(penalty, tmp_path):
    """temperature 0 against generate(do_sample=False), the padded ids forbidden in both; top_k=1 is the same."""
    model = gpt2_of(save(tmp_path)).eval()
    prompt = get_encoding().encode("Once upon a time")
    ids = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=30, suppress_tokens=list(range(50257, 50304)),
        pad_token_id=0, eos_token_id=None, repetition_penalty=penalty,
    )  # fmt: skip
    flags = ("--start=Once upon a time", f"--repetition_penalty={penalty}")
    result = door(tmp_path, *flags, "--temperature=0")
    assert result.returncode == 0, result.stderr
    assert result.stdout == get_encoding().decode(ids[0].tolist()) + "\n---------------\n"
    assert sample(tmp_path, *flags, "--top_k=1").stdout == result.stdout


def want(token, strength=10.0):
    """A change of weights: a model that always predicts this token (or these, as a slice)."""

    def change(weights):
        weights["transformer.ln_f.weight"].zero_()
        weights["transformer.ln_f.bias"].fill_(1.0)  # what the head reads at every position
        weights["lm_head.weight"][token] = strength

    return change


def test_padded_ids_are_never_drawn(tmp_path):
    """A model that predicts only ids beyond 50256, which tiktoken cannot decode."""
    save(tmp_path, want(slice(50257, None)))
    for flag in ("--temperature=0", "--temperature=1.5", "--top_k=0", "--top_k=3", "--top_p=0.5"):
        result = sample(tmp_path, flag)
        assert result.returncode == 0, result.stderr


def test_the_seed_decides(tmp_path):
    save(tmp_path)
    one, same, other = (sample(tmp_path, f"--seed={seed}").stdout for seed in (1, 1, 2))
    assert one == same != other


def test_prompts(tmp_path):
    save(tmp_path, prefix="_orig_mod.")  # as a compiled model of nanoGPT's was saved
    (tmp_path / "prompt.txt").write_text("Ünïcödé, and 2+2=4\n", encoding="utf-8")
    result = sample(tmp_path, f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert result.stdout.startswith("Ünïcödé, and 2+2=4\n"), result.stderr
    assert sample(tmp_path, "--start=").returncode == 0
    long = sample(tmp_path, f"--start={'word ' * 100}")  # longer than block_size
    assert long.returncode == 0 and long.stdout.startswith("word word")


def test_num_samples(tmp_path):
    save(tmp_path)
    result = sample(tmp_path, "--num_samples=3", "--start=So")
    samples = re.split(r"^-+$", result.stdout, flags=re.M)
    assert len(samples) == 4 and len(set(samples)) == 4


def test_end_of_text_ends_a_sample(tmp_path):
    save(tmp_path, want(EOT))
    result = sample(tmp_path, "--start=The end.", "--num_samples=2")
    assert result.stdout == 2 * "The end.\n---------------\n"
    assert result.stderr.splitlines()[-1].startswith("2 tokens in ")
    result = sample(tmp_path, "--start=The end.", "--stop=false", "--max_new_tokens=3")
    assert result.stdout == "The end." + 3 * "<|endoftext|>" + "\n---------------\n"


def test_the_last_line_tells_the_speed_and_only_text_is_on_stdout(tmp_path):
    save(tmp_path)
    result = sample(tmp_path, "--start=So", "--num_samples=2")
    assert re.fullmatch(r"60 tokens in \d+\.\d s: [\d,]+\.\d tokens/s\n", result.stderr)
    assert "tokens/s" not in result.stdout and result.stdout.startswith("So")


def test_a_sliding_context_is_announced_once(tmp_path):
    save(tmp_path)  # block_size 48
    assert "the model sees" not in sample(tmp_path, "--start=So").stderr
    result = door(tmp_path, "--interactive", "--max_new_tokens=60", stdin="So\nSo\n")
    assert result.stderr.count("the model sees 48 tokens") == 1
    assert "the last 24" in result.stderr


# ---- where the prompt comes from, and how the text goes out


def test_the_prompt_from_stdin(tmp_path):
    save(tmp_path)
    expected = sample(tmp_path, "--start=Ünïcödé\n").stdout
    assert door(tmp_path, "--start=-", stdin="Ünïcödé\n").stdout == expected


@pytest.mark.parametrize(
    "content, text",
    [
        (b"\xef\xbb\xbfcaf\xc3\xa9", "café"),  # Notepad's byte-order mark
        (b"caf\xe9 \xff", "caf\ufffd \ufffd"),
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
    ],
    ids=["byte-order mark", "not UTF-8", "lines of Windows"],
)
def test_prompts_of_other_editors(content, text, tmp_path, monkeypatch):
    save(tmp_path)
    (tmp_path / "prompt.txt").write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = sample(tmp_path, f"--start={text}").stdout
    assert expected.startswith(text)
    for source in ("FILE:~/prompt.txt", "-", os.fsdecode(content)):
        result = sample(tmp_path, f"--start={source}", stdin=content)
        assert result.stdout == expected, result.stderr


def test_a_prompt_in_utf_16_is_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "prompt.txt").write_text("So", encoding="utf-16")
    assert_one_sentence(sample(tmp_path, f"--start=FILE:{tmp_path / 'prompt.txt'}"), "UTF-16; save it as UTF-8")


def test_a_prompt_of_three_million_spaces(tmp_path):
    save(tmp_path)
    (tmp_path / "prompt.txt").write_text(prompt := " " * 3_000_000 + "So")
    result = sample(tmp_path, f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(prompt)


def test_end_of_text_in_a_prompt_is_the_token(tmp_path, monkeypatch):
    save(tmp_path)
    prompts = []
    monkeypatch.setattr("sample.generate", lambda model, prompt, *_: prompts.append(prompt) or iter(()))
    texts = ["", EOT_TEXT, f"So{EOT_TEXT}{EOT_TEXT} it's", f"{EOT_TEXT}So\n"]
    for text in texts:
        sample(tmp_path, f"--start={text}")
    assert prompts == [[EOT], *(get_encoding().encode(text, allowed_special="all") for text in texts[1:])]


def test_interactive(tmp_path):
    """Each prompt gets one sample; a repeated prompt another one; a repeated session the same text."""
    save(tmp_path)
    result = sample(tmp_path, "--interactive", "--num_samples=7", stdin="So\nAnd\nSo\n")
    assert result.returncode == 0, result.stderr
    first, second, third, rest = result.stdout.split("\n---------------\n")
    assert first.startswith("So") and second.startswith("And") and third.startswith("So") and first != third
    assert rest == "" and result.stderr.count("tokens/s") == 3
    assert sample(tmp_path, "--interactive", stdin="So\nAnd\nSo\n").stdout == result.stdout
    assert sample(tmp_path, "--start=So").stdout == first + "\n---------------\n"


def test_interactive_goes_on_after_any_line(tmp_path):
    """One that is not UTF-8, and an empty one, which starts a document."""
    save(tmp_path)
    result = sample(tmp_path, "--interactive", stdin=b"caf\xe9\n\nSo\n")
    assert result.returncode == 0, result.stderr
    bad, empty, last, rest = result.stdout.split("\n---------------\n")
    assert bad.startswith("caf\ufffd") and len(empty) > 1 and last.startswith("So") and rest == ""


def test_without_stdin(tmp_path):
    save(tmp_path)
    command = [sys.executable, ROOT / "sample.py", *flags_of(tmp_path, ["--interactive"])]
    result = subprocess.run(["bash", "-c", '"$@" <&-', "", *map(str, command)], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_interactive_compiles_once(tmp_path, monkeypatch):
    """However long the prompts are, and wherever their caches are in memory."""
    save(tmp_path)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("sample.compile_model", lambda model, *_: torch.compile(model, backend=count, dynamic=False))
    prompts = "So\nOnce upon a time\nOne, two, three, four, five\n\n"
    result = sample(tmp_path, "--interactive", "--compile", "--max_new_tokens=5", stdin=prompts)
    assert result.returncode == 0, result.stderr
    assert result.stdout == sample(tmp_path, "--interactive", "--max_new_tokens=5", stdin=prompts).stdout
    assert len(graphs) == 1


# ---- which run


def test_without_out_dir_it_is_the_newest_run_here(tmp_path, monkeypatch):
    """The newest checkpoint counts, not the newest folder, and only in folders called out*."""
    for age, (folder, name) in enumerate([("a", "ckpt.pt"), ("out-b", "ckpt-previous.pt"), ("out-c", "ckpt.pt")]):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder)
        (tmp_path / folder / "ckpt.pt").rename(tmp_path / folder / name)
        os.utime(tmp_path / folder / name, (1e9 - age, 1e9 - age))
    (tmp_path / "out-d").mkdir()
    result = run("sample.py", "--num_samples=1", "--max_new_tokens=2", "--device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "out-b" in result.stderr.splitlines()[0]
    exported = run("export.py", "--export_dir=exported", cwd=tmp_path)
    assert exported.returncode == 0 and exported.stdout.startswith(result.stderr.splitlines()[0]), exported.stderr
    monkeypatch.chdir(tmp_path)
    named = sample("", "--init_from=a/ckpt.pt")
    assert named.returncode == 0 and "out-" not in named.stderr
    monkeypatch.chdir(tmp_path / "a")
    assert_one_sentence(sample(""), "--out_dir=")


def test_text_streams(monkeypatch):
    """The first sample is written token by token; the others follow in their order when it has ended."""
    out, written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), []
    monkeypatch.setattr(sys, "stdout", out)

    def tokens():
        for ids in [(64, 67), (65, EOT), (EOT, 67), (66, 67)]:  # "a" is 64, and so on
            written.append(out.buffer.getvalue().decode())
            yield list(ids)
        written.append(out.buffer.getvalue().decode())

    n_tokens = Page(">", 5).write(tokens(), range(5, 7), stop=True)
    assert n_tokens == 5
    dashes = "\n---------------\n"
    assert written == [">", ">a", ">ab"]  # and no more is asked for when all have ended
    assert out.buffer.getvalue().decode() == f">ab{dashes}>d{dashes}"


def test_a_closed_pipe_ends_it_silently(tmp_path):
    save(tmp_path)
    command = [sys.executable, ROOT / "sample.py", f"--out_dir={tmp_path}", "--device=cpu", "--max_new_tokens=1000000"]
    process = subprocess.Popen([*command, "--start=Once"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(20).startswith(b"Once")
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read().count(b"\n") == 1  # that the context slides
    process.stderr.close()


@pytest.mark.parametrize("text", ["naïve 日本語 🤦🏽‍♀️ ﷽ \U0001f9d1", "plain"])
def test_unfinished_characters_are_held_back(text, capsys):
    def shown(ids):
        """What is out before each token, and at the end."""
        outs = []

        def tokens():
            for token in ids:
                outs.append("".join(outs[-1:]) + capsys.readouterr().out)
                yield [token]

        Page("> ", 0).write(tokens(), range(1), stop=True)
        return outs, outs[-1] + capsys.readouterr().out.removesuffix("\n---------------\n")

    growing, all_of_it = shown(get_encoding().encode(text))
    assert all(f"> {text}".startswith(part) for part in growing) and all_of_it == f"> {text}"
    growing, cut = shown(ids := get_encoding().encode("🤦🏽")[:-1])
    assert "�" not in "".join(growing)
    assert cut == "> " + get_encoding().decode(ids) and "�" in cut


# ---- when memory runs out


def written(model, capsys, num_samples=7):
    config = SampleConfig(max_new_tokens=20, temperature=1.0)
    write_samples(model, None, config, "float32", "So", range(num_samples))
    return capsys.readouterr().out


@pytest.mark.parametrize("limit, nth", [(3, 0), (1, 0), (6, 5), (3, 15)])
def test_out_of_memory_is_the_same_text_in_smaller_batches(limit, nth, capsys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE)).eval()
    expected = written(model, capsys)
    assert expected.count("---------------\n") == 7
    assert written(SmallMemory(model, limit, nth), capsys) == expected


def test_out_of_memory_with_one_sample_is_the_end(capsys):
    with pytest.raises(SystemExit, match="out of memory with a single sample"):
        written(SmallMemory(GPT(GPTConfig(**SHAPE)).eval(), 0), capsys)


# ---- bad input


@pytest.mark.parametrize(
    "content, words",
    [(None, "no such checkpoint"), (b"PK rubbish", "damaged"), ({"model": {}}, "not a checkpoint")],
    ids=["missing", "corrupt", "something else"],
)
def test_bad_checkpoints_are_one_sentence(content, words, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "ckpt.pt").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "ckpt.pt")
    assert_one_sentence(door(tmp_path), words)


def test_settings_out_of_range_are_refused():
    keys = ["num_samples", "max_new_tokens", "temperature", "top_k", "seed", "top_p", "repetition_penalty"]
    with pytest.raises(SystemExit) as refused:
        configure(SampleConfig, [f"--{key}={0 if key[:3] in ('num', 'max', 'rep') else -1}" for key in keys], "")
    assert [re.search(r": (\w+) must be", line)[1] for line in str(refused.value).splitlines()] == keys


def test_other_bad_input_is_one_sentence(tmp_path):
    save(tmp_path)
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    assert_one_sentence(sample(tmp_path, "--start=FILE:nowhere.txt"), "nowhere.txt")
    assert_one_sentence(sample(tmp_path, "--device=cuda:77"), "device=cuda:77")
    checkpoint["model_args"]["n_layer"] = 3
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert_one_sentence(sample(tmp_path), "do not match")
