"""GPT-2's tokenizer as transformers has it."""

import contextlib
import json
from pathlib import Path

from configurator import UserError
from onenight.data.tokenizer import EOT, EOT_TEXT, read_ranks
from onenight.models.hf_model import import_transformers


def make_tokenizer(max_tokens: int):
    """Return transformers' GPT-2 tokenizer, for a model with a context of max_tokens.

    Its vocabulary and merges are those that OpenAI published, derived from tiktoken's ranks.
    """
    transformers = import_transformers()
    vocab = vocabulary()
    # In the order of their ids, each token of several bytes is made by one merge of two others.
    merges = []
    for token in list(vocab)[:EOT]:
        parts = split_by_last_merge(token, vocab)
        if len(parts) == 2:
            merges.append(tuple(parts))
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def vocabulary() -> dict[str, int]:
    """Return GPT-2's ids by their tokens, spelled with one visible character for each byte, as in
    vocab.json."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    vocab = {"".join(map(spelling.get, token)): rank for token, rank in read_ranks().items()}
    vocab[EOT_TEXT] = EOT
    return vocab


def split_by_last_merge(token: str, vocab: dict[str, int]) -> list[str]:
    """Return the two parts from which byte pair encoding makes the token in its last merge; a token
    of one byte has one part."""
    parts = list(token)
    while len(parts) > 2:
        # Merge the neighbors whose merge comes first: the token that they make has the lowest id.
        ids = [vocab.get(left + right, EOT) for left, right in zip(parts, parts[1:])]
        first = ids.index(min(ids))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def check_tokenizer(name: str):
    """Check that the tokenizer of a Hugging Face folder or repository, if it has one, is GPT-2's.

    Raises UserError if tokenizer.json or vocab.json has other tokens.
    """
    from transformers.utils import cached_file

    for file in ("tokenizer.json", "vocab.json"):
        with contextlib.suppress(OSError):  # there is no such file
            path = cached_file(name, file)
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            vocab = content["model"]["vocab"] if file == "tokenizer.json" else content
            # tokenizer.json may list end-of-text with the added tokens instead.
            if {EOT_TEXT: EOT, **vocab} != vocabulary():
                raise UserError(f"{name}: its {file} is not GPT-2's, which this program uses")
