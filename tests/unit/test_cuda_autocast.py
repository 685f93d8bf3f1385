"""The model as a GPU will run it, traced with fake tensors: CUDA's autocast, and where the compiled
graph ends.

torch's CPU build can trace what needs neither gradients nor indexing on a CUDA device: the blocks,
and the products of the head. benchmarks/roofline/ does the rest.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import configure
from helpers import ROOT
from model import GPT, Block, GPTConfig, add_product
from onenight.training.settings import TrainConfig

CONFIGS = [f"config/{path.name}" for path in sorted(ROOT.glob("config/*.py"))]
NARROW = torch.bfloat16
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@contextlib.contextmanager
def on_a_fake_gpu():
    """Make new tensors fake, on CUDA's device by default, under its autocast to bfloat16.

    torch.autocast() itself would see that there is no GPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        torch.set_autocast_dtype("cuda", NARROW)
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
@pytest.mark.parametrize("architecture, bias", [("gpt2", False), ("gpt2", True), ("qwen3", False)])
def test_everything_large_in_a_block_is_narrow(architecture, bias, monkeypatch):
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
        x = torch.zeros(2, 8, 32, dtype=NARROW)
        rotation = torch.zeros(2, 8, 1, 8) if config.parts.rotary_positions else None
        y = block(x, rotation)
    assert attended == [NARROW] * 3
    products = [formats for operator, formats in operators.calls if operator in PRODUCTS]
    assert len(products) == (5 if config.parts.gated_mlp else 4)
    assert all(formats == {NARROW} for formats in products)
    assert y.dtype == NARROW


def test_the_gradient_of_the_head_is_one_product_in_float32():
    """From factors in bfloat16. (Products with `out`, as for later chunks, cannot be traced.)"""
    with on_a_fake_gpu():
        a = torch.zeros(40, 8, dtype=NARROW)
        b = torch.zeros(8, 16, dtype=NARROW)
        with Operators() as operators:
            total = add_product(None, a, b, torch.float32)
    assert total.dtype == torch.float32
    computed = [call for call in operators.calls if call[0] is not torch.ops.prim.device.default]
    assert computed == [(torch.ops.aten.mm.dtype, {NARROW})]


@pytest.mark.parametrize("file", CONFIGS)
def test_the_compiled_graph_of_a_config_ends_only_where_the_loss_begins(file):
    shape = configure(TrainConfig, [file], None).shape
    shape |= {"n_layer": 1, "n_embd": 16 * shape["n_head"], "block_size": 8, "vocab_size": 64}
    torch._dynamo.reset()  # forget what other tests have compiled
    model = GPT(GPTConfig(**shape))
    ids = torch.zeros(2, 8, dtype=torch.long)
    with torch.autocast("cpu", NARROW):
        explained = torch._dynamo.explain(model)(ids, ids)
    assert explained.graph_break_count == 1
    assert explained.break_reasons[0].user_stack[-1].name == "linear_cross_entropy"
