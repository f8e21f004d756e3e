"""How ranks exchange packets: one tree, the same bits everywhere, few messages; with threads in place of processes."""

import itertools

import numpy as np
import pytest
from oracle import assert_close, gradient_errors, truth, ulps
from ranks import together

import batchnorm as bn
from batchnorm import _tree
from batchnorm.mpi import SyncBatchNorm, exchange
from batchnorm.mpi.exchange import Exchange

RANKS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33]


pytestmark = pytest.mark.once  # what is exchanged is merged by code that is compiled once


@pytest.fixture(params=["doubling", "Allgather"])
def way(request, monkeypatch):
    """How the packets go, whatever the number of ranks is."""
    monkeypatch.setattr(exchange, "GATHERED", 1 if request.param == "doubling" else 99)
    return request.param


def cut(ranks):
    """Where each rank's samples are: 2, 0, 5, 3, 1, 6, 4, 2, 0, … of them."""
    stops = [0, *itertools.accumulate((5 * rank + 2) % 7 for rank in range(ranks))]
    return [slice(*ends) for ends in itertools.pairwise(stops)]


# The tree.


def expressions(parts):
    """What every rank calculates, if merging is written down in place of being done."""

    def merge(lower, upper):
        lower[0] = (lower[0], upper[0])

    def program(comm):
        packet = np.array([comm.rank], object)
        Exchange(comm).merge_all(packet, merge)
        return packet[0]

    return together(parts, program)


def leaves(expression):
    return [expression] if type(expression) is int else [*leaves(expression[0]), *leaves(expression[1])]


def depth(expression):
    return 0 if type(expression) is int else 1 + max(map(depth, expression))


@pytest.mark.parametrize("parts", [*range(1, 35), 48, 63, 64, 65, 96])
def test_every_rank_evaluates_the_same_expression(parts, way):
    """In the order of ranks, no deeper than it must be, and that of a process that has all parts."""
    merged = list(range(parts))
    for lower, upper in _tree.merges(parts):
        merged[lower] = (merged[lower], merged[upper])
    assert set(expressions(parts)) == {merged[0]}
    assert leaves(merged[0]) == list(range(parts))
    assert depth(merged[0]) == (parts - 1).bit_length()


def test_the_order_is_the_documented_one():
    assert expressions(4)[0] == ((0, 1), (2, 3))
    assert expressions(5)[0] == (((0, 1), 2), (3, 4))
    assert expressions(7)[0] == (((0, 1), (2, 3)), ((4, 5), 6))


def test_no_parts_are_no_whole():
    with pytest.raises(ValueError, match="parts must hold at least one part, got none"):
        bn.Moments.merge_all([])


# The layer.


def everything(rng, n):
    return {}, np.ones((n, 4), bool), None


def masked(rng, n):
    mask = rng.random((n, 4)) < 0.6
    return {"mask": mask}, mask, None


def of_lengths(rng, n):
    lengths = rng.integers(0, 5, n)
    return {"lengths": lengths}, np.arange(4) < lengths[:, None], None


def weighted(rng, n):
    weights = rng.random((n, 4)) * 1e3
    return {"weights": weights}, np.ones((n, 4), bool), weights


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("select", [everything, masked, of_lengths, weighted])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_all_ranks_have_the_same_bits_and_the_right_numbers(ranks, select, dtype, rng):
    parts = cut(ranks)
    n = parts[-1].stop
    x, dy = ((rng.standard_normal((n, 3, 4)) + mean).astype(dtype) for mean in (5, 0.2))
    selects, counts, weights = select(rng, n)

    def program(comm):
        own = parts[comm.rank]
        layer = SyncBatchNorm(3, comm, reduce="sum", momentum=1, unbiased=False, dtype="float64")
        chosen = {name: value[own] for name, value in selects.items()}
        y, dx = layer(x[own], num_threads=1, **chosen), layer.backward(dy[own], num_threads=1)
        return y, dx, layer.dgamma, layer.dbeta, layer.running_mean.copy(), layer.running_var.copy()

    results = together(ranks, program)
    assert len({b"".join(array.tobytes() for array in held) for _, _, *held in results}) == 1
    y, dx = (np.moveaxis(np.concatenate([result[i] for result in results]), 1, -1)[counts] for i in (0, 1))
    kept_x, kept_dy = (np.moveaxis(array, 1, -1)[counts] for array in (x, dy))
    t = truth(kept_x, kept_dy, weights=None if weights is None else weights[counts])
    _, _, dgamma, dbeta, mean, var = results[0]
    if dtype == "float16":  # calculated in float32, and rounded once more
        assert max(ulps(y, t.y, t.y_terms, 1), ulps(dx, t.dx, t.dx_terms, 1)) <= 1
    else:
        of_dtype = (dx, dgamma.astype(dtype), dbeta.astype(dtype))
        errors = {"y": ulps(y, t.y, t.y_terms, 1)} | gradient_errors(bn.Gradients(*of_dtype), t, t, 1)
        assert_close(errors, dtype, times=2)
    precision = 1e-14 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(mean, t.mean.astype(float), rtol=precision)
    np.testing.assert_allclose(var, t.var.astype(float), rtol=precision)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_process_that_merges_all_parts_has_these_bits(ranks, way, rng):
    """Whichever way the packets go, also if it is a file."""
    parts = cut(ranks)
    x, dy = rng.standard_normal((2, parts[-1].stop, 5)) + 1e4
    moments = bn.Moments.merge_all(bn.Moments.of(x[own]) for own in parts)
    saved = [bn.forward(x[own], moments=moments)[1] for own in parts]
    sums = bn.GradientSums.merge_all(bn.grad_sums(dy[own], saved[rank]) for rank, own in enumerate(parts))
    expected = moments.mean.tobytes() + moments.var().tobytes() + sums.sum_dy.tobytes()

    def program(comm):
        layer = SyncBatchNorm(5, comm, reduce="sum", momentum=1, unbiased=False, dtype="float64")
        layer(x[parts[comm.rank]])
        layer.backward(dy[parts[comm.rank]])
        return layer.running_mean.tobytes() + layer.running_var.tobytes() + layer.dbeta.tobytes()

    assert set(together(ranks, program)) == {expected}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("reduce", ["local", "sum"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"bias": False, "unbiased": False},
        {"update": False},
        {"statistics": "running"},
        {"statistics": "running", "update": False},
        {"renorm": (1.1, 0.5)},
        {"renorm": (1.1, 0.5), "affine": False},
    ],
    ids=str,
)
def test_one_rank_with_samples_is_the_layer_bit_for_bit(settings, reduce, dtype, ranks, way, rng):
    """Alone, and among ranks without any."""
    if "statistics" in settings and reduce == "sum":
        pytest.skip("refused")
    settings = settings | {"dtype": "float32" if dtype == "float16" else dtype}
    x, dy = ((rng.standard_normal((3, 8, 5, 7)) + mean).astype(dtype) for mean in (2, 0))

    def results(layer, samples):
        for step in range(3):
            yield layer(x[step, :samples]), layer.backward(dy[step, :samples])
            yield from (getattr(layer, name) for name in ("dgamma", "dbeta", "running_mean", "running_var"))
            yield layer.num_batches_tracked
        yield layer.eval(keep_input=True)(x[0, :samples]), layer.backward(dy[0, :samples], need=["dx"])

    def program(comm):
        samples = 8 if comm.rank == ranks // 2 else 0
        return [
            np.array(result).tobytes() for result in results(SyncBatchNorm(5, comm, reduce=reduce, **settings), samples)
        ]

    plain = [np.array(result).tobytes() for result in results(bn.BatchNorm(5, **settings), 8)]
    assert together(ranks, program)[ranks // 2] == plain


@pytest.mark.parametrize(
    ("ranks", "messages"), [(1, 0), (2, 2), (3, 3), (6, 6), (7, 3 + 8 + 3), (8, 24), (9, 1 + 24 + 1), (16, 64)]
)
def test_messages_and_bytes_of_a_step(ranks, messages, rng):
    """Of few ranks one Allgather in each pass; of others log₂P messages, and one there and back for a leading pair."""

    def program(comm):
        layer = SyncBatchNorm(5, comm)
        x = rng.standard_normal((8, 5))
        layer(x)
        forward = list(comm.sent)
        layer.backward(x)
        backward = comm.sent[len(forward) :]
        layer.eval(keep_input=True)
        layer.backward(layer(x))
        assert len(comm.sent) == len(forward + backward)
        return forward, backward

    results = together(ranks, program)
    for place, size in enumerate((8 * (3 * 5 + 4), 8 * (2 * 5 + 1))):
        sent = [result[place] for result in results]
        assert sum(map(len, sent)) == messages
        assert {size} >= {bytes_sent for own in sent for _, bytes_sent in own}
        if 1 < ranks < 7:
            assert sent == [[("all", size)]] * ranks
        if ranks == 7:  # 0 with 1, 2 with 3 and 4 with 5 first, then 0, 2, 4 and 6 are left
            to = [[dest for dest, _ in own] for own in sent]
            assert to == [[2, 4, 1], [0], [0, 6, 3], [2], [6, 0, 5], [4], [4, 2]]


def test_a_frozen_layer_sends_nothing(rng):
    def program(comm):
        layer = SyncBatchNorm(5, comm, statistics="running", update=False)
        layer.backward(layer(rng.standard_normal((1, 5))))
        return comm.sent

    assert together(2, program) == [[], []]


def test_out_and_need(rng):
    x = rng.standard_normal((8, 5)).astype(np.float32)

    def program(comm):
        layer, out = SyncBatchNorm(5, comm), np.empty_like(x)
        strided = np.empty((8, 10), np.float32)[:, ::2]
        assert layer(x, out=out) is out
        assert np.array_equal(layer(x, out=strided), out)
        dx = layer.backward(x, need=("dx", "dbeta"), out=out)
        assert dx is out
        assert layer.dgamma is None
        assert layer.dbeta is not None
        with pytest.raises(ValueError, match="out must have shape"):
            layer(x, out=np.empty(3, np.float32))
        with pytest.raises(ValueError, match="out is for dx"):
            layer.backward(x, need=["dbeta"], out=out)
        with pytest.raises(ValueError, match="need must be one or more of the names"):
            layer.backward(x, need="d")

    assert together(2, program) == [None, None]


# Errors.


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_the_first_rank_that_refuses_is_named_on_all_others(ranks):
    wrong = {ranks - 1, ranks // 2}

    def program(comm):
        layer, said = SyncBatchNorm(3, comm), []
        for call in (layer, layer.backward):
            try:
                call(np.ones((2, 3 + (comm.rank in wrong))))
            except (RuntimeError, ValueError) as error:
                said.append(str(error))
            layer(np.ones((2, 3)))
        return *said, layer.num_batches_tracked

    for rank, (forward, backward, followed) in enumerate(together(ranks, program)):
        named = f"rank {min(wrong)} refused its arguments; its own error says why"
        assert forward == (named if rank not in wrong else "x must have 3 channels along axis 1, got shape (2, 4)")
        assert backward == (named if rank not in wrong else "dy must have the shape of x, (2, 3), got (2, 4)")
        assert followed == 2


def test_dtypes_that_differ_are_all_named():
    dtypes = ["float32", "float16", "float32", "float64", "float16"]

    def program(comm):
        SyncBatchNorm(3, comm)(np.ones((2, 3), dtypes[comm.rank]))

    for rank, error in enumerate(together(5, program)):
        assert isinstance(error, TypeError)
        assert str(error) == (
            "x must have the same dtype on all ranks, got float32 and float64 and float16, "
            f"{dtypes[rank]} on rank {rank}"
        )
