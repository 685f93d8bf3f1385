"""sample.py at its doors, against transformers' generate."""

import re

import pytest
import torch
from conftest import assert_one_sentence, gpt2_of, run

from model import GPT, GPTConfig
from tokenizer import get_encoding

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "bias": True, "dropout": 0.1, "vocab_size": 50304}


def save(folder, change=lambda weights: None, prefix=""):
    """An untrained model as a checkpoint, its weights enlarged so that it has opinions."""
    torch.manual_seed(0)
    weights = {name: value * 8 for name, value in GPT(GPTConfig(**SHAPE)).state_dict().items()}
    change(weights)
    checkpoint = {"model": {prefix + name: value for name, value in weights.items()}, "model_args": SHAPE}
    torch.save(checkpoint, folder / "ckpt.pt")
    return checkpoint


def sample(out_dir, *flags):
    return run("sample.py", f"--out_dir={out_dir}", "--device=cpu", "--num_samples=1", "--max_new_tokens=30", *flags)


def test_greedy_is_that_of_transformers(tmp_path):
    """temperature 0 against generate(do_sample=False), the padded ids forbidden in both; top_k=1 is the same."""
    model = gpt2_of(save(tmp_path)).eval()
    prompt = get_encoding().encode("Once upon a time")
    ids = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=30, suppress_tokens=list(range(50257, 50304)),
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    result = sample(tmp_path, "--start=Once upon a time", "--temperature=0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(get_encoding().decode(ids[0].tolist()))
    assert sample(tmp_path, "--start=Once upon a time", "--top_k=1").stdout == result.stdout


def test_padded_ids_are_never_drawn(tmp_path):
    """A model that wants nothing but the ids past 50256, which tiktoken cannot decode."""

    def want_padding(weights):
        weights["transformer.ln_f.weight"].zero_()
        weights["transformer.ln_f.bias"].fill_(1.0)  # what the head reads at every position
        weights["lm_head.weight"][50257:] = 10.0

    save(tmp_path, want_padding)
    for flag in ("--temperature=0", "--temperature=1.5", "--top_k=0", "--top_k=3"):
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
    assert_one_sentence(sample(tmp_path), words)


def test_other_bad_input_is_one_sentence(tmp_path):
    save(tmp_path)
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    assert_one_sentence(sample(tmp_path, "--start=FILE:nowhere.txt"), "nowhere.txt")
    assert_one_sentence(sample(tmp_path, "--device=cuda:77"), "device=cuda:77")
    checkpoint["model_args"]["n_layer"] = 3
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert_one_sentence(sample(tmp_path), "do not fit")
