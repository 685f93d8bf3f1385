"""model.py against transformers' GPT-2 and Qwen3, which others wrote from the original weights."""

import math
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D

from helpers import gpt2_of, logits_of_every_position, qwen3_names, qwen3_of
from model import GPT, IGNORED, GPTConfig

SHAPE = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embd": 32}
WIDER = {"block_size": 64, "vocab_size": 500, "n_layer": 6, "n_head": 4, "n_embd": 64}


def gpt2_pair(bias):
    """Return our model and transformers' GPT-2 in float64, with the same random weights.

    Biases and gains are random too.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    reference = gpt2_of({"model_args": asdict(model.config), "model": model.state_dict()})
    return model.double(), reference.double()


def qwen3_pair():
    """Return our model and transformers' Qwen3, with the same random weights.

    They are in float32, as the norms compute.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, bias=False, architecture="qwen3"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, qwen3_of({"model_args": asdict(model.config), "model": model.state_dict()})


def transposed_names(reference):
    """Return the names of the matrices that transformers keeps as (in, out), as OpenAI did."""
    return {
        f"{name}.weight" for name, module in reference.named_modules() if isinstance(module, Conv1D)
    }


def random_ids(n_rows, n_columns):
    return torch.randint(61, (n_rows, n_columns))


# -----------------------------------------------------------------------------
# GPT-2


@pytest.mark.parametrize("bias", [True, False])
def test_gpt2_logits_equal_those_of_transformers(bias):
    model, reference = gpt2_pair(bias)
    idx = random_ids(2, 16)
    expected = reference(idx).logits
    assert expected.abs().max() > 1
    # Logits of at most 10, which float64 rounds at 1e-15, after a few hundred additions.
    torch.testing.assert_close(logits_of_every_position(model, idx), expected, rtol=0, atol=1e-12)
    logits, loss = model(idx)
    torch.testing.assert_close(logits, expected[:, [-1], :], rtol=0, atol=1e-12)
    assert loss is None


@pytest.mark.parametrize("bias", [True, False])
def test_gpt2_loss_and_gradients_equal_those_of_transformers(bias):
    model, reference = gpt2_pair(bias)
    idx = random_ids(2, 16)
    labels = idx.clone()
    labels[0, 3:6] = -100  # transformers' IGNORED; it shifts the labels itself
    targets = torch.full_like(idx, IGNORED)
    targets[:, :-1] = labels[:, 1:].masked_fill(labels[:, 1:] == -100, IGNORED)
    expected = reference(idx, labels=labels).loss
    _, loss = model(idx, targets)
    # transformers computes the loss in float32, which rounds at 6e-8.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    transposed = transposed_names(reference)
    for name, parameter in model.named_parameters():
        gradient = gradients[name].T if name in transposed else gradients[name]
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("bias", [True, False])
def test_gpt2_has_the_names_and_shapes_of_openai(bias):
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=3, n_head=4)
    reference = GPT2LMHeadModel(config)
    transposed = transposed_names(reference)
    expected = {}
    for name, parameter in reference.named_parameters():
        shape = parameter.shape[::-1] if name in transposed else parameter.shape
        if bias or not name.endswith(".bias"):
            expected[name] = shape
    model = GPT(GPTConfig(**SHAPE, bias=bias))
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == expected
    # nanoGPT saves the tied head as well.
    assert set(model.state_dict()) == {*expected, "lm_head.weight"}


def test_gpt2_embeddings_and_head_are_one_matrix():
    model = GPT(GPTConfig(**SHAPE))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_gpt2_has_the_known_number_of_parameters():
    with torch.device("meta"):  # shapes without memory
        gpt2 = GPT(GPTConfig(vocab_size=50257, bias=True))
        ours = GPT(GPTConfig(vocab_size=50304, bias=False))
        reference = GPT2LMHeadModel(GPT2Config())
    assert gpt2.get_num_params(non_embedding=False) == reference.num_parameters() == 124_439_808
    matrices = 50304 * 768 + 12 * (3 + 1 + 4 + 4) * 768 * 768
    gains = (2 * 12 + 1) * 768
    assert ours.get_num_params() == matrices + gains == 123_587_328  # nanoGPT prints "123.59M"


@pytest.mark.parametrize("bias", [True, False])
def test_gpt2_is_initialized_as_by_nanogpt(bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**WIDER, bias=bias))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 6) if name.endswith("c_proj.weight") else 0.02
            n = parameter.numel()
            # Five standard errors of the mean and of the standard deviation of n normal numbers.
            assert abs(parameter.mean()) < 5 * std / math.sqrt(n), name
            assert abs(parameter.std() - std) < 5 * std / math.sqrt(2 * n), name


# -----------------------------------------------------------------------------
# Qwen3


def test_qwen3_logits_equal_those_of_transformers():
    model, reference = qwen3_pair()
    idx = random_ids(2, 16)
    expected = reference(idx).logits
    assert expected.abs().max() > 5
    # Logits of about 10, which float32 rounds at 6e-7, after some hundred additions.
    torch.testing.assert_close(logits_of_every_position(model, idx), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(idx)[0], expected[:, [-1]], rtol=0, atol=1e-5)


def test_qwen3_loss_and_gradients_equal_those_of_transformers():
    model, reference = qwen3_pair()
    idx = random_ids(2, 17)
    logits = reference(idx[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    ours = qwen3_names({name: parameter.grad for name, parameter in model.named_parameters()})
    assert ours.keys() == dict(reference.named_parameters()).keys()
    for name, parameter in reference.named_parameters():
        assert (ours[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_qwen3_has_the_known_number_of_parameters_and_flops():
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False, n_head=6, architecture="qwen3"))
        config = Qwen3Config(
            vocab_size=50304,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=6,
            num_key_value_heads=6,
            head_dim=128,
            tie_word_embeddings=False,
        )
        reference = Qwen3ForCausalLM(config)
    assert model.get_num_params() == reference.num_parameters()
    matrices = 12 * 12 * 768**2 + 50304 * 768  # the embeddings are looked up, not multiplied
    gains = 12 * (2 * 768 + 2 * 128)
    assert model.flops_per_token() == 6 * (matrices + gains) + 12 * 12 * 768 * 1024


def test_qwen3_starts_with_the_uniform_distribution():
    """At first its blocks add nothing and its head is zero. The rest is random, with gains of 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**WIDER, bias=False, architecture="qwen3"))
    idx = torch.randint(500, (2, 64))
    assert model(idx, idx)[1].item() == pytest.approx(math.log(500), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        elif "c_proj" in name or "lm_head" in name:
            assert (parameter == 0).all(), name
        else:
            std = 1.0 if "wte" in name else (3 * 64) ** -0.5
            # Five standard errors of the standard deviation.
            assert abs(parameter.std() - std) <= 5 * std / math.sqrt(2 * parameter.numel()), name


# -----------------------------------------------------------------------------
# Both


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_position_does_not_see_later_ones(architecture):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, bias=False, architecture=architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.double()
    idx = random_ids(1, 16)
    whole = logits_of_every_position(model, idx)
    beginning = logits_of_every_position(model, idx[:, :5])
    # RMSNorm and the rotation compute in float32.
    tolerance = 1e-12 if architecture == "gpt2" else 1e-5
    torch.testing.assert_close(whole[:, :5], beginning, rtol=0, atol=tolerance)


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="17 tokens are more than block_size=16"):
        GPT(GPTConfig(**SHAPE))(random_ids(1, 17))


def test_dropout_is_active_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, dropout=0.5))
    without = GPT(GPTConfig(**SHAPE, dropout=0.0))
    without.load_state_dict(model.state_dict())
    idx = random_ids(2, 16)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(without(idx)[0], without(idx)[0])
    assert torch.equal(model.eval()(idx)[0], without(idx)[0])


def test_dropout_reaches_the_embeddings_the_attention_and_both_branches():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, dropout=0.5))
    x = torch.randn(1, 16, 32)
    attention = model.transformer.h[0].attn
    for branch in (attention, model.transformer.h[0].mlp):
        zeros = (branch(x) == 0).float().mean()
        # Five standard errors of a fair coin.
        assert abs(zeros - 0.5) < 5 * 0.5 / math.sqrt(16 * 32)
    # Without the dropout of its output, attention still has that of its weights.
    attention.resid_dropout.p = 0.0
    assert not torch.equal(attention(x), attention(x))
    # Without any block, the dropout of the embeddings remains.
    model.transformer.h = torch.nn.ModuleList()
    idx = random_ids(1, 16)
    assert not torch.equal(
        logits_of_every_position(model, idx), logits_of_every_position(model, idx)
    )


# -----------------------------------------------------------------------------
# Impossible shapes


@pytest.mark.parametrize(
    "n_embd, n_head, possible",
    [(512, 12, [8, 16]), (768, 7, [6, 8]), (5, 3, [1, 5]), (5, 12, [5])],
)
def test_a_width_that_is_not_divisible_by_the_heads_is_refused(n_embd, n_head, possible):
    with pytest.raises(ValueError) as refused:
        GPTConfig(n_embd=n_embd, n_head=n_head)
    message = str(refused.value)
    assert f"n_embd={n_embd} is not divisible by n_head={n_head}; " in message
    assert message.endswith(f"use n_head={' or '.join(map(str, possible))}")
    for n in possible:
        GPTConfig(n_embd=n_embd, n_head=n)


@pytest.mark.parametrize("key", ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_sizes_below_one_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} must be at least 1, not 0"):
        GPTConfig(**{key: 0})


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture must be gpt2 or qwen3, not llama"):
        GPTConfig(architecture="llama")


@pytest.mark.parametrize("shape", [{"bias": True}, {"bias": False, "n_embd": 36, "n_head": 12}])
def test_qwen3_with_biases_or_an_odd_head_size_is_refused(shape):
    words = "qwen3 architecture needs bias=False and an even n_embd / n_head"
    with pytest.raises(ValueError, match=words):
        GPTConfig(architecture="qwen3", **shape)
