"""onenight/models/huggingface.py and hf_model.py, compared with transformers in both directions."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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

from configurator import UserError
from helpers import logits_of_every_position
from onenight.models.checkpoint import build_model
from onenight.models.hf_model import to_transformers
from onenight.models.hf_tokenizer import make_tokenizer
from onenight.models.huggingface import read_folder, resolve_checkpoint, write_folder
from random_models import IDS, SHAPE, random_checkpoint


def write(folder, checkpoint, dtype=torch.float32):
    """Write the model of a checkpoint as a folder."""
    model = to_transformers(build_model(checkpoint, "the model"), dtype)
    write_folder(folder, model, make_tokenizer(48), "the card")


@torch.no_grad()
def logits_of(checkpoint):
    """Return the logits of a checkpoint's model for IDS, (2, 48, vocab_size)."""
    return logits_of_every_position(build_model(checkpoint, "the model"), IDS)


def logits_of_folder(folder):
    return logits_of(read_folder(str(folder)))


def logits_of_theirs(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_refused(folder, words):
    """The folder is refused with one line that names it once and has these words."""
    with pytest.raises(UserError, match=words) as refusal:
        read_folder(str(folder))
    message = str(refusal.value)
    assert message.isprintable()
    assert message.startswith(f"{folder}: ")
    assert message.count(f"{folder}: ") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with GPT-2's architecture, which tests read but do not change."""
    path = tmp_path_factory.mktemp("huggingface") / "gpt2"
    write(path, random_checkpoint())
    return path


# ---- writing

KINDS = [
    ("gpt2", True, GPT2LMHeadModel),
    ("gpt2", False, GPT2LMHeadModel),
    ("qwen3", False, Qwen3ForCausalLM),
]


@pytest.mark.parametrize("architecture, bias, kind", KINDS)
def test_transformers_computes_the_same_logits(architecture, bias, kind, tmp_path):
    checkpoint = random_checkpoint(bias, architecture)
    write(tmp_path / "it", checkpoint)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "it", output_loading_info=True)
    assert isinstance(model, kind)
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(report.values()), report
    theirs = logits_of_theirs(model)
    ours = logits_of(checkpoint)
    assert theirs.shape == (2, 48, 50257)
    assert ours.abs().max() > 1
    # Sums of float32 numbers of size 1 in another order.
    torch.testing.assert_close(theirs, ours[..., :50257], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_written_in_another_number_format(dtype, tmp_path):
    checkpoint = random_checkpoint(False, "qwen3")
    write(tmp_path / "it", checkpoint, dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    assert model.dtype == dtype
    expected = checkpoint["model"]["transformer.ln_f.weight"].to(dtype)
    assert torch.equal(model.model.norm.weight, expected)


# ---- reading


@pytest.mark.parametrize("architecture, bias", [("gpt2", True), ("qwen3", False)])
def test_a_written_folder_is_read_as_the_same_weights(architecture, bias, tmp_path):
    checkpoint = random_checkpoint(bias, architecture)
    write(tmp_path / "it", checkpoint)
    original = checkpoint["model"]
    returned = read_folder(str(tmp_path / "it"))
    assert returned["model_args"] == {
        **SHAPE,
        "bias": bias,
        "dropout": 0.0,
        "vocab_size": 50257,
        "architecture": architecture,
    }
    assert returned["model"].keys() == original.keys()
    for name, value in returned["model"].items():
        assert torch.equal(value, original[name][: len(value)]), name


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_model_changed_and_saved_in_parts_by_transformers_is_read(architecture, tmp_path):
    """As after finetuning: other weights, several files, a tokenizer with a chat template."""
    write(tmp_path / "it", random_checkpoint(False, architecture))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="2MB")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "it")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert len(list((tmp_path / "tuned").glob("model-*.safetensors"))) > 1
    expected = logits_of_theirs(model)
    torch.testing.assert_close(logits_of_folder(tmp_path / "tuned"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, GPT2Model])
def test_gpt2_saved_by_transformers_is_read(kind, tmp_path):
    """With the head or, like OpenAI's own weights on the hub, without it: then the tensors have
    other names, and masks are among them."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=50257,
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=2,
        activation_function="gelu",
        initializer_range=0.5,
    )
    reference = GPT2LMHeadModel(config).eval()
    if kind is GPT2LMHeadModel:
        reference.save_pretrained(tmp_path)
    else:
        reference.transformer.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        mask = torch.ones(48, 48).tril().view(1, 1, 48, 48)
        weights["h.0.attn.bias"] = mask
        weights["h.1.attn.bias"] = mask.clone()
        save_file(weights, tmp_path / "model.safetensors")
    expected = logits_of_theirs(reference)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of_folder(tmp_path), expected, rtol=0, atol=1e-4)


# ---- folders that cannot be used


def test_a_folder_without_files_is_refused(tmp_path):
    assert_refused(tmp_path, r"cannot be read .*config\.json")


def test_a_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert_refused(tmp_path, r"cannot be read .*config\.json")


GPT2 = GPT2Config(n_positions=48, n_embd=32, n_layer=1, n_head=2).to_dict()
QWEN3 = Qwen3Config(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    rope_theta=1e4,
    tie_word_embeddings=False,
).to_dict()


@pytest.mark.parametrize("config", [GPT2, QWEN3], ids=["gpt2", "qwen3"])
def test_a_folder_without_weights_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, r"cannot be read .*model\.safetensors")


@pytest.mark.parametrize(
    "config, change, words",
    [
        (GPT2, {"model_type": "llama"}, "model_type is 'llama'; this program reads gpt2 and qwen3"),
        (GPT2, {"activation_function": "quick_gelu"}, "activation_function='quick_gelu'"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2, {"n_inner": 7}, "n_inner=7"),
        (GPT2, {"n_head": 5}, "cannot be read .n_embd=32 is not divisible by n_head=5"),
        (QWEN3, {"num_key_value_heads": 1}, "num_key_value_heads=1"),
        (QWEN3, {"head_dim": 128}, "head_dim=128"),
        (
            QWEN3,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_theta': 1000000.0",
        ),
        (QWEN3, {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_an_architecture_that_our_model_does_not_have_is_refused(config, change, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    assert_refused(tmp_path, words)


def test_damaged_weights_are_refused(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    assert_refused(tmp_path, "cannot be read")


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        (
            "transformer.wpe.weight",
            torch.zeros(7, 32),
            r"transformer.wpe.weight of shape \(7, 32\)",
        ),
        (
            "transformer.h.2.ln_1.bias",
            torch.zeros(32),
            "an unknown transformer.h.2.ln_1.bias",
        ),
        ("transformer.h.1.ln_2.weight", None, "no transformer.h.1.ln_2.weight"),
    ],
    ids=["of another shape", "unknown", "missing"],
)
def test_a_tensor_that_does_not_fit_is_named(name, tensor, words, folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    weights = load_file(folder / "model.safetensors")
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    save_file(weights, tmp_path / "model.safetensors")
    assert_refused(tmp_path, f"its weights do not match its shape .{words}")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_file_of_a_folder_is_refused_with_the_folder_to_write(name, folder):
    with pytest.raises(UserError, match=f"{name}: is one file .*; write --init_from={folder}$"):
        resolve_checkpoint(str(folder / name), Path("unused"))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="model.gguf: is neither a checkpoint, whose name ends in"):
        resolve_checkpoint(str(tmp_path / "model.gguf"), Path("unused"))


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt-previous.pt", "best.pt"])
def test_the_folder_of_a_run_is_refused_with_the_checkpoint_to_write(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"the folder of a run; write --init_from=.*/{name}$"):
        resolve_checkpoint(str(tmp_path), Path("unused"))


def test_a_hugging_face_folder_as_out_dir_is_refused_with_the_flag_to_write(folder):
    with pytest.raises(UserError, match=f"is a Hugging Face folder; write --init_from={folder}$"):
        resolve_checkpoint("resume", folder)


def test_weights_in_the_old_format_are_refused_with_a_command_that_converts_them(folder, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(folder / "config.json", old)
    torch.save(load_file(folder / "model.safetensors"), old / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights are in pytorch_model.bin") as refusal:
        resolve_checkpoint(str(old), Path("unused"))
    message = str(refusal.value)
    command = re.search('python -c "(.*)", then write --init_from=(.*)$', message)
    exec(command[1], {})
    converted = resolve_checkpoint(command[2], Path("unused"))
    original = read_folder(str(folder))
    assert converted["model_args"] == original["model_args"]
    for name, value in original["model"].items():
        assert torch.equal(converted["model"][name], value), name


def test_without_docstrings_hugging_face_folders_are_refused(folder, monkeypatch):
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=2))
    with pytest.raises(UserError, match="run this without python -OO and PYTHONOPTIMIZE=2"):
        read_folder(str(folder))


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_another_tokenizer_of_the_same_size_is_refused(file, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"] if file == "tokenizer.json" else content
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "other" / file).write_text(json.dumps(content))
    assert_refused(tmp_path / "other", f"its {file} is not GPT-2's")
