"""onenight/generate.py: the tokens, compared with plain forward passes and with transformers'
probabilities."""

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from model import ARCHITECTURES, GPT, GPTConfig, KVCache
from onenight.device import autocast
from onenight.generate import Sampling, begin_document, draw, generate, read
from onenight.tokenizer import EOT, VOCAB_SIZE, get_encoding

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


def generated(model, prompt, n_tokens, sampling=GREEDY, rows=2, step=None):
    """Return the list of new ids of each sample."""
    tokens = generate(model, prompt, rows, n_tokens, sampling, 0, "float32", step)
    return [list(sample) for sample in zip(*tokens)]


@torch.no_grad()
def greedy_without_cache(model, prompt, n_tokens, penalty=1.0):
    """Return the most likely ids by the plain forward pass, which reads everything again for each
    token: the whole text, or from the middle of the context on when that is full."""
    block_size = model.config.block_size
    penalize = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    ids = list(prompt)
    begin = max(0, len(ids) - block_size)
    for _ in range(n_tokens):
        if len(ids) - begin > block_size:
            begin = len(ids) - max(1, block_size // 2)
        logits, _ = model(torch.tensor([ids[begin:]]))
        ids.append(penalize(torch.tensor([ids]), logits[:, -1]).argmax().item())
    return ids[-n_tokens:]


# -----------------------------------------------------------------------------
# generate()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block_size, prompt_tokens", [(64, 3), (15, 40), (1, 1)])
def test_the_cache_gives_the_same_text_as_reading_everything_again(
    block_size, prompt_tokens, architecture
):
    model = make_model(block_size, architecture)
    prompt = list(range(prompt_tokens))
    expected = greedy_without_cache(model, prompt, 120)
    assert block_size < 15 or len(set(expected)) > 15  # it is not a loop
    assert generated(model, prompt, 120) == [expected, expected]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compiled_step_is_compiled_once_and_gives_the_same_text(architecture):
    """For texts of several lengths, wherever their caches are in memory, and beyond the context.

    The graphs are traced, but not compiled to machine code, which would take half a minute."""
    model = make_model(block_size=32, architecture=architecture)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model, backend=count, dynamic=False, fullgraph=True)
    for prompt, n_tokens in (([1, 2, 3], 50), ([4], 10), (list(range(20)), 5)):
        expected = generated(model, prompt, n_tokens, plain_sampling())
        assert generated(model, prompt, n_tokens, plain_sampling(), step=step) == expected
    assert len(graphs) == 1


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


# -----------------------------------------------------------------------------
# The choice of a token


@pytest.mark.parametrize(
    "case",
    [
        plain_sampling(),
        plain_sampling(temperature=1e-3, top_k=2),
        plain_sampling(top_k=1000),
        plain_sampling(top_p=0.8),
        plain_sampling(top_p=1e-9),
        plain_sampling(temperature=1.5, top_k=20, top_p=0.6),
        Sampling(),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_transformers_probabilities(case):
    torch.manual_seed(0)
    n = 200_000
    logits = 1.5 * torch.randn(1, 50)
    processors = LogitsProcessorList([logits_process.TemperatureLogitsWarper(case.temperature)])
    if case.top_k:
        processors.append(logits_process.TopKLogitsWarper(case.top_k))
    if case.top_p < 1:
        processors.append(logits_process.TopPLogitsWarper(case.top_p))
    probs = processors(None, logits.double()).softmax(dim=-1)[0]

    generator = torch.Generator().manual_seed(0)
    counts = draw(logits.expand(n, -1), case, generator).bincount(minlength=50)
    # Five standard deviations of a count; and none at all of what cannot be drawn.
    assert ((counts - n * probs).abs() <= 5 * (n * probs * (1 - probs)).sqrt() + 1e-6 * n).all()
    assert not counts[probs == 0].any()


@pytest.mark.parametrize("temperature", [1e-320, 1e-20])
def test_the_lowest_temperatures_take_the_most_likely_token(temperature):
    logits = torch.tensor([[-torch.inf, 1e4, 1.0, 1e4 + 1]]).expand(100, -1)
    drawn = draw(logits, plain_sampling(temperature), torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == [3]


def test_ids_that_pad_the_vocabulary_are_never_drawn():
    logits = torch.zeros(100, 50304)
    logits[:, VOCAB_SIZE:] = 50.0
    generator = torch.Generator().manual_seed(0)
    for case in (GREEDY, plain_sampling(), plain_sampling(top_k=3), plain_sampling(top_p=0.5)):
        assert draw(logits, case, generator).max() < VOCAB_SIZE


def test_the_repetition_penalty_is_that_of_transformers():
    """For all of the text, and not only what is still in the context."""
    model = make_model(block_size=16)
    (text,) = generated(model, [1, 2, 3], 60, Sampling(0, repetition_penalty=2.0), rows=1)
    assert text == greedy_without_cache(model, [1, 2, 3], 60, penalty=2.0)
    assert text != greedy_without_cache(model, [1, 2, 3], 60)


# -----------------------------------------------------------------------------
# begin_document()


def test_the_beginning_of_a_document_is_one_line_up_to_end_of_text():
    """The model has learned one document by heart: each token predicts the next one."""
    tokens = [EOT, *get_encoding().encode("Once\n\nupon \ta time")]
    config = GPTConfig(8, 50304, n_layer=1, n_head=1, n_embd=16, bias=False, architecture="qwen3")
    model = GPT(config).eval()  # at first its block adds nothing, and its head is 0
    with torch.no_grad():
        for number, token in enumerate(tokens):
            model.transformer.wte.weight[token] = torch.eye(16)[number]
            model.lm_head.weight[[*tokens, EOT][number + 1], number] = 50.0
    assert begin_document(model, "float32") == "Once upon a time"
