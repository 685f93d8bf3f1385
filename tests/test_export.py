"""export.py and huggingface.py against transformers, in both directions, and against OpenAI's published files."""

import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys

from onenight.checkpoint import build_model
from onenight.huggingface import resolve_checkpoint
from onenight.tokenizer import get_encoding

import hypothesis
import numpy as np
import pytest
import tiktoken_ext.openai_public
import torch
from conftest import ROOT, assert_one_sentence, make_bins, metrics, run, run_here, train_here
from hypothesis import strategies
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

import export as export_script
from model import GPT, GPTConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "dropout": 0.1, "vocab_size": 50304}
IDS = torch.randint(50257, (2, 48), generator=torch.Generator().manual_seed(0))


def save(folder, bias=True, architecture="gpt2", **more):
    """A checkpoint whose weights are all random, biases and gains too."""
    torch.manual_seed(0)
    model_args = {**SHAPE, "bias": bias, "architecture": architecture}
    model = GPT(GPTConfig(**model_args))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    checkpoint = {"model": model.state_dict(), "model_args": model_args, **more}
    torch.save(checkpoint, folder / "ckpt.pt")
    return checkpoint


def export(out_dir, export_dir, *flags):
    return run_here(export_script, f"--out_dir={out_dir}", f"--export_dir={export_dir}", *flags)


def logits_of(init_from, out_dir=None):
    model = build_model(resolve_checkpoint(str(init_from), out_dir), "it")
    with torch.no_grad():
        return model.lm_head(model.hidden(IDS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported folder; the checkpoint is in `run` beside it."""
    home = tmp_path_factory.mktemp("export")
    (home / "run").mkdir()
    save(home / "run")
    result = run("export.py", f"--out_dir={home / 'run'}", f"--export_dir={home / 'it'}")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert len(result.stdout.splitlines()) == 1  # transformers adds nothing
    return home / "it"


# ---- the model

KINDS = [("gpt2", True, GPT2LMHeadModel), ("gpt2", False, GPT2LMHeadModel), ("qwen3", False, Qwen3ForCausalLM)]


@pytest.mark.parametrize("architecture, bias, kind", KINDS)
def test_transformers_computes_the_same_logits(architecture, bias, kind, tmp_path):
    save(tmp_path, bias, architecture)
    assert export(tmp_path, tmp_path / "it").returncode == 0
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "it", output_loading_info=True)
    assert isinstance(model, kind) and model.dtype == torch.float32 and not model.training
    assert not any(loading.values()), loading
    with torch.no_grad():
        found = model(IDS).logits
    ours = logits_of("resume", tmp_path)
    assert found.shape == (2, 48, 50257) and ours.abs().max() > 1
    # float32 sums of 32 products of size 1 in another order; the same to 1e-4 is what was promised
    torch.testing.assert_close(found, ours[..., :50257], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_weights_in_another_number_format(dtype, tmp_path):
    checkpoint = save(tmp_path, False, "qwen3")
    assert export(tmp_path, tmp_path / "it", f"--dtype={dtype}").returncode == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    assert model.dtype == getattr(torch, dtype)
    expected = checkpoint["model"]["transformer.ln_f.weight"].to(model.dtype)
    assert torch.equal(model.model.norm.weight, expected)


# ---- and back


@pytest.mark.parametrize("architecture, bias", [("gpt2", True), ("qwen3", False)])
def test_an_exported_folder_loads_as_the_same_weights(architecture, bias, tmp_path):
    original = save(tmp_path, bias, architecture)["model"]
    assert export(tmp_path, tmp_path / "it").returncode == 0
    returned = resolve_checkpoint(str(tmp_path / "it"), None)
    expected = {**SHAPE, "bias": bias, "dropout": 0.0, "vocab_size": 50257}
    assert returned["model_args"] == {**expected, "architecture": architecture}
    assert returned["model"].keys() == original.keys()
    for name, value in returned["model"].items():
        assert torch.equal(value, original[name][: len(value)]), name


@pytest.mark.parametrize("architecture, bias, kind", KINDS[1:])
def test_a_model_changed_and_saved_in_parts_by_transformers_is_read(architecture, bias, kind, tmp_path):
    """As after finetuning: other weights, several files, a tokenizer with a chat template."""
    save(tmp_path, bias, architecture)
    assert export(tmp_path, tmp_path / "it").returncode == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = model(IDS).logits
    model.save_pretrained(tmp_path / "tuned", max_shard_size="2MB")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "it")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert len(list((tmp_path / "tuned").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(logits_of(tmp_path / "tuned"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, GPT2Model])
def test_gpt2_from_transformers(kind, tmp_path):
    """Saved with the head or, as OpenAI's own weights on the hub, without it: with other names, and with masks."""
    set_seed(0)
    shape = {"vocab_size": 50257, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**shape, activation_function="gelu", initializer_range=0.5)
    reference = GPT2LMHeadModel(config).eval()
    (reference if kind is GPT2LMHeadModel else reference.transformer).save_pretrained(tmp_path)
    if kind is GPT2Model:
        weights = load_file(tmp_path / "model.safetensors")
        mask = torch.ones(48, 48).tril().view(1, 1, 48, 48)
        save_file({**weights, "h.0.attn.bias": mask, "h.1.attn.bias": mask.clone()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = reference(IDS).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(tmp_path), expected, rtol=0, atol=1e-4)


def test_sampling_from_a_folder(folder, tmp_path):
    flags = ("--device=cpu", "--num_samples=1", "--max_new_tokens=20", "--start=Once upon a time")
    result = run("sample.py", f"--init_from={folder}", *flags, "--temperature=0", cwd=tmp_path)
    assert result.returncode == 0 and len(result.stderr.splitlines()) == 1, result.stderr  # tokens/s
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Once upon a time", return_tensors="pt")
    output = AutoModelForCausalLM.from_pretrained(folder).generate(**ids, max_new_tokens=20, do_sample=False)
    assert result.stdout == tokenizer.decode(output[0], skip_special_tokens=True) + "\n---------------\n"


def test_a_checkpoint_file_is_exported(folder, tmp_path):
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", bias=False)
    (tmp_path / "run" / "ckpt.pt").rename(tmp_path / "run" / "best.pt")
    flags = [f"--init_from={tmp_path / 'run' / 'best.pt'}", f"--export_dir={tmp_path / 'it'}"]
    result = run_here(export_script, *flags)
    assert result.returncode == 0, result.stderr
    assert not load_file(tmp_path / "it" / "model.safetensors")["transformer.ln_f.bias"].any()  # bias=False


# ---- the tokenizer


def test_vocabulary_and_merges_are_the_files_that_openai_published(folder):
    """By the checksums in tiktoken; OpenAI's vocab.json is the one that Python's json writes."""
    source = inspect.getsource(tiktoken_ext.openai_public.gpt2)
    vocab = json.dumps(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))).encode()
    for content, key in (((folder / "merges.txt").read_bytes(), "vocab_bpe_hash"), (vocab, "encoder_json_hash")):
        (expected,) = re.findall(rf'{key}="(\w+)"', source)
        assert hashlib.sha256(content).hexdigest() == expected


ODD = [
    "", " ", "  two  spaces ", "\t\n\r\n \n\n", "it's we'll I'VE", "naïve e\u0301 ﬁ ½ ② ٣ 一二 日本語 한국어",
    "🤦🏽‍♀️👩‍👩‍👧 🇪🇺 \U0001d7d8\U000e0041\U0010ffff", "\u1680\u180e\u2003\u3000 x", "a" * 500, " " * 300 + "x",
    "\u0000\u001f\u007f\u0085\u00a0\u00ad\u200b\u2028\u2029\ufeff\ufffd", "Ω≈ç√∫ ़क्षि ﷽",
    "<|endoftext|>", "a<|endoftext|>b <|endoftext|>", "def f(x):\n    return x**2  # ok\n",
]  # fmt: skip


def assert_same_tokens(tokenizer, text):
    ids = get_encoding().encode(text, allowed_special="all")
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_tokens_of_odd_text_are_tiktokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in [*ODD, "".join(ODD)]:
        assert_same_tokens(tokenizer, text)
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == 50256 and tokenizer.model_max_length == 48

    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
    @hypothesis.given(strategies.text(strategies.characters(codec="utf-8")))
    def any_text(text):
        assert_same_tokens(tokenizer, text)

    any_text()


# ---- the card


def test_the_model_card_summarises_the_training(tmp_path, monkeypatch, capsys):
    config = {"dataset": "/data/my_web", "batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-4}
    config |= {"optimizer": "muon", "embedding_lr": 0.01, "head_lr": 0.0}
    save(tmp_path, config=config, iter_num=1000, best_val_loss=3.25)
    records = [{"iter": 500, "val_loss": 3.25, "elapsed_s": 50}, {"iter": 1000, "val_loss": 3.5, "elapsed_s": 3725.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert export(tmp_path, tmp_path / "my-gpt").returncode == 0
    card = (tmp_path / "my-gpt" / "README.md").read_text()
    facts = ["my_web", "1,000 of 384 tokens, 384,000 in all", "3.5000 nats", "best val loss | 3.2500", "1h 02m"]
    facts += ["| optimizer muon, learning_rate 0.0005, embedding_lr 0.01 |"]
    assert [fact for fact in facts if fact not in card] == []
    assert "# my-gpt" in card and str(tmp_path) not in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("max_new_tokens=100", "max_new_tokens=3")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once upon a time")


# ---- what cannot be


def test_an_export_never_overwrites(folder):
    before = (folder / "README.md").stat().st_mtime_ns
    assert_one_sentence(export(folder.parent / "run", folder), "exists already")
    assert (folder / "README.md").stat().st_mtime_ns == before


def test_bad_input_to_an_export_is_one_sentence(tmp_path):
    def refuse(words, export_dir="it"):
        with pytest.raises(SystemExit, match=words) as refused:
            export_script.main([f"--out_dir={tmp_path}", f"--export_dir={tmp_path / export_dir}"])
        assert str(refused.value).isprintable()

    assert_one_sentence(run("export.py"), "--export_dir=FOLDER is missing")
    refuse("no such checkpoint")
    small = {**SHAPE, "vocab_size": 256}
    weights = GPT(GPTConfig(**small)).state_dict()
    for model, model_args, more, words in (
        (
            {},
            small,
            {},
            "do not match its shape .no lm_head.weight, no transformer.h.0.attn.c_attn.bias, .* and 26 more",
        ),
        (weights, small, {}, "vocabulary of 256 ids"),
        (weights, small, {"best_val_loss": np.float64(3.5)}, r"other than plain values.*numpy.*float\(x\)"),
        (weights, [2, 2, 32], {}, "no dicts model and model_args"),
        (torch.zeros(3), small, {}, "no dicts model and model_args"),
        (weights, {"n_layer": 2, "n_head": 2.0, "n_embd": 32, "block_size": 48}, {}, "number for n_head, vocab_size"),
        (weights, {**small, "n_head": 5}, {}, "impossible shape .n_embd=32 cannot be split"),
        (weights, {**small, "flash": True}, {}, "impossible shape .*flash"),
    ):
        torch.save({"model": model, "model_args": model_args, **more}, tmp_path / "ckpt.pt")
        refuse(words)
    save(tmp_path)
    refuse("cannot be written", export_dir="ckpt.pt/it")
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit")
def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path):
    """No file may be larger than 1 MB: the weights are."""
    save(tmp_path)
    script = (
        f"ulimit -f 1000; {sys.executable} {ROOT / 'export.py'} --out_dir={tmp_path} --export_dir={tmp_path / 'it'}"
    )
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert_one_sentence(result, "cannot be written")
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_missing_package_is_one_sentence(folder, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError")  # stands before the real one
    without, words = {"PYTHONPATH": str(tmp_path)}, 'pip install "transformers>=5"'
    flags = [f"--out_dir={folder.parent / 'run'}", f"--export_dir={tmp_path / 'it'}"]
    assert_one_sentence(run("export.py", *flags, env=without), words)
    assert_one_sentence(run("sample.py", f"--init_from={folder}", env=without), words)
    flags = ("--num_samples=1", "--max_new_tokens=2", "--device=cpu")
    plain = run("sample.py", f"--out_dir={folder.parent / 'run'}", *flags, env=without)
    assert plain.returncode == 0, plain.stderr  # a checkpoint needs no such package


def refuse(folder, words):
    with pytest.raises(SystemExit, match=words) as refused:
        resolve_checkpoint(str(folder), None)
    assert str(refused.value).isprintable()


def test_another_architecture_is_one_sentence(tmp_path):
    refuse(tmp_path, r"cannot be read .*config\.json")
    write = (tmp_path / "config.json").write_text
    gpt2 = GPT2Config(n_positions=48, n_embd=32, n_layer=1, n_head=2).to_dict()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    qwen3 = Qwen3Config(
        **shape, head_dim=16, intermediate_size=128, rope_theta=1e4, tie_word_embeddings=False
    ).to_dict()
    for config in (gpt2, qwen3):
        write(json.dumps(config))
        refuse(tmp_path, r"cannot be read .*model\.safetensors")
    for config, change, words in (
        (gpt2, {"model_type": "llama"}, "model_type is 'llama'; this program reads gpt2 and qwen3"),
        (gpt2, {"activation_function": "quick_gelu"}, "activation_function='quick_gelu'"),
        (gpt2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (gpt2, {"n_inner": 7}, "n_inner=7"),
        (gpt2, {"n_head": 5}, "cannot be read .n_embd=32 cannot be split"),
        (qwen3, {"num_key_value_heads": 1}, "num_key_value_heads=1"),
        (qwen3, {"head_dim": 128}, "head_dim=128"),
        (qwen3, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta': 1000000.0"),
        (qwen3, {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ):
        write(json.dumps({**config, **change}))
        refuse(tmp_path, words)
    write("{")
    refuse(tmp_path, "cannot be read .*config.json")


def test_bad_weights_in_a_folder_are_one_sentence(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    refuse(tmp_path, "cannot be read")
    weights = load_file(folder / "model.safetensors")
    for change, words in (
        ({"transformer.wpe.weight": torch.zeros(7, 32)}, r"transformer.wpe.weight of shape \(7, 32\)"),
        ({"transformer.h.2.ln_1.bias": torch.zeros(32)}, "an unknown transformer.h.2.ln_1.bias"),
    ):
        save_file({**weights, **change}, tmp_path / "model.safetensors")
        refuse(tmp_path, "weights do not match its shape .*" + words)
    del weights["transformer.h.1.ln_2.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    refuse(tmp_path, "weights do not match its shape .no transformer.h.1.ln_2.weight")


def test_an_exported_qwen3_is_trained_further_and_sampled(tmp_path):
    save(tmp_path, False, "qwen3")
    make_bins(tmp_path, train_tokens=1000, val_tokens=200)  # an evaluation computes 50,304 logits for each
    assert export(tmp_path, tmp_path / "it").returncode == 0
    shape = {**SHAPE, "architecture": "qwen3"}
    del shape["vocab_size"]
    settings = {**shape, "max_iters": 2, "eval_interval": 1, "learning_rate": 1e-3, "decay_lr": False}
    result = train_here(tmp_path, tmp_path / "out", init_from=tmp_path / "it", **settings)
    assert result.returncode == 0, result.stderr
    first, *_, last = [record["val_loss"] for record in metrics(tmp_path / "out") if "val_loss" in record]
    assert last < first
    flags = ["--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    assert run("sample.py", f"--init_from={tmp_path / 'it'}", *flags).stdout.count("---------------") == 1


def test_a_checkpoint_of_the_removed_architecture_is_one_sentence(tmp_path):
    torch.save({"model": {}, "model_args": {**SHAPE, "architecture": "nanochat"}}, tmp_path / "ckpt.pt")
    result = run("sample.py", f"--out_dir={tmp_path}")
    assert_one_sentence(result, "the nanochat architecture was removed; the last commit that reads it is e8f887f")


def test_another_tokenizer_is_one_sentence(folder, tmp_path):
    """Of the same size: two tokens have changed places."""
    shutil.copytree(folder, tmp_path / "other")
    for file in ("vocab.json", "tokenizer.json"):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"] if file == "tokenizer.json" else content
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (tmp_path / "other" / file).write_text(json.dumps(content))
        refuse(tmp_path / "other", f"its {file} is not GPT-2's")


def test_an_unknown_hub_name_is_one_sentence(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = run("sample.py", "--init_from=gpt2-nowhere", cwd=tmp_path, env=offline)
    assert_one_sentence(result, "and from the Hugging Face hub it cannot be read")
