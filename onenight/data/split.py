"""Decides which tokens of a document go to val.bin.

Documents are the unit: every 200th goes to val.bin for a val_fraction of 0.005. But a document that
is longer than twice this fraction of all text would leave too little for train.bin. It is cut:
val.bin takes val_fraction of all text, and the rest is a document of train.bin.
"""

from fractions import Fraction

import numpy as np

# Documents that are not longer are never cut, and a cut leaves this much in val.bin unless that is
# more than half of all text. It is about 2,000 tokens of English: one window of block_size=1024 and
# some more.
SHORT_BYTES = 8192


def goes_to_val(number: int, val_fraction: Fraction) -> bool:
    """Return whether a document, counted from 0, goes to val.bin.

    It does if `number` * `val_fraction` reaches a new whole number: 0, 200, 400, ... for 1/200.
    """
    return number * val_fraction.numerator % val_fraction.denominator < val_fraction.numerator


def val_lengths(
    lengths: np.ndarray,
    sizes: np.ndarray,
    numbers: np.ndarray,
    totals: np.ndarray,
    val_fraction: float,
) -> np.ndarray:
    """Return how many of a row's first tokens go to val.bin: int64, shape (rows,).

    Args:
        lengths: tokens of each row, with end-of-text; 0 for a row without text.
        sizes: bytes of each row.
        numbers: the documents before each row.
        totals: the expected bytes of all text, at the time of each row.
        val_fraction: the fraction of the documents for val.bin.
    """
    exact_fraction = Fraction(str(val_fraction))  # exactly as written: 0.005 is 1/200
    is_val = [goes_to_val(number, exact_fraction) for number in numbers.tolist()]
    in_val = np.where(np.array(is_val, dtype=bool), lengths, 0)

    limits = min(2 * val_fraction, 0.5) * totals
    for row in np.flatnonzero((in_val > 0) & (sizes > SHORT_BYTES) & (sizes > limits)):
        val_bytes = min(max(val_fraction * totals[row], SHORT_BYTES), totals[row] / 2)
        # The cut is between two tokens, and both parts have at least one besides end-of-text.
        text_tokens = int(lengths[row]) - 1
        cut = int(text_tokens * val_bytes / sizes[row])
        in_val[row] = min(max(cut, 1), text_tokens - 1) if text_tokens > 1 else lengths[row]
    return in_val
