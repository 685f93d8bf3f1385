"""onenight/hf.py: compared with transformers in both directions, and with tiktoken."""

import hashlib
import json
import shutil

import hypothesis
import pytest
import torch
from hypothesis import strategies
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from helpers import logits_of_every_position
from onenight.checkpoint import build_model
from onenight.errors import UserError
from onenight.hf import make_tokenizer, read_folder, to_transformers, write_folder
from random_models import IDS, SHAPE, random_checkpoint
from reference import GPT2

# The checksums of encoder.json and vocab.bpe of GPT-2, as tiktoken has them.
VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{architecture: folder} of random models with all weights, and of GPT-2's without biases.
    Tests read but do not change them."""
    home = tmp_path_factory.mktemp("folders")
    tokenizer = make_tokenizer(48)
    kinds = {"gpt2": (True, "gpt2"), "gpt2-no-bias": (False, "gpt2"), "qwen3": (False, "qwen3")}
    for name, kind in kinds.items():
        model = build_model(random_checkpoint(*kind), "the model")
        write_folder(home / name, to_transformers(model, torch.float32), tokenizer, "the card")
    return {name: home / name for name in kinds}


@pytest.fixture
def copy(folders, tmp_path):
    """Return a function that copies a folder, for a test to change; by default the one with
    GPT-2's architecture. With keep_tokenizer=False it leaves out the files of the tokenizer."""

    def copy_folder(name="gpt2", keep_tokenizer=True):
        folder = shutil.copytree(folders[name], tmp_path / "copy")
        if not keep_tokenizer:
            remove(folder, *TOKENIZER_FILES)
        return folder

    return copy_folder


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


def edit_json(path, changes):
    """Change some values of a JSON file, in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


@torch.no_grad()
def logits_of(checkpoint):
    """Return the logits of a checkpoint's model for IDS, (2, 48, vocab_size)."""
    return logits_of_every_position(build_model(checkpoint, "the model"), IDS)


def assert_same_logits(ours, theirs):
    """Both are sums of some hundred float32 numbers of size 1, in another order."""
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def assert_refused(folder, word):
    """The folder is refused in one line that names it and has this word."""
    with pytest.raises(UserError) as refusal:
        read_folder(str(folder))
    message = str(refusal.value)
    assert message.startswith(f"{folder}: ")
    assert word in message.removeprefix(f"{folder}: ")
    assert "\n" not in message


# -----------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("name", ["gpt2", "gpt2-no-bias", "qwen3"])
def test_transformers_computes_the_same_logits(name, folders):
    model, report = AutoModelForCausalLM.from_pretrained(folders[name], output_loading_info=True)
    assert model.dtype == torch.float32
    assert not any(report.values()), report
    with torch.no_grad():
        theirs = model(IDS).logits
    ours = logits_of(random_checkpoint(name == "gpt2", name.partition("-")[0]))
    assert_same_logits(ours[..., :50257], theirs)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_a_written_folder_is_read_as_exactly_the_same_weights(name, folders):
    checkpoint = read_folder(str(folders[name]))
    original = random_checkpoint(name == "gpt2", name)
    shape = {"bias": name == "gpt2", "architecture": name, "dropout": 0.0, "vocab_size": 50257}
    assert checkpoint["model_args"] == {**SHAPE, **shape}
    assert checkpoint["model"].keys() == original["model"].keys()
    for key, value in checkpoint["model"].items():
        assert torch.equal(value, original["model"][key][: len(value)]), key


@pytest.mark.parametrize("name", ["gpt2-no-bias", "qwen3"])
def test_a_model_finetuned_and_saved_in_parts_by_transformers_is_read(name, folders, tmp_path):
    """With other weights, in bfloat16, in several files, all of which must be there, with a chat
    template."""
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        theirs = theirs(IDS).logits
    assert_same_logits(logits_of(read_folder(str(tmp_path))), theirs)
    last = max(tmp_path.glob("model-*.safetensors"))
    last.unlink()
    assert_refused(tmp_path, last.name)


def test_a_folder_like_openais_on_the_hub_is_read(tmp_path):
    """Without the head: the tensors have other names, and masks are among them."""
    torch.manual_seed(0)
    sizes = {"n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, activation_function="gelu", initializer_range=0.5)
    reference = GPT2LMHeadModel(config).eval()
    reference.transformer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        theirs = reference(IDS).logits
    assert_same_logits(logits_of(read_folder(str(tmp_path))), theirs)


# -----------------------------------------------------------------------------
# Models that are refused


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("gpt2", "model_type", "llama"),
        ("gpt2", "activation_function", "quick_gelu"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "n_inner", 7),
        ("gpt2", "n_head", 5),
        ("qwen3", "num_key_value_heads", 1),
        ("qwen3", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
        ("qwen3", "attention_bias", True),
    ],
)
def test_a_model_that_computes_something_else_is_refused(name, key, value, copy):
    folder = copy(name, keep_tokenizer=False)
    edit_json(folder / "config.json", {key: value})
    assert_refused(folder, value if key == "model_type" else key)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("gpt2", "transformer.wpe.weight", torch.zeros(7, 32)),
        ("gpt2", "transformer.h.2.ln_1.bias", torch.zeros(32)),
        ("gpt2", "transformer.h.1.ln_2.weight", None),
        ("gpt2", "lm_head.weight", torch.zeros(50257, 32)),  # another than the embeddings
        ("qwen3", "lm_head.weight", None),
    ],
)
def test_a_tensor_that_is_missing_or_does_not_belong_is_refused(name, key, value, copy):
    folder = copy(name, keep_tokenizer=False)
    weights = load_file(folder / "model.safetensors")
    weights[key] = value
    if value is None:
        del weights[key]
    save_file(weights, folder / "model.safetensors")
    assert_refused(folder, key)


def test_a_folder_with_an_adapter_is_refused(copy):
    """Without the adapter, the model would write other text."""
    folder = copy(keep_tokenizer=False)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "gpt2", "target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    assert_refused(folder, "adapter")


def test_weights_in_the_old_format_which_may_contain_code_are_refused(copy):
    folder = copy(keep_tokenizer=False)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    remove(folder, "model.safetensors")
    assert_refused(folder, "model.safetensors")


# -----------------------------------------------------------------------------
# The tokenizer that is written

ODD_TEXTS = [
    "\t\n\r\n \n\n  two  spaces ",
    "it's we'll I'VE\u0000\u001f\u007f\u0085\u00a0\u00ad\u200b\u2028\u2029\ufeff\ufffd",
    "naïve e\u0301 ﬁ ½ ② ٣ 一二 日本語 한국어 Ω≈ç√∫ ़क्षि ﷽",
    "🤦🏽‍♀️👩‍👩‍👧 🇪🇺 \U0001d7d8\U000e0041\U0010ffff\u1680\u180e\u2003\u3000 x",
    "a" * 500 + " " * 300 + "x",
    "a<|endoftext|>b <|endoftext|>",
    "def f(x):\n    return x**2  # ok\n",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders["qwen3"])


def assert_same_tokens(tokenizer, text):
    ids = GPT2.encode(text, allowed_special="all")
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_vocabulary_and_merges_are_the_files_that_openai_published(folders, tokenizer):
    vocab = json.loads((folders["gpt2"] / "vocab.json").read_text(encoding="utf-8"))
    vocab_as_published = json.dumps(vocab).encode()  # OpenAI's file is what json.dumps writes
    assert hashlib.sha256(vocab_as_published).hexdigest() == VOCAB_SHA256
    merges = (folders["gpt2"] / "merges.txt").read_bytes()
    assert hashlib.sha256(merges).hexdigest() == MERGES_SHA256
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == 50256
    assert tokenizer.model_max_length == 48


@pytest.mark.parametrize("text", [*ODD_TEXTS, "".join(ODD_TEXTS)])
def test_tokens_of_odd_texts_are_those_of_tiktoken(text, tokenizer):
    assert_same_tokens(tokenizer, text)


def test_tokens_of_random_texts_are_those_of_tiktoken(tokenizer):
    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
    @hypothesis.given(strategies.text(strategies.characters(codec="utf-8")))
    def check(text):
        assert_same_tokens(tokenizer, text)

    check()


# -----------------------------------------------------------------------------
# The tokenizer that is read


@pytest.mark.parametrize(
    "missing",
    [("vocab.json", "merges.txt"), ("tokenizer.json", "tokenizer_config.json")],
    ids=["tokenizer.json", "vocab.json"],
)
def test_gpt2s_tokenizer_is_accepted_in_each_form(missing, copy):
    folder = copy()
    edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    remove(folder, *missing)
    assert read_folder(str(folder))["model_args"]["vocab_size"] == 50257


def with_chat_tokens(folder):
    """As transformers adds them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_two_letters_swapped(folder):
    remove(folder, "tokenizer.json")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    edit_json(folder / "vocab.json", {"a": vocab["b"], "b": vocab["a"]})


def with_a_space_before_the_text(folder):
    edit_json(folder / "tokenizer_config.json", {"add_prefix_space": True})


def with_a_normalizer(folder):
    """transformers leaves it out, because of the tokenizer's class; other programs do not."""
    edit_json(folder / "tokenizer.json", {"normalizer": {"type": "NFC"}})


@pytest.mark.parametrize(
    "change, word",
    [
        (with_chat_tokens, "<|im_end|>, <|im_start|>"),
        (with_two_letters_swapped, "a, b"),
        (with_a_space_before_the_text, "tokenizer"),
        (with_a_normalizer, "tokenizer"),
    ],
)
def test_a_tokenizer_with_other_tokens_or_rules_is_refused(change, word, copy):
    folder = copy()
    change(folder)
    assert_refused(folder, word)
