"""generate.py against generation without a cache, and against transformers' choice of tokens."""

from onenight.device import autocast
from onenight.generate import Sampling, draw, draw_uniforms, generate, pack_matrices, penalize, read

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from model import ARCHITECTURES, GPT, GPTConfig, KVCache

GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True)
def one_thread():
    """More threads would only wait for one another in such small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(block_size, vocab_size=300, architecture="gpt2"):
    """An untrained model, with weights enlarged so that its predictions are clear and depend on the position."""
    torch.manual_seed(0)
    shape = {"block_size": block_size, "vocab_size": vocab_size, "n_layer": 3, "n_head": 4, "n_embd": 64}
    model = GPT(GPTConfig(**shape, bias=architecture == "gpt2", architecture=architecture)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if architecture == "gpt2":
                parameter.mul_(6)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
        if architecture == "gpt2":
            model.transformer.wpe.weight.mul_(4)
    return model


def generated(model, prompt, chance, taste=GREEDY, **how):
    """The new ids of each row of uniforms."""
    return [list(row) for row in zip(*generate(model, prompt, chance, taste, "float32", **how))]


@torch.no_grad()
def greedy_without_cache(model, ids, n_tokens):
    """The same by the plain forward pass, and the margin by which the least certain token won."""
    ids, begin, margin = list(ids), max(0, len(ids) - model.config.block_size), float("inf")
    for _ in range(n_tokens):
        if len(ids) - begin > model.config.block_size:
            begin = len(ids) - max(1, model.config.block_size // 2)
        (best, second), (first, _) = (row.tolist() for row in model(torch.tensor([ids[begin:]]))[0][0, -1].topk(2))
        margin = min(margin, best - second)
        ids.append(first)
    return ids[-n_tokens:], margin


class Watched:
    """A model that records the shapes of its calls: rows, tokens, and the rows and slots of the cache."""

    def __init__(self, model):
        self.model, self.config, self.lm_head, self.calls = model, model.config, model.lm_head, []

    def __call__(self, ids, cache, positions):
        keys, _ = cache.layers[0]
        self.calls.append((*ids.shape, keys.size(0), keys.size(2)))
        return self.model(ids, cache=cache, positions=positions)


# ---- the cache


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_with_the_cache_is_greedy_without_it_over_1000_tokens(architecture):
    model = make_model(block_size=1024, architecture=architecture)
    expected, margin = greedy_without_cache(model, [1, 2, 3], 1000)
    # float32 sums of a few hundred numbers of size 10 differ by their order in the fifth digit; and it is no loop
    assert margin > 1e-4 and len(set(expected)) > 50
    assert generated(model, [1, 2, 3], draw_uniforms(0, range(1), 1000)) == [expected]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block_size, prompt_tokens", [(16, 5), (16, 16), (15, 40), (1, 1), (2, 3)])
def test_beyond_block_size_it_continues_from_the_last_half(block_size, prompt_tokens, architecture):
    model = make_model(block_size, architecture=architecture)
    prompt = list(range(prompt_tokens))
    expected, _ = greedy_without_cache(model, prompt, 60)
    assert generated(model, prompt, draw_uniforms(0, range(2), 60)) == [expected, expected]


def test_samples_are_one_batch_after_one_prefill():
    model = Watched(make_model(block_size=32))
    generated(model, [1, 2, 3], draw_uniforms(0, range(4), 10), Sampling())
    assert model.calls == [(1, 3, 1, 3)] + [(4, 1, 4, slots) for slots in range(4, 13)]
    model.calls.clear()
    generated(model, [1, 2, 3], draw_uniforms(0, range(4), 50), Sampling())
    assert [call for call in model.calls if call[1] > 1] == [(1, 3, 1, 3), (4, 16, 4, 16), (4, 16, 4, 16)]


def test_a_sample_is_the_same_alone_and_among_others():
    model = make_model(block_size=32)
    together = generated(model, [1, 2, 3], draw_uniforms(7, range(5), 80), Sampling())
    assert [
        generated(model, [1, 2, 3], draw_uniforms(7, range(i, i + 1), 80), Sampling())[0] for i in range(5)
    ] == together
    assert len({tuple(row) for row in together}) == 5


def test_the_compiled_step_sees_one_shape_only():
    model = make_model(block_size=32)
    step = Watched(model)
    expected = generated(model, [1, 2, 3], draw_uniforms(0, range(2), 80), Sampling())
    assert generated(model, [1, 2, 3], draw_uniforms(0, range(2), 80), Sampling(), step=step) == expected
    assert set(step.calls) == {(2, 1, 2, 32)}
    compiled = torch.compile(model, backend="eager", dynamic=False, fullgraph=True)  # traced, and not made machine code
    assert generated(model, [1, 2, 3], draw_uniforms(0, range(2), 80), Sampling(), step=compiled) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_matrices_give_the_same_text(architecture):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU keeps the matrices as they are")
    model = make_model(block_size=64, architecture=architecture)
    expected, margin = greedy_without_cache(model, [1, 2, 3], 80)
    assert margin > 1e-4  # sums in another order differ by less
    before = sum(parameter.numel() for parameter in model.parameters())
    pack_matrices(model, rows=2)
    assert sum(parameter.numel() for parameter in model.parameters()) < before / 2  # no second copy
    assert generated(model, [1, 2, 3], draw_uniforms(0, range(2), 80)) == [expected, expected]


def test_in_bfloat16_where_autocast_makes_norms_float32(monkeypatch):
    """As CUDA's does from torch 2.12 on: queries and keys must come back in the type of the cache."""
    rms_norm = torch.nn.functional.rms_norm

    def as_on_cuda(x, *arguments):
        return rms_norm(x, *arguments).to(torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype)

    monkeypatch.setattr("torch.nn.functional.rms_norm", as_on_cuda)
    model = make_model(block_size=32, architecture="qwen3")
    ids = list(generate(model, [1, 2, 3], torch.zeros(1, 3), GREEDY, "bfloat16"))
    assert len(ids) == 3


def test_in_bfloat16_as_without_the_cache():
    model = make_model(block_size=32)
    cache = KVCache.empty(model.config, 2, 32, torch.bfloat16, torch.device("cpu"))
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        read(model, ids[:, :8], 0, cache, "bfloat16")
        logits = read(model, ids[:, 8:], 8, cache, "bfloat16")
        with autocast("bfloat16", ids.device):
            expected = model(ids)[0][:, -1]
    # bfloat16 has 8 bits; the largest logits are of size 20, and their errors stay under a tenth of the typical one
    assert (logits - expected).float().std() < 0.1 * expected.float().std()


# ---- the choice


@pytest.mark.parametrize(
    "taste",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1e-3, top_k=2),
        Sampling(top_k=1),
        Sampling(top_k=7),
        Sampling(top_k=1000),
        Sampling(top_p=0.8),
        Sampling(top_p=1e-9),
        Sampling(temperature=1.5, top_k=20, top_p=0.6),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_transformers_probabilities(taste):
    """Evenly spread random numbers must give each token its share, to within one."""
    torch.manual_seed(0)
    logits, n = 3 * torch.randn(1, 50), 20_000
    wanted = LogitsProcessorList([logits_process.TemperatureLogitsWarper(taste.temperature)])
    if taste.top_k:
        wanted.append(logits_process.TopKLogitsWarper(taste.top_k))
    if taste.top_p < 1:
        wanted.append(logits_process.TopPLogitsWarper(taste.top_p))
    probs = wanted(None, logits.double()).softmax(dim=-1)[0]
    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = draw(logits.expand(n, -1), even, taste).bincount(minlength=50)
    assert ((counts - n * probs).abs() <= 1 + 1e-6 * n).all()  # 1e-6: our softmax starts from float32
    assert not counts[probs == 0].any()


def test_the_extreme_random_numbers_give_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 5.0, 1.0]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, ends, Sampling()).tolist() == [1, 3]
    assert draw(logits, ends, Sampling(top_k=2)).tolist() == [2, 3]
    assert draw(logits, ends, Sampling(temperature=1e-320)).tolist() == [2, 2]
    assert draw(logits, ends, Sampling(top_p=0.9)).tolist() == [2, 2]


def test_padding_is_never_drawn():
    logits = torch.zeros(100, 50304)
    logits[:, 50257:] = 50.0
    for taste in (GREEDY, Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)):
        assert draw(logits, draw_uniforms(0, range(100), 1)[:, 0], taste).max() < 50257


def test_the_repetition_penalty_is_transformers():
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 40), torch.randint(40, (3, 25))
    expected = logits_process.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.equal(penalize(logits, ids, 1.3), expected)
    assert torch.equal(penalize(logits, ids, 1.0), logits)


def test_uniforms_are_uniform_and_independent():
    chance = draw_uniforms(3, range(10), 10_000)
    assert chance.dtype == torch.float64 and chance.min() >= 0 and chance.max() < 1
    # five standard errors of the mean of 100,000, and of its square
    assert abs(chance.mean() - 1 / 2) < 5 * (1 / 12 / 100_000) ** 0.5
    assert abs((chance**2).mean() - 1 / 3) < 5 * (4 / 45 / 100_000) ** 0.5
    assert torch.equal(draw_uniforms(3, range(4, 6), 100), chance[4:6, :100])
    others = torch.cat([chance[:, 0], draw_uniforms(4, range(10), 1)[:, 0], draw_uniforms(2, range(10), 1)[:, 0]])
    assert len(others.unique()) == 30  # seeds that are neighbours share nothing
