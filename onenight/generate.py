"""Text from a model, one token at a time.

read() computes the logits of the next token, penalize() and draw() choose it, and generate()
repeats them. After gpt-fast (https://github.com/meta-pytorch/gpt-fast/blob/main/generate.py).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from configurator import setting
from model import GPT, KVCache
from onenight.device import DTYPES, autocast
from onenight.tokenizer import EOT, EOT_TEXT, VOCAB_SIZE, get_encoding


@dataclass
class Sampling:
    """How the next token is chosen from the model's probabilities."""

    temperature: float = setting(
        0.8, "0 always takes the most likely token, 1 keeps the model's probabilities", low=0
    )
    top_k: int = setting(200, "sample from the k most likely tokens only; 0: from all", low=0)
    top_p: float = setting(
        1.0,
        "sample from the fewest tokens whose probabilities add up to this; 1: from all",
        above=0,
        high=1,
    )
    # arXiv:1909.05858
    repetition_penalty: float = setting(
        1.0, "above 1, for example 1.1: makes tokens already in the text less likely", above=0
    )


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    rows: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    dtype: str,
    step=None,
) -> Iterator[list[int]]:
    """Continue the prompt `rows` times at once, and yield the new ids of all samples, token by
    token.

    When the context is full, it restarts from its second half, which is read again. `dtype` is
    that of the matrix products and of the cache. `step` is the compiled model, if any; it reads one
    new token of each sample at a time, so that it sees a single shape.
    """
    device = model.lm_head.weight.device
    block_size = model.config.block_size
    generator = torch.Generator(device).manual_seed(seed)

    # ids holds the whole text of each sample: (rows, prompt + new tokens).
    prompt_end = len(prompt)
    text_end = prompt_end + max_new_tokens
    ids = torch.zeros(rows, text_end, dtype=torch.int64, device=device)
    ids[:, :prompt_end] = torch.tensor(prompt, device=device)

    slots = min(text_end, block_size) if step is None else block_size
    cache = KVCache.empty(model.config, rows, slots, DTYPES[dtype], device)
    if step is not None:
        # CUDA graphs would otherwise copy the cache for every token.
        for tensor in itertools.chain(*cache.layers):
            torch._dynamo.mark_static_address(tensor)

    # The context is ids[:, begin:end], and the token after it is drawn next.
    begin = max(0, prompt_end - block_size)
    # The tokens drawn last, (rows,). Views of ids would not do: a compiled step would depend on
    # their strides, which differ from text to text.
    last = None
    for end in range(prompt_end, text_end):
        if end == prompt_end:
            logits = prefill(model, ids[:, begin:end], cache, dtype)
        elif end - begin > block_size:
            # The context is full: keep its last half, at positions from 0 on.
            begin = end - max(1, block_size // 2)
            logits = read(model, ids[:, begin:end], 0, cache.view(rows, end - begin), dtype)
        elif step is None:
            # Attend only to the slots that are filled.
            filled = cache.view(rows, end - begin)
            logits = read(model, last[:, None], end - begin - 1, filled, dtype)
        else:
            logits = read(step, last[:, None], end - begin - 1, cache, dtype)
        logits = penalize(logits, ids[:, :end], sampling.repetition_penalty)
        last = draw(logits, sampling, generator)
        ids[:, end] = last
        yield last.tolist()


def prefill(model: GPT, ids, cache: KVCache, dtype: str):
    """Read the prompt, int64 (B, T) with equal rows, once, and copy its keys and values to all rows
    of the cache. Return the logits of the next token, (B, vocab_size)."""
    rows, n_tokens = ids.shape
    logits = read(model, ids[:1], 0, cache.view(1, n_tokens), dtype)
    for tensor in itertools.chain(*cache.layers):
        tensor[1:] = tensor[:1]
    return logits.expand(rows, -1)


def read(model, ids, begin: int, cache: KVCache, dtype: str):
    """Read ids, int64 (B, T), at positions from `begin` on, into a cache of B rows. Return the
    logits of the next token, (B, vocab_size)."""
    positions = torch.arange(begin, begin + ids.size(1), device=ids.device)
    with autocast(dtype, ids.device):
        logits, _ = model(ids, cache=cache, positions=positions)
    return logits[:, -1]


def penalize(logits, ids, penalty: float):
    """Return the logits (B, vocab_size) with those of `ids`, int64 (B, T), made less likely. A
    token that occurs several times is penalized once."""
    if penalty == 1:
        return logits
    present = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(present > 0, present / penalty, present * penalty))


def draw(logits, sampling: Sampling, generator: torch.Generator):
    """Draw one id, int64 (B,), from each row of the logits, (B, vocab_size). The ids that only pad
    the vocabulary are never drawn."""
    logits = logits[:, :VOCAB_SIZE].float()
    if sampling.temperature < 1e-37:  # less would be 0 in float32
        return logits.argmax(dim=-1)

    # top-k: keep the k largest logits
    if 0 < sampling.top_k < logits.size(1):
        smallest_kept = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)

    # temperature; without the largest logit, which could overflow at a very low temperature
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probs = (logits / sampling.temperature).softmax(dim=-1)

    # top-p: keep the largest probabilities until their sum reaches top_p
    if sampling.top_p < 1:
        descending, order = probs.sort(descending=True)
        sum_before = descending.cumsum(dim=-1) - descending
        descending = descending.masked_fill(sum_before >= sampling.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(1, order, descending)

    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def begin_document(model: GPT, dtype: str) -> str:
    """Return the beginning of a document, on one line, as the model would write it. Each call uses
    the same random numbers."""
    ids = [row[0] for row in generate(model, [EOT], 1, 60, Sampling(), seed=0, dtype=dtype)]
    document = get_encoding().decode(ids).partition(EOT_TEXT)[0]
    return " ".join(document.split())
