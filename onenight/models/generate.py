"""Text from a model, one token at a time.

read() computes the logits of the next token, penalize() and draw() choose it, and generate()
repeats them. After gpt-fast (https://github.com/meta-pytorch/gpt-fast/blob/main/generate.py).
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from configurator import setting
from model import GPT, KVCache
from onenight.data.tokenizer import EOT, EOT_TEXT, VOCAB_SIZE, get_encoding
from onenight.system.device import DTYPES, autocast, supports_bfloat16


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
    model: GPT, prompt: list[int], uniforms, sampling: Sampling, dtype: str, step=None
) -> Iterator[list[int]]:
    """Continue the prompt several times at once, and yield the new ids of all samples, token by
    token.

    `uniforms` is a tensor (samples, new tokens) of random numbers, as draw_uniforms() makes it.
    When the context is full, it restarts from its second half, which is read again. `dtype` is
    that of the matrix products and of the cache. `step` is the compiled model, if any; it reads one
    new token of each sample at a time, so that it sees a single shape. Raises
    torch.OutOfMemoryError.
    """
    rows, n_new = uniforms.shape
    device = model.lm_head.weight.device
    block_size = model.config.block_size
    # MPS has no float64.
    uniforms = uniforms.to(device, torch.float32 if device.type == "mps" else torch.float64)

    # ids holds the whole text of each sample: (rows, prompt + new tokens).
    prompt_end = len(prompt)
    text_end = prompt_end + n_new
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
        last = draw(logits, uniforms[:, end - prompt_end], sampling)
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


def draw(logits, uniforms, sampling: Sampling):
    """Draw one id, int64 (B,), from each row of the logits, (B, vocab_size).

    The probabilities of a row are laid end to end, in the order of their ids, and the row's number
    in `uniforms` (B,), between 0 and 1, selects the one in whose interval it falls. The order is
    not that of their size, in which rounding errors could swap two ids. The ids that only pad the
    vocabulary are never drawn.
    """
    logits = logits[:, :VOCAB_SIZE].float()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)

    # top-k: keep the k largest logits, and remember their ids
    ids = None
    if 0 < sampling.top_k < logits.size(1):
        ids = logits.topk(sampling.top_k).indices.sort().values
        logits = logits.gather(1, ids)

    # temperature; without the largest logit, which could overflow at a very low temperature
    logits = (logits - logits.amax(dim=-1, keepdim=True)).to(uniforms.dtype)
    probs = (logits / sampling.temperature).softmax(dim=-1)

    # top-p: keep the largest probabilities until their sum reaches top_p, and those equal to them
    if sampling.top_p < 1:
        descending = probs.sort(descending=True).values
        sum_before = descending.cumsum(dim=-1) - descending
        dropped = sum_before >= sampling.top_p
        smallest_kept = descending.masked_fill(dropped, 1.0).amin(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < smallest_kept, 0.0)

    # the end of each interval; the last one is their sum, which rounding or top-p makes less than 1
    ends = probs.cumsum(dim=-1)
    chosen = torch.searchsorted(ends, uniforms[:, None] * ends[:, -1:], right=True)
    chosen = chosen.clamp(max=ends.size(1) - 1)
    if ids is not None:
        chosen = ids.gather(1, chosen)
    return chosen.squeeze(1)


def draw_uniforms(seed: int, samples: range, n_tokens: int) -> torch.Tensor:
    """Return the random numbers that choose each token of each sample: float64 (samples, n_tokens),
    uniform in [0, 1).

    A row depends only on the seed and the number of the sample, so that a sample has the same text
    whether it is generated alone or with others.
    """
    rows = [np.random.default_rng((seed, sample)).random(n_tokens) for sample in samples]
    return torch.tensor(np.stack(rows))


def begin_document(model: GPT, dtype: str) -> str:
    """Return the beginning of a document, on one line, as the model would write it. Each call uses
    the same random numbers."""
    uniforms = draw_uniforms(0, range(1), 60)
    ids = [row[0] for row in generate(model, [EOT], uniforms, Sampling(), dtype)]
    document = get_encoding().decode(ids).partition(EOT_TEXT)[0]
    return " ".join(document.split())


def pack_matrices(model: GPT, rows: int):
    """Store the weights of the linear layers in the layout in which oneDNN multiplies `rows` rows
    fastest, if this CPU has AVX-512 (see benchmarks/LOG.md).

    Only the head keeps its plain matrix as well, because the embeddings may share it.
    """
    # oneDNN reports bfloat16 support for CPUs with AVX-512.
    if not supports_bfloat16(torch.device("cpu")):
        return
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for linear in linears:
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        linear.forward = functools.partial(multiply_packed, weight=packed, bias=linear.bias)
        if linear is not model.lm_head:
            linear.weight = None


def multiply_packed(x, weight, bias):
    """Return what a linear layer computes from x, with a weight in oneDNN's layout."""
    x = x.to(weight.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
