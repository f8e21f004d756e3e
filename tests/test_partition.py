"""The partition by itself: every value of a view is in one block, whatever the shape, the type and the pass.

A block is a rectangle in the N × C·S matrix that a view is, some rows of some neighbouring channels. So it is enough to
look at the cells between the edges of all blocks, and a view of 10⁹ values costs no more than its blocks.
"""

import importlib
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from shapes import VIEWS

from batchnorm import _kernels

PASSES = [
    (*passed, *selects)
    for passed, selects in product(product((1, 2, 3), (False, True)), [(False, False), (True, False), (True, True)])
]
"""How many arrays a pass goes over; whether it sums nothing, so that it may follow the memory; whether values are
selected; and whether rows are copied for that."""

KERNELS = {
    size: [importlib.import_module(f"batchnorm._kernels.float{8 * size}_{level}") for level in _kernels.available()]
    for size in (4, 8)
}

AROUND = [
    near for edge in (16, 32, 64, 128, 256, 512, 1024, 4096, 8192, 16384, 65536) for near in (edge - 1, edge, edge + 1)
]
PRIMES = [2, 3, 5, 7, 13, 31, 61, 127, 257, 509, 1031, 4093, 8191, 8209, 16411, 65537, 131071, 1000003]
MOST = 1 << 21
"""Values of a generated view."""

pytestmark = pytest.mark.once  # each test asks the kernels of every level


@st.composite
def views(draw):
    """(N, C, S), drawn in any order, so that each of them may be the long one."""
    view, left = [1, 1, 1], MOST
    for dimension in draw(st.permutations(range(3))):
        lengths = [length for length in (1, *AROUND, *PRIMES) if length <= left]
        view[dimension] = draw(
            st.one_of(st.sampled_from(lengths), st.integers(1, min(left, 300)), st.integers(1, left))
        )
        left //= view[dimension]
    return tuple(view)


def check(N, C, S, size, arrays, ordered, selected=False, copied=False):
    width = C * S
    answers = [kernels.partition((N, C, S), arrays, ordered, selected, copied) for kernels in KERNELS[size]]
    assert all(answer == answers[0] for answer in answers), "levels differ"
    channel, channels, first, rows, stride, run = np.array(answers[0], np.int64).T
    top, left = first // width, first % width
    bottom, right = top + rows, left + channels * run
    assert (channels > 0).all()
    assert (rows > 0).all()
    assert (run > 0).all()
    assert (stride == width).all()
    assert (bottom <= N).all()
    assert (right <= width).all()
    # Several rows are whole, so that the places of a block follow each other.
    assert ((rows == 1) | (run == S)).all()
    # A piece of a row belongs to one channel, several channels have their whole rows.
    assert (left // S == channel).all()
    assert np.where(channels == 1, left % S + run <= S, (left % S == 0) & (run == S)).all()
    across, down = np.unique([left, right]), np.unique([top, bottom])
    assert (across[0], across[-1], down[0], down[-1]) == (0, width, 0, N)
    # The blocks over each cell, from the changes at the corners of the blocks.
    changes = np.zeros((len(down), len(across)), np.int64)
    for rows_at, columns_at, change in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(changes, (np.searchsorted(down, rows_at), np.searchsorted(across, columns_at)), change)
    assert (changes.cumsum(0).cumsum(1)[:-1, :-1] == 1).all(), "a value is in no block, or in two"


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_every_value_is_in_one_block(view, size):
    for passed in PASSES:
        check(*view, size, *passed)


@given(views(), st.sampled_from([4, 8]))
@example((1, 1, 8192), 4)
@example((1, 1, 8193), 4)
@example((7, 16, 16), 4)
@example((8, 16, 63), 8)
@example((1, 2, 2990), 8)
@example((3, 64, 5000), 8)
@example((1, 1000003, 1), 4)
@example((1000003, 1, 1), 4)
@example((1, 1, 1000003), 8)
def test_every_value_of_any_view_is_in_one_block(view, size):
    for passed in PASSES:
        check(*view, size, *passed)


@pytest.mark.parametrize("view", [(70001, 70001, 1), (1, 1, (1 << 31) + 11)])
def test_every_one_of_more_than_an_int_counts(view):
    check(*view, size=4, arrays=2, ordered=False)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("view", [(64, 512, 1), (128, 256, 1), (256, 300, 1), (64, 32, 16)])
def test_a_matrix_that_is_worth_two_threads_has_work_for_both(view, size):
    for passed in PASSES:
        assert len(KERNELS[size][0].partition(view, *passed)) > 1


@pytest.mark.parametrize(
    "view", [(1, 576, 196), (8, 64, 196), (1, 192, 784), (3, 100, 500), (1, 1280, 49), (16, 80, 5329)]
)
def test_two_threads_share_a_step_that_sums_nothing(view):
    """OpenMP gives each thread as many of the blocks, which follow each other; that must be about as many values."""
    blocks = np.array(KERNELS[4][0].partition(view, 1, True))
    values = blocks[:, 1] * blocks[:, 3] * blocks[:, 5]
    first = values[: -(-len(values) // 2)].sum()
    assert max(first, values.sum() - first) <= 1.09 * values.sum() / 2


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("view", [(256, 1024, 1), (256, 300, 1), (1000, 768, 1), (4096, 600, 1), (256, 128, 2)])
def test_a_step_that_sums_nothing_writes_whole_rows(view, size):
    """Rows of up to 1024 columns: threads that write to the same rows share lines of the cache, and wait for them."""
    blocks = np.array(KERNELS[size][0].partition(view, 1, True))
    assert (blocks[:, 1] == view[1]).all()
    assert len(blocks) >= 2


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("arrays", [2, 3])
@pytest.mark.parametrize("view", [(64, 64, 64), (32, 195, 64), (512, 64, 100), (128, 512, 196), (16, 1024, 196)])
def test_a_sum_does_not_jump_from_one_short_row_to_the_next(view, arrays, size):
    """A block has 512 bytes or more of each row, except for the last channels."""
    blocks = np.array(KERNELS[size][0].partition(view, arrays, False))
    followed = blocks[:, 0] + blocks[:, 1] < view[1]
    assert (blocks[followed, 1] * blocks[followed, 5] * size >= 512).all()


def test_a_wrong_partition_would_be_seen(monkeypatch):
    """The check itself: a block that is lost, given twice, empty, too long or another channel's is found."""
    view = (300, 40, 20)
    right = KERNELS[4][0].partition(view, 1, False)
    channel, channels, first, rows, stride, run = right[-1]

    def answer(*partitions):
        monkeypatch.setitem(KERNELS, 4, [SimpleNamespace(partition=lambda *_, p=p: p) for p in partitions])
        check(*view, size=4, arrays=1, ordered=False)

    answer(right, right)
    for wrong in (
        right[:-1],
        [*right, right[0]],
        [*right[:-1], right[0]],
        [*right[:-1], (channel, channels, first, rows + 1, stride, run)],
        [*right[:-1], (channel, channels, first, rows, stride, run + 1)],
        [*right[:-1], (channel - 1, channels, first, rows, stride, run)],
        [*right[:-1], (channel, channels, first + 1, rows, stride, run)],
        [*right, (channel, channels, first, 0, stride, run)],
    ):
        with pytest.raises(AssertionError):
            answer(wrong)
    with pytest.raises(AssertionError, match="levels differ"):
        answer(right, right[::-1])
