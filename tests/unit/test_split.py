"""Which tokens of a document go to val.bin."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onenight.data.split import SHORT_BYTES, val_lengths


def lengths_in_val(sizes, total, val_fraction=0.005, first=0):
    """Return the result for documents of so many bytes, with 4 bytes per token."""
    sizes = np.array(sizes)
    lengths = np.where(sizes > 0, sizes // 4 + 1, 0)
    ones = (sizes > 0).astype(np.int64)
    numbers = first + np.cumsum(ones) - ones
    totals = np.full(len(sizes), float(total))
    return lengths, val_lengths(lengths, sizes, numbers, totals, val_fraction).tolist()


def test_every_200th_document_goes_to_val_as_a_whole():
    lengths, in_val = lengths_in_val([4000] * 500, total=2_000_000)
    assert [i for i, length in enumerate(in_val) if length] == [0, 200, 400]
    assert in_val[200] == lengths[200]
    # A row without text is no document.
    _, in_val = lengths_in_val([0, 0, *[400] * 201], total=80_400)
    assert [i for i, length in enumerate(in_val) if length] == [2, 202]


def test_a_document_over_twice_the_fraction_is_cut_to_the_fraction():
    total = 10_000_000
    lengths, in_val = lengths_in_val([100_000], total)
    assert in_val == lengths.tolist()
    _, in_val = lengths_in_val([100_004], total)
    assert in_val == [50_000 // 4]
    _, in_val = lengths_in_val([5_000_000], total)
    assert in_val == [50_000 // 4]
    _, in_val = lengths_in_val([5_000_000], total, first=1)
    assert in_val == [0]


def test_short_documents_are_not_cut_and_half_is_left_for_train():
    lengths, in_val = lengths_in_val([SHORT_BYTES], total=SHORT_BYTES)
    assert in_val == lengths.tolist()
    _, in_val = lengths_in_val([10 * SHORT_BYTES], total=10 * SHORT_BYTES)
    assert in_val == [SHORT_BYTES // 4]
    _, in_val = lengths_in_val([10_000], total=10_000)
    assert in_val == [1250]
    _, in_val = lengths_in_val([10_000], total=10_000, val_fraction=0.9)
    assert in_val == [1250]


@given(
    st.lists(st.integers(0, 200_000), min_size=1, max_size=8), st.sampled_from([0.005, 0.1, 0.9])
)
def test_a_cut_leaves_a_token_on_both_sides(sizes, val_fraction):
    lengths, in_val = lengths_in_val(sizes, max(sum(sizes), 1), val_fraction)
    for length, first_tokens in zip(lengths.tolist(), in_val):
        assert first_tokens in (0, length) or 1 <= first_tokens <= length - 2
