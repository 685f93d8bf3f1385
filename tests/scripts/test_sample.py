"""sample.py: the text, compared with transformers' generate(), where the prompt comes from, and how
the text goes out."""

import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample as sample_script
from configurator import UserError, configure
from helpers import ROOT, SmallMemory, assert_one_sentence, gpt2_of, run, run_here
from model import GPT, GPTConfig
from onenight.data.tokenizer import EOT, EOT_TEXT, get_encoding
from onenight.models.checkpoint import build_model
from onenight.models.generate import Sampling
from onenight.models.hf_model import to_transformers
from onenight.models.hf_tokenizer import make_tokenizer
from onenight.models.huggingface import write_folder
from onenight.models.sample_printer import SEPARATOR
from sample import SampleConfig, encode_prompt, unescape, write_samples

SHAPE = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 48,
    "bias": True,
    "dropout": 0.1,
    "vocab_size": 50304,
}


def save(folder, change=None, prefix=""):
    """Save an untrained model as a checkpoint, with larger weights than usual, so that its
    predictions are clear. `change` may change the weights; `prefix` comes before their names."""
    torch.manual_seed(0)
    weights = {name: value * 8 for name, value in GPT(GPTConfig(**SHAPE)).state_dict().items()}
    if change:
        change(weights)
    weights = {prefix + name: value for name, value in weights.items()}
    checkpoint = {"model": weights, "model_args": SHAPE}
    torch.save(checkpoint, folder / "ckpt.pt")
    return checkpoint


def always_predict(ids):
    """Return a change of the weights, with which the model always predicts this id (or slice)."""

    def change(weights):
        weights["transformer.ln_f.weight"].zero_()
        weights["transformer.ln_f.bias"].fill_(1.0)  # the input of the head at every position
        weights["lm_head.weight"][ids] = 10.0

    return change


def arguments_of(out_dir, flags):
    return [
        f"--out_dir={out_dir}",
        "--device=cpu",
        "--num_samples=1",
        "--max_new_tokens=30",
        *flags,
    ]


def sample(out_dir, *flags, stdin=b""):
    """Run sample.py in this process."""
    sample_script.print_once.cache_clear()
    stdin = stdin if isinstance(stdin, bytes) else stdin.encode()
    return run_here(sample_script, *arguments_of(out_dir, flags), stdin=stdin)


def sample_in_a_process(out_dir, *flags, stdin=None):
    """Run sample.py as a user does."""
    command = [sys.executable, ROOT / "sample.py", *arguments_of(out_dir, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # models this small are slower with more
    return subprocess.run(command, env=env, input=stdin, capture_output=True, encoding="utf-8")


# ---- the text


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_text_is_that_of_transformers(penalty, tmp_path):
    model = gpt2_of(save(tmp_path)).eval()
    ids = model.generate(
        torch.tensor([get_encoding().encode("Once upon a time")]),
        do_sample=False,
        max_new_tokens=30,
        suppress_tokens=list(range(50257, 50304)),  # the ids that pad the vocabulary
        pad_token_id=0,
        eos_token_id=None,
        repetition_penalty=penalty,
    )
    expected = get_encoding().decode(ids[0].tolist()) + SEPARATOR
    flags = ("--start=Once upon a time", f"--repetition_penalty={penalty}")
    greedy = sample(tmp_path, *flags, "--temperature=0")
    assert greedy.stdout == expected, greedy.stderr
    assert sample(tmp_path, *flags, "--top_k=1").stdout == expected


def test_text_from_a_hugging_face_folder_is_that_of_transformers(tmp_path):
    model = build_model(save(tmp_path), "the model")
    folder = tmp_path / "exported"
    write_folder(folder, to_transformers(model, torch.float32), make_tokenizer(48), "the card")

    flags = ("--temperature=0", "--max_new_tokens=20", "--start=Once upon a time")
    result = sample("", f"--init_from={folder}", *flags)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    ids = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert result.stdout == tokenizer.decode(ids[0], skip_special_tokens=True) + SEPARATOR
    assert len(result.stderr.splitlines()) == 1, result.stderr  # transformers adds nothing


@pytest.mark.parametrize(
    "flag", ["--temperature=0", "--temperature=1.5", "--top_k=0", "--top_k=3", "--top_p=0.5"]
)
def test_ids_that_pad_the_vocabulary_are_never_drawn(flag, tmp_path):
    """The model predicts nothing else, and tiktoken cannot decode them."""
    save(tmp_path, always_predict(slice(50257, None)))
    result = sample(tmp_path, flag)
    assert result.returncode == 0, result.stderr


def test_the_same_seed_gives_the_same_text(tmp_path):
    save(tmp_path)
    first = sample(tmp_path, "--seed=1").stdout
    assert sample(tmp_path, "--seed=1").stdout == first
    assert sample(tmp_path, "--seed=2").stdout != first


def test_num_samples_different_texts_are_written(tmp_path):
    save(tmp_path)
    result = sample(tmp_path, "--num_samples=3", "--start=So")
    *samples, rest = result.stdout.split(SEPARATOR)
    assert len(set(samples)) == 3
    assert all(text.startswith("So") for text in samples)
    assert rest == ""


def test_end_of_text_ends_a_sample(tmp_path):
    save(tmp_path, always_predict(EOT))
    result = sample(tmp_path, "--start=The end.", "--num_samples=2")
    assert result.stdout == 2 * f"The end.{SEPARATOR}"
    assert result.stderr.splitlines()[-1].startswith("2 tokens in ")


@pytest.mark.parametrize("flags", [(), ("--num_samples=3",), ("--interactive",)])
def test_a_sample_ends_before_the_stop_text(flags, tmp_path):
    save(tmp_path, always_predict(get_encoding().encode(" the")))
    whole = sample(tmp_path, "--start=Once", *flags, stdin="Once\n").stdout
    assert " the the" in whole
    cut = sample(tmp_path, "--start=Once", "--stop_at= the the", *flags, stdin="Once\n").stdout
    assert cut.count("Once" + SEPARATOR) == cut.count(SEPARATOR) == whole.count(SEPARATOR)


def test_line_breaks_in_the_stop_text_are_written_as_in_a_shell(tmp_path):
    save(tmp_path, always_predict(get_encoding().encode("\n")))
    result = sample(tmp_path, "--start=Once", r"--stop_at=\n\n")
    assert result.stdout == "Once" + SEPARATOR
    assert re.search("^2 tokens in ", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "given, text",
    [(r"\n\n", "\n\n"), ("\n", "\n"), (r"a\tb", "a\tb"), (r"C:\\new", r"C:\new"), (r"\d", r"\d")],
)
def test_escapes_in_the_stop_text(given, text):
    assert unescape(given) == text


def test_without_stop_text_continues_after_end_of_text(tmp_path):
    save(tmp_path, always_predict(EOT))
    result = sample(tmp_path, "--start=The end.", "--stop=false", "--max_new_tokens=3")
    assert result.stdout == f"The end.{3 * EOT_TEXT}{SEPARATOR}"


def test_weights_saved_by_a_compiled_model_of_nanogpt_give_the_same_text(tmp_path):
    save(tmp_path)
    expected = sample(tmp_path, "--start=So").stdout
    save(tmp_path, prefix="_orig_mod.")
    assert sample(tmp_path, "--start=So").stdout == expected


# ---- the prompt


def test_the_prompt_is_read_from_a_file(tmp_path):
    save(tmp_path)
    (tmp_path / "prompt.txt").write_text("Ünïcödé, and 2+2=4\n", encoding="utf-8")
    result = sample(tmp_path, f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert result.stdout.startswith("Ünïcödé, and 2+2=4\n"), result.stderr


def test_the_prompt_is_read_from_stdin(tmp_path):
    save(tmp_path)
    expected = sample(tmp_path, "--start=Ünïcödé\n").stdout
    result = sample_in_a_process(tmp_path, "--start=-", stdin="Ünïcödé\n")
    assert result.stdout == expected, result.stderr


@pytest.mark.parametrize(
    "content, text",
    [
        (b"\xef\xbb\xbfcaf\xc3\xa9", "café"),
        (b"caf\xe9 \xff", "caf\ufffd \ufffd"),
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
    ],
    ids=["a byte-order mark", "not UTF-8", "line ends of Windows"],
)
def test_prompts_from_any_editor_are_read(content, text, tmp_path, monkeypatch):
    save(tmp_path)
    (tmp_path / "prompt.txt").write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = sample(tmp_path, f"--start={text}").stdout
    assert expected.startswith(text)
    for start in ("FILE:~/prompt.txt", "-", os.fsdecode(content)):
        result = sample(tmp_path, f"--start={start}", stdin=content)
        assert result.stdout == expected, result.stderr


def test_a_prompt_in_utf_16_is_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "prompt.txt").write_text("So", encoding="utf-16")
    result = sample(tmp_path, f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert_one_sentence(result, "UTF-16; save it as UTF-8")


def test_the_name_of_a_file_as_prompt_is_refused_with_the_flag_to_write(tmp_path):
    save(tmp_path)
    (tmp_path / "prompts.txt").write_text("Once upon a time")
    result = sample(tmp_path, f"--start={tmp_path}/prompts.txt")
    assert_one_sentence(result, f"is a file; write --start=FILE:{tmp_path}/prompts.txt")


def test_a_prompt_file_that_does_not_exist_is_refused(tmp_path):
    save(tmp_path)
    assert_one_sentence(sample(tmp_path, "--start=FILE:nowhere.txt"), "nowhere.txt")


def test_an_empty_prompt_starts_a_document(tmp_path):
    save(tmp_path)
    result = sample(tmp_path, "--start=")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > len(SEPARATOR)


def test_a_prompt_longer_than_the_context_is_continued(tmp_path):
    save(tmp_path)
    prompt = "word " * 100
    result = sample(tmp_path, f"--start={prompt}")
    assert result.stdout.startswith(prompt), result.stderr


def test_a_prompt_of_three_million_spaces_is_continued(tmp_path):
    save(tmp_path)
    prompt = " " * 3_000_000 + "So"
    (tmp_path / "prompt.txt").write_text(prompt)
    result = sample(tmp_path, f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert result.stdout.startswith(prompt), result.stderr


@pytest.mark.parametrize("text", [EOT_TEXT, f"So{EOT_TEXT}{EOT_TEXT} it's", f"{EOT_TEXT}So\n"])
def test_end_of_text_in_a_prompt_is_the_token(text):
    assert encode_prompt(text) == get_encoding().encode(text, allowed_special="all")


def test_an_empty_prompt_is_an_end_of_text():
    assert encode_prompt("") == [EOT]


# ---- interactive


def test_interactive_prompts_get_one_sample_each(tmp_path):
    """The same prompt gets another sample the second time, and the same ones in another session."""
    save(tmp_path)
    result = sample(tmp_path, "--interactive", "--num_samples=7", stdin="So\nAnd\nSo\n")
    assert result.returncode == 0, result.stderr
    first, second, third, rest = result.stdout.split(SEPARATOR)
    assert first.startswith("So")
    assert second.startswith("And")
    assert third.startswith("So")
    assert third != first
    assert rest == ""
    assert result.stderr.count("tokens/s") == 3
    again = sample(tmp_path, "--interactive", stdin="So\nAnd\nSo\n")
    assert again.stdout == result.stdout
    assert sample(tmp_path, "--start=So").stdout == first + SEPARATOR


def test_interactive_accepts_any_line(tmp_path):
    """Also one that is not UTF-8, and an empty one, which starts a document."""
    save(tmp_path)
    result = sample(tmp_path, "--interactive", stdin=b"caf\xe9\n\nSo\n")
    assert result.returncode == 0, result.stderr
    not_utf8, empty, last, rest = result.stdout.split(SEPARATOR)
    assert not_utf8.startswith("caf\ufffd")
    assert len(empty) > 1
    assert last.startswith("So")
    assert rest == ""


def test_interactive_without_stdin_ends_at_once(tmp_path):
    save(tmp_path)
    command = [sys.executable, ROOT / "sample.py", *arguments_of(tmp_path, ["--interactive"])]
    result = subprocess.run(
        ["bash", "-c", '"$@" <&-', "", *map(str, command)], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_interactive_compiles_once(tmp_path, monkeypatch):
    """However long the prompts are, and wherever their caches are in memory."""
    save(tmp_path)
    prompts = "So\nOnce upon a time\nOne, two, three, four, five\n\n"
    flags = ["--interactive", "--max_new_tokens=5"]
    expected = sample(tmp_path, *flags, stdin=prompts).stdout
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def compile_model(model):
        return torch.compile(model, backend=count, dynamic=False)

    monkeypatch.setattr("onenight.system.device.compile_model", compile_model)
    result = sample(tmp_path, *flags, "--compile", stdin=prompts)
    assert result.stdout == expected, result.stderr
    assert len(graphs) == 1


def test_a_model_that_cannot_be_compiled_gives_the_same_text_and_the_reason_once(
    tmp_path, monkeypatch
):
    save(tmp_path)
    expected = sample(tmp_path, "--start=So").stdout

    def fail(graph, example_inputs):
        raise RuntimeError("no such instruction")

    def compile_model(model):
        return torch.compile(model, backend=fail, dynamic=False)

    monkeypatch.setattr("onenight.system.device.compile_model", compile_model)
    result = sample(tmp_path, "--start=So", "--compile")
    assert result.stdout == expected, result.stderr
    assert result.stderr.count("torch.compile: disabled (") == 1
    assert "no such instruction" in result.stderr


# ---- the output


def test_only_text_goes_to_stdout_and_the_last_line_has_the_speed(tmp_path):
    save(tmp_path)
    result = sample(tmp_path, "--start=So", "--num_samples=2")
    assert re.fullmatch(r"60 tokens in \d+\.\d s: [\d,]+\.\d tokens/s\n", result.stderr)
    assert result.stdout.startswith("So")
    assert result.stdout.count(SEPARATOR) == 2


def test_a_full_context_is_announced_once(tmp_path):
    save(tmp_path)  # block_size is 48
    assert "context" not in sample(tmp_path, "--start=So").stderr
    result = sample(tmp_path, "--interactive", "--max_new_tokens=60", stdin="So\nSo\n")
    assert result.stderr.count("the model's context is 48 tokens") == 1
    assert "from the last 24" in result.stderr


def test_a_closed_pipe_ends_the_script_silently(tmp_path):
    save(tmp_path)
    flags = ["--max_new_tokens=1000000", "--start=Once"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "sample.py", *arguments_of(tmp_path, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(20).startswith(b"Once")
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    lines = process.stderr.read().splitlines()
    process.stderr.close()
    assert len(lines) == 1
    assert b"the model's context" in lines[0]


# ---- which model


def test_without_out_dir_the_newest_run_is_used(tmp_path, monkeypatch):
    (tmp_path / "out-b").mkdir()
    save(tmp_path / "out-b")
    monkeypatch.chdir(tmp_path)
    result = sample("")
    assert result.returncode == 0
    assert result.stderr.splitlines()[0] == "out_dir=out-b, the newest run here"
    named = sample("", "--init_from=out-b/ckpt.pt")
    assert named.stdout == result.stdout
    assert "out-b" not in named.stderr


def test_without_any_run_the_user_is_asked_for_out_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(sample(""), "correct --out_dir")


def test_an_unknown_name_on_the_hub_is_refused(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = run("sample.py", "--init_from=gpt2-nowhere", cwd=tmp_path, env=offline)
    assert_one_sentence(result, "and it cannot be loaded from the Hugging Face hub")


def test_a_missing_checkpoint_is_refused(tmp_path):
    assert_one_sentence(sample_in_a_process(tmp_path), "no such checkpoint")


def test_weights_that_do_not_match_the_shape_are_refused(tmp_path):
    checkpoint = save(tmp_path)
    checkpoint["model_args"] = {**SHAPE, "n_layer": 3}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert_one_sentence(sample(tmp_path), "do not match")


def test_a_missing_device_is_refused(tmp_path):
    save(tmp_path)
    assert_one_sentence(sample(tmp_path, "--device=cuda:77"), "device=cuda:77")


# ---- the settings


def test_the_settings_of_generate_are_those_of_the_script():
    assert issubclass(SampleConfig, Sampling)
    config = configure(SampleConfig, ["--temperature=0.5", "--top_p=0.9"], "")
    assert (config.temperature, config.top_k, config.top_p) == (0.5, 200, 0.9)


def test_settings_out_of_range_are_refused():
    values = {
        "num_samples": 0,
        "max_new_tokens": 0,
        "temperature": -1,
        "top_k": -1,
        "seed": -1,
        "top_p": -1,
        "repetition_penalty": 0,
    }
    with pytest.raises(UserError) as refusal:
        configure(SampleConfig, [f"--{key}={value}" for key, value in values.items()], "")
    lines = str(refusal.value).splitlines()
    assert [re.search(r": (\w+) must be", line)[1] for line in lines] == list(values)


# ---- when memory runs out


def write_seven(model, capsys):
    """Return what seven samples of one prompt print."""
    config = SampleConfig(max_new_tokens=20, temperature=1.0)
    write_samples(model, None, config, "float32", "So", range(7))
    return capsys.readouterr().out


@pytest.mark.parametrize("limit, nth", [(3, 0), (1, 0), (6, 5), (3, 15)])
def test_fewer_samples_at_once_give_the_same_text_if_memory_runs_out(limit, nth, capsys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE)).eval()
    expected = write_seven(model, capsys)
    assert expected.count(SEPARATOR) == 7
    assert write_seven(SmallMemory(model, limit, nth), capsys) == expected


def test_out_of_memory_with_one_sample_is_refused(capsys):
    model = GPT(GPTConfig(**SHAPE)).eval()
    with pytest.raises(UserError, match="out of memory with a single sample"):
        write_seven(SmallMemory(model, limit=0), capsys)
