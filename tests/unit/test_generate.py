"""onenight/models/generate.py, compared with generation without a cache, and with transformers'
choice of tokens."""

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from helpers import logits_of_every_position
from model import ARCHITECTURES, GPT, GPTConfig, KVCache
from onenight.models.generate import (
    Sampling,
    draw,
    draw_uniforms,
    generate,
    pack_matrices,
    penalize,
    read,
)
from onenight.system.device import autocast, supports_bfloat16

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)


def plain_sampling(temperature=1.0, top_k=0, top_p=1.0):
    """Return a Sampling that draws from the model's own probabilities except where given."""
    return Sampling(temperature, top_k, top_p)


def make_model(block_size, architecture="gpt2"):
    """Return an untrained model with larger weights than usual, so that its predictions are clear
    and depend on the positions."""
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=block_size,
        vocab_size=300,
        n_layer=3,
        n_head=4,
        n_embd=64,
        bias=architecture == "gpt2",
        architecture=architecture,
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if architecture == "gpt2":
                parameter.mul_(6)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
        if architecture == "gpt2":
            model.transformer.wpe.weight.mul_(4)
    return model


def generated(model, prompt, uniforms, sampling=GREEDY, step=None):
    """Return the list of new ids of each sample."""
    tokens = generate(model, prompt, uniforms, sampling, "float32", step)
    return [list(sample) for sample in zip(*tokens)]


@torch.no_grad()
def greedy_without_cache(model, prompt, n_tokens):
    """Return the ids of greedy generation with the plain forward pass, and the smallest difference
    between the two largest logits."""
    block_size = model.config.block_size
    ids = list(prompt)
    begin = max(0, len(ids) - block_size)
    margin = float("inf")
    for _ in range(n_tokens):
        if len(ids) - begin > block_size:
            begin = len(ids) - max(1, block_size // 2)
        logits, _ = model(torch.tensor([ids[begin:]]))
        largest = logits[0, -1].topk(2)
        margin = min(margin, (largest.values[0] - largest.values[1]).item())
        ids.append(largest.indices[0].item())
    return ids[-n_tokens:], margin


class Recorder:
    """A model that records the shapes of its calls: rows, tokens, cache rows, cache slots."""

    def __init__(self, model):
        self.model = model
        self.config = model.config
        self.lm_head = model.lm_head
        self.calls = []

    def __call__(self, ids, cache, positions):
        keys, _ = cache.layers[0]
        self.calls.append((*ids.shape, keys.size(0), keys.size(2)))
        return self.model(ids, cache=cache, positions=positions)


# ---- generate()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_generation_of_1000_tokens_is_the_same_with_and_without_the_cache(architecture):
    model = make_model(block_size=1024, architecture=architecture)
    prompt = [1, 2, 3]
    (text,) = generated(model, prompt, draw_uniforms(0, range(1), 1000))
    assert len(text) == 1000
    assert len(set(text)) > 50  # it is not a loop
    # The plain forward pass reads the whole text at once, and predicts each token of it.
    logits = logits_of_every_position(model, torch.tensor([prompt + text]))[0, 2:-1]
    first, second = logits.topk(2).values.T
    # Sums of a few hundred float32 numbers of size 10 depend on their order in the fifth digit.
    assert (first - second).min() > 1e-4
    assert logits.argmax(-1).tolist() == text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block_size, prompt_tokens", [(16, 5), (16, 16), (15, 40), (1, 1), (2, 3)])
def test_a_full_context_continues_from_its_last_half(block_size, prompt_tokens, architecture):
    model = make_model(block_size, architecture)
    prompt = list(range(prompt_tokens))
    expected, _ = greedy_without_cache(model, prompt, 60)
    assert generated(model, prompt, draw_uniforms(0, range(2), 60)) == [expected, expected]


def test_the_prompt_is_read_once_for_all_samples():
    model = Recorder(make_model(block_size=32))
    generated(model, [1, 2, 3], draw_uniforms(0, range(4), 10), plain_sampling())
    assert model.calls == [(1, 3, 1, 3)] + [(4, 1, 4, slots) for slots in range(4, 13)]


def test_a_full_context_is_read_again_in_one_call():
    model = Recorder(make_model(block_size=32))
    generated(model, [1, 2, 3], draw_uniforms(0, range(4), 50), plain_sampling())
    longer_calls = [call for call in model.calls if call[1] > 1]
    assert longer_calls == [(1, 3, 1, 3), (4, 16, 4, 16), (4, 16, 4, 16)]


def test_a_sample_is_the_same_alone_and_among_others():
    model = make_model(block_size=32)
    together = generated(model, [1, 2, 3], draw_uniforms(7, range(5), 80), plain_sampling())
    alone = []
    for number in range(5):
        uniforms = draw_uniforms(7, range(number, number + 1), 80)
        alone += generated(model, [1, 2, 3], uniforms, plain_sampling())
    assert alone == together
    assert len({tuple(sample) for sample in together}) == 5


def test_a_compiled_step_sees_a_single_shape_and_gives_the_same_text():
    model = make_model(block_size=32)
    uniforms = draw_uniforms(0, range(2), 80)
    expected = generated(model, [1, 2, 3], uniforms, plain_sampling())
    step = Recorder(model)
    assert generated(model, [1, 2, 3], uniforms, plain_sampling(), step) == expected
    assert set(step.calls) == {(2, 1, 2, 32)}
    # Dynamo traces the model; the "eager" backend skips the compilation to machine code.
    compiled = torch.compile(model, backend="eager", dynamic=False, fullgraph=True)
    assert generated(model, [1, 2, 3], uniforms, plain_sampling(), compiled) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_matrices_give_the_same_text_without_a_second_copy(architecture):
    if not supports_bfloat16(CPU):
        pytest.skip("oneDNN does not pack matrices on a CPU without AVX-512")
    model = make_model(block_size=64, architecture=architecture)
    expected, margin = greedy_without_cache(model, [1, 2, 3], 80)
    assert margin > 1e-4  # sums in another order differ by less
    numbers_before = sum(parameter.numel() for parameter in model.parameters())
    pack_matrices(model, rows=2)
    assert sum(parameter.numel() for parameter in model.parameters()) < numbers_before / 2
    assert generated(model, [1, 2, 3], draw_uniforms(0, range(2), 80)) == [expected, expected]


def test_bfloat16_works_where_autocast_makes_norms_float32(monkeypatch):
    """CUDA's autocast does so from torch 2.12 on. The cache takes keys in its own type only."""
    rms_norm = torch.nn.functional.rms_norm

    def rms_norm_of_cuda(x, *arguments):
        result = rms_norm(x, *arguments)
        return result.float() if torch.is_autocast_enabled("cpu") else result

    monkeypatch.setattr("torch.nn.functional.rms_norm", rms_norm_of_cuda)
    model = make_model(block_size=32, architecture="qwen3")
    tokens = list(generate(model, [1, 2, 3], torch.zeros(1, 3), GREEDY, "bfloat16"))
    assert len(tokens) == 3


def test_logits_in_bfloat16_are_the_same_with_and_without_the_cache():
    model = make_model(block_size=32)
    cache = KVCache.empty(model.config, 2, 32, torch.bfloat16, CPU)
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        read(model, ids[:, :8], 0, cache, "bfloat16")
        logits = read(model, ids[:, 8:], 8, cache, "bfloat16")
        with autocast("bfloat16", CPU):
            expected = model(ids)[0][:, -1]
    # bfloat16 has 8 significant bits; the largest logits are of size 20.
    assert (logits - expected).float().std() < 0.1 * expected.float().std()


# ---- draw(), penalize() and draw_uniforms()


@pytest.mark.parametrize(
    "case",
    [
        plain_sampling(),
        plain_sampling(temperature=0.7),
        plain_sampling(temperature=1e-3, top_k=2),
        plain_sampling(top_k=1),
        plain_sampling(top_k=7),
        plain_sampling(top_k=1000),
        plain_sampling(top_p=0.8),
        plain_sampling(top_p=1e-9),
        plain_sampling(temperature=1.5, top_k=20, top_p=0.6),
        Sampling(),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_transformers_probabilities(case):
    """With evenly spaced numbers, each token must be drawn as often as its probability says, give
    or take one."""
    torch.manual_seed(0)
    n = 20_000
    logits = 3 * torch.randn(1, 50)
    processors = LogitsProcessorList([logits_process.TemperatureLogitsWarper(case.temperature)])
    if case.top_k:
        processors.append(logits_process.TopKLogitsWarper(case.top_k))
    if case.top_p < 1:
        processors.append(logits_process.TopPLogitsWarper(case.top_p))
    probs = processors(None, logits.double()).softmax(dim=-1)[0]

    evenly_spaced = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = draw(logits.expand(n, -1), evenly_spaced, case).bincount(minlength=50)
    tolerance = 1 + 1e-6 * n  # draw() starts from float32 logits
    assert ((counts - n * probs).abs() <= tolerance).all()
    assert not counts[probs == 0].any()


def test_the_smallest_and_largest_random_numbers_draw_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 5.0, 1.0]]).expand(2, -1)
    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, extremes, plain_sampling()).tolist() == [1, 3]
    assert draw(logits, extremes, plain_sampling(top_k=2)).tolist() == [2, 3]
    assert draw(logits, extremes, plain_sampling(temperature=1e-320)).tolist() == [2, 2]
    assert draw(logits, extremes, plain_sampling(top_p=0.9)).tolist() == [2, 2]


def test_ids_that_pad_the_vocabulary_are_never_drawn():
    logits = torch.zeros(100, 50304)
    logits[:, 50257:] = 50.0
    uniforms = draw_uniforms(0, range(100), 1)[:, 0]
    for case in (GREEDY, plain_sampling(), plain_sampling(top_k=3), plain_sampling(top_p=0.5)):
        assert draw(logits, uniforms, case).max() < 50257


def test_the_repetition_penalty_is_that_of_transformers():
    torch.manual_seed(0)
    logits = torch.randn(3, 40)
    ids = torch.randint(40, (3, 25))
    expected = logits_process.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.equal(penalize(logits, ids, 1.3), expected)
    assert torch.equal(penalize(logits, ids, 1.0), logits)


def test_random_numbers_depend_on_the_seed_and_the_number_of_the_sample_only():
    uniforms = draw_uniforms(3, range(10), 100)
    assert uniforms.shape == (10, 100)
    assert uniforms.dtype == torch.float64
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert torch.equal(draw_uniforms(3, range(4, 6), 50), uniforms[4:6, :50])
    other_seeds = [draw_uniforms(seed, range(10), 100) for seed in (2, 4)]
    rows = torch.cat([uniforms, *other_seeds])
    assert len(rows.unique()) == 30 * 100  # no two rows share numbers, not even shifted ones
