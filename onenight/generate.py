"""Text from a model, token by token: read() computes what comes next, draw() chooses, and generate() repeats the two.
After gpt-fast (https://github.com/meta-pytorch/gpt-fast/blob/main/generate.py)."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from onenight.device import DTYPES, autocast
from onenight.tokenizer import EOT, EOT_TEXT, VOCAB_SIZE, get_encoding

import numpy as np
import torch

from model import GPT, KVCache


@dataclass
class Sampling:
    """How the next token is chosen. The defaults sample from the model's own probabilities."""

    temperature: float = 1.0  # 0 always takes the likeliest
    top_k: int = 0  # from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # from the fewest tokens that together have this probability
    repetition_penalty: float = 1.0  # over 1: tokens of the text so far become less likely (arXiv:1909.05858)


def draw_uniforms(seed: int, samples: range, n_tokens: int) -> torch.Tensor:
    """The random numbers that choose each token of each sample: float64 (samples, n_tokens), uniform in [0, 1). A row
    depends on the seed and the sample's number only, so that a sample is the same text alone and among others."""
    return torch.tensor(np.stack([np.random.default_rng((seed, sample)).random(n_tokens) for sample in samples]))


def pack_matrices(model: GPT, rows: int):
    """Stores the matrices in the layout in which oneDNN multiplies `rows` rows fastest, if this CPU has AVX-512: see
    benchmarks/LOG.md. Only the head keeps its plain matrix too, which may be that of the embeddings."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    multiply = torch.ops.mkldnn._linear_pointwise
    for linear in [module for module in model.modules() if isinstance(module, torch.nn.Linear)]:
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        linear.forward = lambda x, w=weight, b=linear.bias: multiply(x.to(w.dtype), w, b, "none", [], "")
        if linear is not model.lm_head:
            linear.weight = None


@torch.no_grad()
def generate(model: GPT, prompt: list[int], uniforms, sampling: Sampling, dtype: str, step=None) -> Iterator[list[int]]:
    """Continues the prompt once for each row of `uniforms`, by as many tokens as it has columns; yields the new ids of
    all rows, token by token. When the context is full, its last half is read again from position 0, which makes room.
    `step`: the compiled model, which is called with one shape only. Raises torch.OutOfMemoryError."""
    (rows, n_new), device, block_size = uniforms.shape, model.lm_head.weight.device, model.config.block_size
    uniforms = uniforms.to(device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64
    start, stop = len(prompt), len(prompt) + n_new
    ids = torch.tensor(prompt, device=device).expand(rows, -1)
    ids = torch.cat([ids, ids.new_zeros(rows, n_new)], dim=1)
    slots = min(stop, block_size) if step is None else block_size
    cache = KVCache.empty(model.config, rows, slots, DTYPES[dtype], device)
    for tensor in itertools.chain(*cache.layers) if step is not None else ():
        torch._dynamo.mark_static_address(tensor)  # or CUDA graphs would copy the cache for every token
    begin = max(0, start - block_size)  # where the context begins
    last = None  # the tokens drawn last, not a part of ids, whose strides a compiled step would be bound to
    for end in range(start, stop):
        if end == start:  # the prompt is read once for all rows
            logits = read(model, ids[:1, begin:end], 0, cache.view(1, end - begin), dtype).expand(rows, -1)
            for tensor in itertools.chain(*cache.layers):
                tensor[1:] = tensor[:1]
        elif end - begin > block_size:
            begin = end - max(1, block_size // 2)
            logits = read(model, ids[:, begin:end], 0, cache.view(rows, end - begin), dtype)
        elif step is None:
            logits = read(model, last[:, None], end - 1 - begin, cache.view(rows, end - begin), dtype)
        else:
            logits = read(step, last[:, None], end - 1 - begin, cache, dtype)
        logits = penalize(logits, ids[:, :end], sampling.repetition_penalty)
        ids[:, end] = last = draw(logits, uniforms[:, end - start], sampling)
        yield last.tolist()


def begin_document(model: GPT, dtype: str) -> str:
    """The beginning of a document, on one line, drawn with the same random numbers at each call."""
    ids = [row[0] for row in generate(model, [EOT], draw_uniforms(0, range(1), 60), Sampling(0.8, 200), dtype)]
    return " ".join(get_encoding().decode(ids).partition(EOT_TEXT)[0].split())


def read(model, ids, begin: int, cache: KVCache, dtype: str):
    """Reads ids, int64 (B, T), at positions from `begin` on, into a cache of B rows. Returns the logits of the next
    token, (B, vocab_size)."""
    with autocast(dtype, ids.device):
        logits, _ = model(ids, cache=cache, positions=torch.arange(begin, begin + ids.size(1), device=ids.device))
    return logits[:, -1]


def penalize(logits, ids, penalty: float):
    """The logits (B, vocab_size), with those of `ids`, int64 (B, T), moved away from being drawn, once each."""
    if penalty == 1:
        return logits
    present = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(present > 0, present / penalty, present * penalty))


def draw(logits, uniforms, sampling: Sampling):
    """One id for each row of logits (B, vocab_size): int64 (B,). It is the one in whose interval the row's number in
    `uniforms` (B,) falls when the probabilities are laid end to end, in the order of the ids: in that of their size,
    rounding could swap neighbours. Ids that only pad the vocabulary are never drawn."""
    logits = logits[:, :VOCAB_SIZE].float()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    ids = None
    if 0 < sampling.top_k < logits.size(1):
        ids = logits.topk(sampling.top_k).indices.sort().values
        logits = logits.gather(1, ids)
    logits = (logits - logits.amax(dim=-1, keepdim=True)).to(uniforms.dtype)
    probs = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        largest = probs.sort(descending=True).values
        enough = largest.cumsum(dim=-1) - largest >= sampling.top_p  # without this one
        probs = probs.masked_fill(probs < largest.masked_fill(enough, 1.0).amin(dim=-1, keepdim=True), 0.0)
    ends = probs.cumsum(dim=-1)
    place = torch.searchsorted(ends, uniforms[:, None] * ends[:, -1:], right=True).clamp(max=ends.size(1) - 1)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)
