"""model.py: GPT-2 and Qwen3 against transformers', and the loss against torch's cross_entropy."""

import contextlib
import functools
import math
from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import model as model_module
from helpers import gpt2_of, logits_of_every_position, qwen3_names, qwen3_of
from model import CHUNK_ROWS, GPT, IGNORED, Block, GPTConfig, linear_cross_entropy

SHAPE = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embd": 32}
WIDER = {"block_size": 64, "vocab_size": 500, "n_layer": 6, "n_head": 4, "n_embd": 64}
VARIANTS = [("gpt2", True), ("gpt2", False), ("qwen3", False)]  # architecture, bias


def pair(architecture, bias):
    """Return a model and transformers' with the same weights, biases and gains, all of them random:
    GPT-2 in float64, Qwen3 in float32, as its norms compute."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, bias=bias, architecture=architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.25)
    checkpoint = {"model_args": asdict(model.config), "model": model.state_dict()}
    if architecture == "qwen3":
        return model, qwen3_of(checkpoint)
    return model.double(), gpt2_of(checkpoint).double()


def random_ids(n_rows, n_columns):
    return torch.randint(61, (n_rows, n_columns))


# -----------------------------------------------------------------------------
# The same as in transformers


@pytest.mark.parametrize("architecture, bias", VARIANTS)
def test_the_logits_are_those_of_transformers(architecture, bias):
    model, reference = pair(architecture, bias)
    idx = random_ids(2, 16)
    expected = reference(idx).logits
    assert expected.abs().max() > 1
    # Logits of at most 10 after a few hundred additions: float64 rounds at 1e-15, float32 at 6e-7.
    tolerance = 1e-12 if architecture == "gpt2" else 1e-5
    ours = logits_of_every_position(model, idx)
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
    logits, loss = model(idx)
    torch.testing.assert_close(logits, expected[:, [-1]], rtol=0, atol=tolerance)
    assert loss is None


@pytest.mark.parametrize("architecture, bias", VARIANTS)
def test_the_loss_and_the_gradients_are_those_of_transformers(architecture, bias):
    model, reference = pair(architecture, bias)
    idx = random_ids(2, 17)
    targets = idx[:, 1:].clone()
    targets[0, 3:6] = IGNORED
    logits = reference(idx[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    _, loss = model(idx[:, :-1], targets)
    # float32 rounds at 6e-8.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    if architecture == "qwen3":
        ours = qwen3_names(ours)
    # OpenAI kept these matrices as (in, out), and transformers does.
    transposed = {name for name, module in reference.named_modules() if isinstance(module, Conv1D)}
    theirs = dict(reference.named_parameters())
    for name, gradient in ours.items():
        is_transposed = name.removesuffix(".weight") in transposed
        expected = theirs[name].grad.T if is_transposed else theirs[name].grad
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


def test_the_numbers_of_parameters_and_flops_are_the_known_ones():
    with torch.device("meta"):  # shapes without memory
        gpt2 = GPT(GPTConfig(vocab_size=50257, bias=True))
        nanogpt = GPT(GPTConfig(vocab_size=50304, bias=False))
        qwen3 = GPT(GPTConfig(bias=False, n_head=6, architecture="qwen3"))
    assert gpt2.get_num_params(non_embedding=False) == 124_439_808  # as OpenAI's
    assert nanogpt.get_num_params() == 123_587_328  # nanoGPT prints "123.59M"
    matrices = 12 * 12 * 768**2 + 50304 * 768  # the embeddings are looked up, not multiplied
    gains = 12 * (2 * 768 + 2 * 128)
    assert qwen3.flops_per_token() == 6 * (matrices + gains) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("architecture, bias", VARIANTS)
def test_the_initial_weights_have_their_standard_deviations(architecture, bias):
    """nanoGPT's for GPT-2. Those of Qwen3 begin with the uniform distribution."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**WIDER, bias=bias, architecture=architecture))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith(".bias") else 1)).all(), name
            continue
        std = 0.02
        if name.endswith("c_proj.weight"):
            std = 0.02 / math.sqrt(2 * 6)
        if architecture == "qwen3":
            std = 1.0 if "wte" in name else (3 * 64) ** -0.5
            if "c_proj" in name or "lm_head" in name:
                std = 0.0
        n = parameter.numel()
        # Five standard errors of the mean and of the standard deviation of n normal numbers.
        assert abs(parameter.mean()) <= 5 * std / math.sqrt(n), name
        assert abs(parameter.std() - std) <= 5 * std / math.sqrt(2 * n), name
    if architecture == "qwen3":
        idx = torch.randint(500, (2, 64))
        assert model(idx, idx)[1].item() == pytest.approx(math.log(500), rel=1e-6)


# -----------------------------------------------------------------------------
# Dropout


def test_dropout_is_active_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, dropout=0.5))
    without = GPT(GPTConfig(**SHAPE, dropout=0.0))
    without.load_state_dict(model.state_dict())
    idx = random_ids(2, 16)
    assert not torch.equal(model(idx)[0], model(idx)[0])
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
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_qwen3_has_no_biases():
    with pytest.raises(ValueError, match="bias"):
        GPTConfig(architecture="qwen3", bias=True)


# -----------------------------------------------------------------------------
# The loss: linear_cross_entropy() against torch's cross_entropy of the whole logits

C = 16
V = 53
BFLOAT16_EPS = 2**-8  # the distance from 1 to the next bfloat16


def example(rows, ignored=None, dtype=torch.float64):
    """Return random inputs, weights and targets; those in the slice `ignored` are IGNORED."""
    torch.manual_seed(rows)
    x = torch.randn(rows, C, dtype=dtype)
    weight = torch.randn(V, C, dtype=dtype) / 2
    targets = torch.randint(V, (rows,))
    if ignored:
        targets[ignored] = IGNORED
    return x, weight, targets


def plain_cross_entropy(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=IGNORED)


def loss_and_gradients(loss_function, x, weight, targets):
    """Return the loss, and the gradients as a GradScaler scales them."""
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    loss = loss_function(x, weight, targets)
    (loss * 2.0**16).backward()
    return loss.detach(), x.grad, weight.grad


def autocast(loss_function):
    def under_autocast(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_function(*arguments)

    return under_autocast


def relative_error(value, truth):
    """Return the norm of the difference, relative to that of the truth, in float64."""
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(
    "rows, ignored",
    [
        (1, None),
        (CHUNK_ROWS + 1, slice(-1, None)),  # the whole last chunk
        (2 * CHUNK_ROWS + 77, slice(5, CHUNK_ROWS + 500)),
    ],
)
def test_loss_and_gradients_are_those_of_cross_entropy(rows, ignored):
    arguments = example(rows, ignored)
    expected = loss_and_gradients(plain_cross_entropy, *arguments)
    for ours, theirs in zip(loss_and_gradients(linear_cross_entropy, *arguments), expected):
        assert ours.dtype == torch.float64
        assert relative_error(ours, theirs) < 1e-10  # some thousand sums, each rounded at 1e-16
    x, *rest = arguments
    with torch.no_grad():
        loss = linear_cross_entropy(x.requires_grad_(), *rest)
    assert not loss.requires_grad
    assert relative_error(loss, expected[0]) < 1e-10


def test_large_logits_do_not_overflow():
    x, weight, targets = example(100)
    arguments = (x * 100, weight * 100, targets)
    expected = loss_and_gradients(plain_cross_entropy, *arguments)
    for ours, theirs in zip(loss_and_gradients(linear_cross_entropy, *arguments), expected):
        assert relative_error(ours, theirs) < 1e-10


def test_in_bfloat16_it_is_as_accurate_as_cross_entropy():
    x, weight, targets = example(16 * CHUNK_ROWS + 100, slice(0, None, 7), dtype=torch.float32)
    truth = loss_and_gradients(plain_cross_entropy, x.double(), weight.double(), targets)
    theirs = loss_and_gradients(autocast(plain_cross_entropy), x, weight, targets)
    ours = loss_and_gradients(autocast(linear_cross_entropy), x, weight, targets)
    for value, expected in zip(ours, truth):
        assert value.dtype == torch.float32
        # Inputs, logits, probabilities and products are each rounded by at most half an epsilon.
        assert relative_error(value, expected) < 2 * BFLOAT16_EPS
    for value, other, expected in zip(ours[1:], theirs[1:], truth[1:]):
        assert relative_error(value, expected) < 1.5 * relative_error(other, expected)


# -----------------------------------------------------------------------------
# Compiled


def test_traced_for_the_compiler_it_is_the_same_in_bfloat16_and_without_gradients(monkeypatch):
    trace = functools.partial(torch.compile, dynamic=False, backend="aot_eager")
    traced_softmax = trace(model_module.cross_entropy_and_gradient)
    monkeypatch.setattr(model_module, "compiled_softmax", lambda: traced_softmax)
    traced = trace(linear_cross_entropy)
    arguments = example(CHUNK_ROWS + 10, slice(0, 20), dtype=torch.float32)
    eager = loss_and_gradients(autocast(linear_cross_entropy), *arguments)
    for ours, theirs in zip(loss_and_gradients(autocast(traced), *arguments), eager):
        assert ours.dtype == torch.float32
        # The gradient of the weight is a sum over chunks, here of another size, whose products are
        # rounded to bfloat16.
        tolerance = BFLOAT16_EPS if ours.dim() else 1e-6
        assert relative_error(ours, theirs) < tolerance
    with torch.no_grad():
        assert relative_error(autocast(traced)(*arguments), eager[0]) < 1e-6


@pytest.mark.parametrize("architecture, bias", VARIANTS)
def test_the_compiled_graph_ends_only_where_the_loss_begins(architecture, bias):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 64}
    torch._dynamo.reset()  # forget what other tests have compiled
    model = GPT(GPTConfig(**shape, bias=bias, architecture=architecture))
    ids = torch.zeros(2, 8, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        explained = torch._dynamo.explain(model)(ids, ids)
    assert explained.graph_break_count == 1
    assert explained.break_reasons[0].user_stack[-1].name == "linear_cross_entropy"


# -----------------------------------------------------------------------------
# As a GPU will run it, traced with fake tensors under CUDA's autocast. torch's CPU build can trace
# what needs neither gradients nor indexing on a CUDA device.


@contextlib.contextmanager
def on_a_fake_gpu():
    """Make new tensors fake, on CUDA's device by default, under its autocast to bfloat16.

    torch.autocast() itself would see that there is no GPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)
            torch.clear_autocast_cache()


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("architecture, bias", VARIANTS)
def test_what_attention_reads_and_the_residual_stream_are_in_bfloat16(
    architecture, bias, monkeypatch
):
    config = GPTConfig(n_embd=32, n_head=2, bias=bias, architecture=architecture)
    with torch.device("meta"):
        block = Block(config, layer=0).requires_grad_(False)
    attended = []

    def attention(q, k, v, **_):
        attended.extend([q.dtype, k.dtype, v.dtype])
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with on_a_fake_gpu():
        block = block.to_empty(device="cuda")
        x = torch.zeros(2, 8, 32, dtype=torch.bfloat16)
        rotation = torch.zeros(2, 8, 1, 8) if config.parts.rotary_positions else None
        y = block(x, rotation)
    assert attended == [torch.bfloat16] * 3
    assert y.dtype == torch.bfloat16
