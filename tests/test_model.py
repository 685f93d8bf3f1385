"""model.py against transformers' GPT-2, which was written by others from OpenAI's weights."""

import math
from dataclasses import asdict

import pytest
import torch
from conftest import assert_one_sentence, gpt2_of, qwen3_names, qwen3_of, run
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D

from model import GPT, IGNORED, GPTConfig

SHAPE = dict(block_size=16, vocab_size=61, n_layer=3, n_head=4, n_embd=32)


def random_pair(bias: bool):
    """Our model and transformers', in float64, with the same weights: all random, biases and gains too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    reference = gpt2_of({"model_args": asdict(model.config), "model": model.state_dict()})
    return model.double(), reference.double()


def transposed(reference) -> set[str]:
    """The names of the matrices that transformers keeps as (in, out), as OpenAI did."""
    return {f"{name}.weight" for name, module in reference.named_modules() if isinstance(module, Conv1D)}


def reference_shapes() -> dict:
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=3, n_head=4)
    reference = GPT2LMHeadModel(config)
    turned = transposed(reference)
    return {name: p.shape[::-1] if name in turned else p.shape for name, p in reference.named_parameters()}


# ---- the mathematics


@pytest.mark.parametrize("bias", [True, False])
def test_logits_equal_transformers(bias):
    model, reference = random_pair(bias)
    idx = torch.randint(61, (2, 16))
    expected = reference(idx).logits
    # float64 rounds at 1e-16 of logits that are of size 10 at most; a few hundred additions deep
    assert expected.abs().max() > 1
    torch.testing.assert_close(model.lm_head(model.hidden(idx)), expected, rtol=0, atol=1e-12)
    logits, loss = model(idx)
    torch.testing.assert_close(logits, expected[:, [-1], :], rtol=0, atol=1e-12)
    assert loss is None


@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_every_gradient_equal_transformers(bias):
    model, reference = random_pair(bias)
    idx = torch.randint(61, (2, 16))
    labels = idx.clone()
    labels[0, 3:6] = -100  # transformers' IGNORED; it shifts the labels itself
    targets = torch.full_like(idx, IGNORED)
    targets[:, :-1] = labels[:, 1:].masked_fill(labels[:, 1:] == -100, IGNORED)
    expected = reference(idx, labels=labels).loss
    _, loss = model(idx, targets)
    # transformers takes the loss in float32, which rounds at 6e-8
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = grads[name].T if name in transposed(reference) else grads[name]
        assert (parameter.grad - grad).norm() <= 1e-5 * grad.norm(), name


# ---- the qwen3 architecture


def qwen3_pair():
    """Our model and transformers' Qwen3, in float32 as its norms are, with the same random weights."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, bias=False, architecture="qwen3"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, qwen3_of({"model_args": asdict(model.config), "model": model.state_dict()})


def test_qwen3_logits_equal_transformers():
    model, reference = qwen3_pair()
    idx = torch.randint(61, (2, 16))
    expected = reference(idx).logits
    assert expected.abs().max() > 5
    # float32 rounds at 6e-8 of logits of size 10, some hundred additions deep
    torch.testing.assert_close(model.lm_head(model.hidden(idx)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(idx)[0], expected[:, [-1]], rtol=0, atol=1e-5)


def test_qwen3_loss_and_every_gradient_equal_transformers():
    model, reference = qwen3_pair()
    idx = torch.randint(61, (2, 17))
    expected = torch.nn.functional.cross_entropy(reference(idx[:, :-1]).logits.flatten(0, 1), idx[:, 1:].flatten())
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    ours = qwen3_names({name: p.grad for name, p in model.named_parameters()})
    assert ours.keys() == dict(reference.named_parameters()).keys()
    for name, parameter in reference.named_parameters():
        assert (ours[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_qwen3_starts_as_the_uniform_guess():
    """Its blocks add nothing, and its head is zero; the rest is random, with gains of one."""
    torch.manual_seed(0)
    shape = {"block_size": 64, "vocab_size": 500, "n_layer": 2, "n_head": 4, "n_embd": 64}
    model = GPT(GPTConfig(**shape, bias=False, architecture="qwen3"))
    idx = torch.randint(500, (2, 64))
    assert model(idx, idx)[1].item() == pytest.approx(math.log(500), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        expected = 0 if "c_proj" in name or "lm_head" in name else 1 if "wte" in name else (3 * 64) ** -0.5
        # five standard errors of the standard deviation
        assert abs(parameter.std() - expected) <= 5 * expected / math.sqrt(2 * parameter.numel()), name


def test_qwen3_has_the_known_number_of_parameters_and_flops():
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False, n_head=6, architecture="qwen3"))
        config = Qwen3Config(
            vocab_size=50304, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=6,
            num_key_value_heads=6, head_dim=128, tie_word_embeddings=False,
        )  # fmt: skip
        reference = Qwen3ForCausalLM(config)
    assert model.get_num_params() == reference.num_parameters()
    matrices = 12 * 12 * 768**2 + 50304 * 768  # the embeddings are looked up, not multiplied
    gains = 12 * (2 * 768 + 2 * 128)
    assert model.flops_per_token() == 6 * (matrices + gains) + 12 * 12 * 768 * 1024


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one():
    model, _ = random_pair(bias=True)
    idx = torch.randint(61, (1, 16))
    torch.testing.assert_close(model.hidden(idx)[:, :5], model.hidden(idx[:, :5]), rtol=0, atol=1e-12)


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="17 tokens are more than block_size=16"):
        GPT(GPTConfig(**SHAPE))(torch.zeros(1, 17, dtype=torch.long))


# ---- the parameters


def test_names_and_shapes_are_gpt2s():
    shapes = reference_shapes()
    model = GPT(GPTConfig(**SHAPE, bias=True))
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    model = GPT(GPTConfig(**SHAPE, bias=False))
    without = {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}
    assert {name: p.shape for name, p in model.named_parameters()} == without
    assert set(model.state_dict()) == set(without) | {"lm_head.weight"}  # which nanoGPT saves as well


def test_embedding_and_head_are_one_matrix():
    model = GPT(GPTConfig(**SHAPE))
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("bias", [True, False])
def test_initialisation_is_nanogpts(bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=6, n_head=4, n_embd=64, bias=bias))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 6) if name.endswith("c_proj.weight") else 0.02
            n = parameter.numel()
            # five standard errors of the mean and of the standard deviation of n normal numbers
            assert abs(parameter.mean()) < 5 * std / math.sqrt(n), name
            assert abs(parameter.std() - std) < 5 * std / math.sqrt(2 * n), name


def test_gpt2_has_the_known_number_of_parameters():
    with torch.device("meta"):  # shapes without memory
        gpt2 = GPT(GPTConfig(vocab_size=50257, bias=True))
        ours = GPT(GPTConfig(vocab_size=50304, bias=False))
        reference = GPT2LMHeadModel(GPT2Config())
    assert gpt2.get_num_params(non_embedding=False) == reference.num_parameters() == 124_439_808
    matrices = 50304 * 768 + 12 * (3 + 1 + 4 + 4) * 768 * 768
    vectors = (2 * 12 + 1) * 768  # the layer norms' gains
    assert ours.get_num_params() == matrices + vectors == 123_587_328  # nanoGPT prints "123.59M"


# ---- dropout


def test_dropout_is_active_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, dropout=0.5))
    without = GPT(GPTConfig(**SHAPE, dropout=0.0))
    without.load_state_dict(model.state_dict())
    idx = torch.randint(61, (2, 16))
    assert not torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(without(idx)[0], without(idx)[0])
    assert torch.equal(model.eval()(idx)[0], without(idx)[0])


def test_dropout_reaches_the_embeddings_the_attention_and_both_branches():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, dropout=0.5))
    x = torch.randn(1, 16, 32)
    for part in (model.transformer.h[0].attn, model.transformer.h[0].mlp):
        share = (part(x) == 0).float().mean()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(16 * 32)  # five standard errors of a fair coin
    block = model.transformer.h[0].attn
    block.resid_dropout.p = 0.0  # what is left is the dropout of the attention weights
    assert not torch.equal(block(x), block(x))
    model.transformer.h = torch.nn.ModuleList()  # and here that of the embeddings
    idx = torch.randint(61, (1, 16))
    assert not torch.equal(model.hidden(idx), model.hidden(idx))


# ---- shapes that cannot be


@pytest.mark.parametrize("n_embd, n_head, heads", [(512, 12, [8, 16]), (768, 7, [6, 8]), (5, 3, [1, 5]), (5, 12, [5])])
def test_a_width_that_the_heads_do_not_divide_is_refused_with_the_nearest(n_embd, n_head, heads):
    with pytest.raises(ValueError) as refused:
        GPTConfig(n_embd=n_embd, n_head=n_head)
    message = str(refused.value)
    assert f"n_embd={n_embd} cannot be split into n_head={n_head} equal heads" in message
    assert f"n_head={' or '.join(map(str, heads))} would do" in message
    for n in heads:
        GPTConfig(n_embd=n_embd, n_head=n)


@pytest.mark.parametrize("key", ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_sizes_below_one_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} must be at least 1, not 0"):
        GPTConfig(**{key: 0})


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture must be gpt2 or qwen3, not llama"):
        GPTConfig(architecture="llama")


def test_qwen3_has_no_biases():
    with pytest.raises(ValueError, match="qwen3 architecture needs bias=False"):
        GPTConfig(architecture="qwen3", bias=True)


def test_an_impossible_width_is_one_sentence(tmp_path):
    refused = run("train.py", "--n_embd=512", "--n_head=12", cwd=tmp_path)
    assert_one_sentence(refused, "n_embd=512 cannot be split into n_head=12")
