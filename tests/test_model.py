"""model.py: GPT-2 and Qwen3 against transformers', and the loss against torch's cross_entropy."""

import contextlib
import functools
import math
from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D

import model as model_module
from helpers import gpt2_of, logits_of_every_position, qwen3_names, qwen3_of
from model import CHUNK_ROWS, GPT, IGNORED, Block, GPTConfig, add_product, linear_cross_entropy
from onenight.device import compile_works

SHAPE = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embd": 32}
WIDER = {"block_size": 64, "vocab_size": 500, "n_layer": 6, "n_head": 4, "n_embd": 64}
VARIANTS = [("gpt2", True), ("gpt2", False), ("qwen3", False)]  # architecture, bias


def random_model(architecture="gpt2", bias=False):
    """Return a model whose weights, biases and gains are all random."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, bias=bias, architecture=architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.25)
    return model


def pair(architecture, bias):
    """Return a model and transformers' with the same weights: GPT-2 in float64, Qwen3 in float32,
    as its norms compute."""
    model = random_model(architecture, bias)
    checkpoint = {"model_args": asdict(model.config), "model": model.state_dict()}
    if architecture == "qwen3":
        return model, qwen3_of(checkpoint)
    return model.double(), gpt2_of(checkpoint).double()


def transposed_names(reference):
    """Return the names of the matrices that transformers keeps as (in, out), as OpenAI did."""
    return {
        f"{name}.weight" for name, module in reference.named_modules() if isinstance(module, Conv1D)
    }


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
    # A position does not see later ones.
    beginning = logits_of_every_position(model, idx[:, :5])
    torch.testing.assert_close(ours[:, :5], beginning, rtol=0, atol=tolerance)


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
    transposed = transposed_names(reference)
    theirs = dict(reference.named_parameters())
    for name, gradient in ours.items():
        expected = theirs[name].grad.T if name in transposed else theirs[name].grad
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


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
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_numbers_of_parameters_and_flops_are_the_known_ones():
    with torch.device("meta"):  # shapes without memory
        gpt2 = GPT(GPTConfig(vocab_size=50257, bias=True))
        nanogpt = GPT(GPTConfig(vocab_size=50304, bias=False))
        qwen3 = GPT(GPTConfig(bias=False, n_head=6, architecture="qwen3"))
        gpt2_reference = GPT2LMHeadModel(GPT2Config())
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
        qwen3_reference = Qwen3ForCausalLM(config)
    assert gpt2.get_num_params(non_embedding=False) == gpt2_reference.num_parameters()
    assert gpt2_reference.num_parameters() == 124_439_808
    assert nanogpt.get_num_params() == 123_587_328  # nanoGPT prints "123.59M"
    assert qwen3.get_num_params() == qwen3_reference.num_parameters()
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
# Dropout, and impossible shapes


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


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="17"):
        GPT(GPTConfig(**SHAPE))(random_ids(1, 17))


@pytest.mark.parametrize(
    "shape, word",
    [
        ({"n_embd": 512, "n_head": 12}, "n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"architecture": "llama"}, "llama"),
        ({"architecture": "qwen3", "bias": True}, "bias"),
        ({"architecture": "qwen3", "bias": False, "n_embd": 36, "n_head": 12}, "n_embd"),
    ],
)
def test_an_impossible_shape_is_refused(shape, word):
    with pytest.raises(ValueError, match=word):
        GPTConfig(**shape)


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


def loss_and_gradients(loss_function, x, weight, targets, scale=1.0):
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    loss = loss_function(x, weight, targets)
    (loss * scale).backward()
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
        (CHUNK_ROWS - 1, None),
        (CHUNK_ROWS, slice(0, None, 3)),
        (CHUNK_ROWS + 1, slice(-1, None)),  # the whole last chunk
        (2 * CHUNK_ROWS + 77, None),
        (2 * CHUNK_ROWS + 77, slice(5, CHUNK_ROWS + 500)),
        (2 * CHUNK_ROWS + 77, slice(0, CHUNK_ROWS)),  # the whole first chunks
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["", "GradScaler"])
def test_loss_and_gradients_are_those_of_cross_entropy(rows, ignored, scale):
    arguments = example(rows, ignored)
    expected = loss_and_gradients(plain_cross_entropy, *arguments, scale)
    for ours, theirs in zip(loss_and_gradients(linear_cross_entropy, *arguments, scale), expected):
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


@pytest.mark.parametrize("rows", [CHUNK_ROWS, 16 * CHUNK_ROWS + 100], ids=["2 chunks", "33 chunks"])
def test_in_bfloat16_it_is_as_accurate_as_cross_entropy(rows):
    x, weight, targets = example(rows, slice(0, None, 7), dtype=torch.float32)
    truth = loss_and_gradients(plain_cross_entropy, x.double(), weight.double(), targets)
    theirs = loss_and_gradients(autocast(plain_cross_entropy), x, weight, targets)
    ours = loss_and_gradients(autocast(linear_cross_entropy), x, weight, targets)
    for value, expected in zip(ours, truth):
        assert value.dtype == torch.float32
        # Inputs, logits, probabilities and products are each rounded by at most half an epsilon.
        assert relative_error(value, expected) < 2 * BFLOAT16_EPS
    for value, other, expected in zip(ours[1:], theirs[1:], truth[1:]):
        assert relative_error(value, expected) < 1.5 * relative_error(other, expected)


def test_more_chunks_need_no_more_memory():
    """Beside their gradients, which are small here: 0.1 GB of logits, of 0.5 MB of inputs."""

    def peak_bytes(rows):
        with FakeTensorMode(), MemTracker() as tracker, torch.autocast("cpu", torch.bfloat16):
            x = torch.zeros(rows, C, requires_grad=True)
            weight = torch.zeros(50304, C, requires_grad=True)
            linear_cross_entropy(x, weight, torch.zeros(rows, dtype=torch.long))
        return max(size["Total"] for size in tracker.get_tracker_snapshot("peak").values())

    one = peak_bytes(CHUNK_ROWS // 2)
    assert one > 2e8
    assert peak_bytes(3 * CHUNK_ROWS // 2) < 1.05 * one


# -----------------------------------------------------------------------------
# Compiled


def test_compiled_the_loss_is_the_same():
    if not compile_works(torch.device("cpu")):
        pytest.skip("torch.compile does not work on this machine")
    compiled = torch.compile(linear_cross_entropy, dynamic=False)
    arguments = example(CHUNK_ROWS + 10, slice(0, 20))
    eager = loss_and_gradients(linear_cross_entropy, *arguments)
    for ours, theirs in zip(loss_and_gradients(compiled, *arguments), eager):
        assert relative_error(ours, theirs) < 1e-10


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


class Operators(TorchDispatchMode):
    """Notes each operator that computes, and the number formats that it reads."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        formats = {x.dtype for x in arguments if isinstance(x, torch.Tensor)}
        self.calls.append((operator, formats))
        return operator(*arguments, **(options or {}))


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("architecture, bias", VARIANTS)
def test_everything_large_in_a_block_is_in_bfloat16(architecture, bias, monkeypatch):
    """What attention and the other products read, and the residual stream."""
    config = GPTConfig(n_embd=32, n_head=2, bias=bias, architecture=architecture)
    with torch.device("meta"):
        block = Block(config, layer=0).requires_grad_(False)
    attended = []

    def attention(q, k, v, **_):
        attended.extend([q.dtype, k.dtype, v.dtype])
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with on_a_fake_gpu(), Operators() as operators:
        block = block.to_empty(device="cuda")
        x = torch.zeros(2, 8, 32, dtype=torch.bfloat16)
        rotation = torch.zeros(2, 8, 1, 8) if config.parts.rotary_positions else None
        y = block(x, rotation)
    assert attended == [torch.bfloat16] * 3
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    read = [formats for operator, formats in operators.calls if operator in products]
    assert read == [{torch.bfloat16}] * (5 if config.parts.gated_mlp else 4)
    assert y.dtype == torch.bfloat16


def test_the_gradient_of_the_head_is_one_product_that_sums_in_float32():
    """(Products with `out`, as for later chunks, cannot be traced.)"""
    with on_a_fake_gpu():
        a = torch.zeros(40, 8, dtype=torch.bfloat16)
        b = torch.zeros(8, 16, dtype=torch.bfloat16)
        with Operators() as operators:
            total = add_product(None, a, b, torch.float32)
    assert total.dtype == torch.float32
    computed = [call for call in operators.calls if call[0] is not torch.ops.prim.device.default]
    assert computed == [(torch.ops.aten.mm.dtype, {torch.bfloat16})]
