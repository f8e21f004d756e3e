"""Several ranks, started for real: the self-check, bad arguments on one rank, sub-communicators, a rank that dies.

What is common to all ranks is tested on one, in this process.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from processes import search_path

import batchnorm as bn

pytest.importorskip("mpi4py")
from mpi4py import MPI

from batchnorm.mpi import SyncBatchNorm

EXAMPLES = Path(__file__).parents[1] / "examples"
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))

OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""What Open MPI does not do unless it is told to: more ranks than processors, also as root in a container."""

needs_mpiexec = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec; `pip install mpich` has one")

pytestmark = pytest.mark.once  # processes of their own choose their level themselves


def run(ranks, *arguments, timeout=120):
    command = [MPIEXEC, "-n", str(ranks), sys.executable, *arguments]
    environment = os.environ | {"BATCHNORM_NUM_THREADS": "1"} | OPEN_MPI
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def program(tmp_path, text):
    path = tmp_path / "program.py"
    path.write_text(
        "import os\nimport numpy as np\nfrom mpi4py import MPI\nfrom batchnorm.mpi import SyncBatchNorm\n"
        "comm = MPI.COMM_WORLD\nrank, ranks = comm.rank, comm.size\n"
        # One write per line, or the lines of ranks get mixed.
        "def say(*words): os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n" + textwrap.dedent(text)
    )
    return str(path)


@needs_mpiexec
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_self_check(ranks):
    done = run(ranks, "-m", "batchnorm.mpi")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SyncBatchNorm on {ranks} ranks" in done.stdout
    assert done.stdout.count("  same\n") == 13
    assert "no lines over" in done.stdout


@needs_mpiexec
@pytest.mark.parametrize(
    "numbers", [range(1, 10), pytest.param([16, 33], marks=pytest.mark.slow)], ids=["to 9", "to 33"]
)
def test_so_many_ranks_have_the_same_bits(tmp_path, numbers):
    """Those of one process that merges the parts of all, by either way; whatever counts, and if some have nothing."""
    path = program(
        tmp_path,
        f"""
        import batchnorm as bn
        for number in {list(numbers)}:
            few = comm.Split(int(rank < number))
            if rank >= number:
                continue
            rng = np.random.default_rng(rank)
            samples = (5 * rank + 2) % 7
            x, dy = rng.standard_normal((2, samples, 3, 4)) + 9
            for dtype, selects in (
                ("f8", {{}}),
                ("f4", {{"mask": rng.random((samples, 4)) < 0.5}}),
                ("f4", {{"lengths": rng.integers(0, 5, samples)}}),
                ("f8", {{"weights": rng.random((samples, 4)) + 1e-9}}),
                ("f2", {{}}),
            ):
                own, own_dy = x.astype(dtype), dy.astype(dtype)
                layer = SyncBatchNorm(3, few, dtype="f8", reduce="sum", momentum=1, unbiased=False)
                layer(own, **selects)
                layer.backward(own_dy)
                moments = bn.Moments.merge_all(few.allgather(bn.Moments.of(own, **selects)))
                saved = bn.forward(own, moments=moments, **selects)[1]
                dbeta = bn.GradientSums.merge_all(few.allgather(bn.grad_sums(own_dy, saved))).sum_dy
                expected = moments.mean, moments.var(), dbeta
                for got, wanted in zip((layer.running_mean, layer.running_var, layer.dbeta), expected):
                    assert got.tobytes() == wanted.tobytes(), (number, dtype, list(selects))
                assert len(set(few.allgather(layer.dgamma.tobytes()))) == 1
            if rank == 0:
                say("same on", number)
        """,
    )
    done = run(max(numbers), path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split("\n")[:-1] == [f"same on {number}" for number in numbers]


@needs_mpiexec
def test_messages_of_the_program_stay_its_own(tmp_path):
    """A receive that takes anything from anybody is open during a step."""
    path = program(
        tmp_path,
        """
        from batchnorm.mpi import exchange
        exchange.GATHERED = 1
        own = comm.Dup()
        box = np.zeros(1)
        request = own.Irecv(box, MPI.ANY_SOURCE, MPI.ANY_TAG)
        layer = SyncBatchNorm(2, own, momentum=1, dtype="f8")
        layer(np.full((3, 2), float(rank)))
        layer.backward(np.ones((3, 2)))
        assert not request.Test()
        assert layer.running_mean.tolist() == [0.5, 0.5]
        comm.Barrier()
        own.Send(np.full(1, 7.0 + rank), (rank + 1) % ranks)
        request.Wait()
        assert box[0] == 7 + (rank - 1) % ranks
        say("done")
        """,
    )
    done = run(2, "-m", "mpi4py", path)
    assert done.stdout.split() == ["done"] * 2, done.stdout + done.stderr


@needs_mpiexec
def test_copies_share_the_ranks(tmp_path):
    """Also pickles, where mpi4py can name the ranks, as it can COMM_WORLD; and after messages have been sent."""
    path = program(
        tmp_path,
        """
        import copy, pickle
        from batchnorm.mpi import exchange
        exchange.GATHERED = 1
        layer = SyncBatchNorm(1, momentum=1, dtype="f8")
        layer(np.full((2, 1), float(rank)))
        for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.comm == comm
            other(np.full((2, 1), float(rank) + 1))
            assert other.running_mean == 1.5 and layer.running_mean == 0.5
        say("done")
        """,
    )
    done = run(2, "-m", "mpi4py", path)
    assert done.stdout.split() == ["done"] * 2, done.stdout + done.stderr


@needs_mpiexec
@pytest.mark.slow
def test_communicators_come_and_go(tmp_path):
    """More of them than MPICH has at once: what a layer makes of one is freed with it."""
    path = program(
        tmp_path,
        """
        from batchnorm.mpi import exchange
        exchange.GATHERED = 1
        for _ in range(2100):
            few = comm.Dup()
            layers = [SyncBatchNorm(1, few) for _ in range(2)]
            for layer in layers:
                layer(np.ones((2, 1)))
            few.Free()
        say("done")
        """,
    )
    done = run(2, "-m", "mpi4py", path)
    assert done.stdout.split() == ["done"] * 2, done.stdout + done.stderr


@needs_mpiexec
def test_another_number_of_ranks_goes_on_from_a_file(tmp_path):
    """The running statistics are those of one process that saw all batches, to rounding; and the same on all ranks."""
    path = program(
        tmp_path,
        """
        import sys
        file, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        layer = SyncBatchNorm.load(file, comm=comm) if first else SyncBatchNorm(3, dtype="f8")
        for step in range(first, last):
            x = np.random.default_rng(step).standard_normal((25, 3, 4)) + 1e3
            layer(np.array_split(x, ranks)[rank])
            layer.backward(np.array_split(x, ranks)[rank])
        assert len(set(comm.allgather(layer.running_mean.tobytes() + layer.running_var.tobytes()))) == 1
        if rank == 0:
            layer.save(file)
        """,
    )
    for ranks, first, last in ((3, "0", "4"), (2, "4", "7"), (5, "7", "9")):
        done = run(ranks, path, str(tmp_path / "layer"), first, last)
        assert done.returncode == 0, done.stderr
    layer = bn.BatchNorm.load(tmp_path / "layer")
    mean, var = np.zeros(3, np.longdouble), np.ones(3, np.longdouble)
    for step in range(9):
        x = (np.random.default_rng(step).standard_normal((25, 3, 4)) + 1e3).astype(np.longdouble)
        mean, var = 0.9 * mean + 0.1 * x.mean(axis=(0, 2)), 0.9 * var + 0.1 * x.var(axis=(0, 2), ddof=1)
    assert layer.num_batches_tracked == 9
    np.testing.assert_allclose(layer.running_mean, mean.astype(float), rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, var.astype(float), rtol=1e-14)


@needs_mpiexec
def test_tangents_and_second_gradients(tmp_path):
    """As one process with the whole batch, also with weights; a wrong argument on one rank is an error on all."""
    path = program(
        tmp_path,
        """
        import batchnorm as bn
        rng = np.random.default_rng(1)
        x, dx, dy, u = rng.standard_normal((4, 12, 4, 5))
        weights = rng.random((12, 5)) * 1e3
        mine = slice(0, 1) if rank == 0 else slice(1, 7) if rank == 1 else slice(7, 12)
        numbers = rng.standard_normal((2, 4))
        for named in ({}, {"weights": weights}):
            whole, layer = bn.BatchNorm(4, dtype="f8"), SyncBatchNorm(4, dtype="f8")
            own = {name: value[mine] for name, value in named.items()}
            whole(x, **named), layer(x[mine], **own)
            expected = whole.jvp(dx, dgamma=numbers[0], dbeta=numbers[1])
            got = layer.jvp(dx[mine], dgamma=numbers[0], dbeta=numbers[1])
            assert np.allclose(got.dy, expected.dy[mine], rtol=1e-11, atol=1e-12)
            assert np.allclose(got[1:], expected[1:], rtol=1e-11, atol=1e-12)
            assert len(set(comm.allgather(got.dmean.tobytes() + got.dvar.tobytes()))) == 1
            expected = whole.double_backward(u, dy, ddgamma=numbers[0], ddbeta=numbers[1])
            got = layer.double_backward(u[mine], dy[mine], ddgamma=numbers[0], ddbeta=numbers[1])
            assert np.allclose(got.dy, expected.dy[mine], rtol=1e-11, atol=1e-12)
            assert np.allclose(got.x, expected.x[mine], rtol=1e-11, atol=1e-12)
            assert np.allclose(got.gamma, expected.gamma, rtol=1e-11, atol=1e-12)
            assert len(set(comm.allgather(got.gamma.tobytes()))) == 1
        for wrong in ({"dgamma": numbers[0][:3]}, {"dadd": dx[mine]}, {"out": np.empty(3)}):
            try:
                layer.jvp(dx[mine], **(wrong if rank == 1 else {}))
            except (ValueError if rank == 1 else RuntimeError):
                say("refused")
        layer.eval(keep_input=True)(x[mine])
        if rank == 0:
            layer.jvp(dx[mine])  # nothing is sent
        """,
    )
    done = run(3, path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["refused"] * 9


@needs_mpiexec
def test_activation_and_residual(tmp_path):
    """As one process with the whole batch; nothing is sent for them, and a wrong one is an error on all ranks."""
    path = program(
        tmp_path,
        """
        from batchnorm import BatchNorm
        rng = np.random.default_rng(1)
        x, dy, add = (rng.standard_normal((12, 4, 5)).astype("f4") for _ in range(3))
        mine = slice(4 * rank, 4 * rank + 4)
        for activation in (None, "relu", ("leaky_relu", 0.1), ("clip", -0.5, 1)):
            for residual in (None, add):
                for reduce in ("local", "sum"):
                    whole = BatchNorm(4, activation=activation)
                    layer = SyncBatchNorm(4, activation=activation, reduce=reduce)
                    for each in (whole, layer):
                        each.gamma, each.beta = [1, -1, 2, 0.5], [0.5, 0, -1, 1]
                    own = None if residual is None else residual[mine]
                    y, dx = whole(x, add=residual), whole.backward(dy)
                    np.testing.assert_allclose(layer(x[mine], add=own), y[mine], rtol=1e-5, atol=1e-6)
                    np.testing.assert_allclose(layer.backward(dy[mine]), dx[mine], rtol=1e-4, atol=1e-5)
                    got = layer.dgamma if reduce == "sum" else comm.allreduce(layer.dgamma)
                    np.testing.assert_allclose(got, whole.dgamma, rtol=1e-4, atol=1e-5)
                    assert residual is None or np.array_equal(layer.dadd, whole.dadd[mine])
                    assert residual is not None or layer.dadd is None
        layer = SyncBatchNorm(4, activation="relu")
        try:
            layer(x, add=x if rank else x[:1])
        except (ValueError, RuntimeError) as error:
            say(type(error).__name__, error)
        assert layer.num_batches_tracked == 0
        """,
    )
    done = run(3, path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ValueError add must have the shape of x" in done.stdout
    assert done.stdout.count("RuntimeError rank 0 refused its arguments") == 2


@needs_mpiexec
def test_the_self_check_sees_a_difference(tmp_path):
    """A layer that averages the variances of ranks, as others do, is detected."""
    path = program(
        tmp_path,
        """
        import sys
        from batchnorm._kernels import per_channel
        from batchnorm.mpi import check
        def averaged(lower, upper):
            counts = lower[1], upper[1]
            rows, others = (packet[4:].reshape(3, -1) for packet in (lower, upper))
            var = (rows[2] / max(counts[0], 1) + others[2] / max(counts[1], 1)) / 2
            rows[...] = (rows + others) / 2
            rows[2] = sum(counts) * var
            lower[1:4] += upper[1:4]
        per_channel.merge_moments = averaged
        sys.exit(check.main())
        """,
    )
    done = run(2, path)
    assert done.returncode != 0
    assert "WRONG" in done.stdout


@needs_mpiexec
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("3 + rank", "all ranks must agree about the layer, got SyncBatchNorm(3, axis=1"),
        ("3, eps=1e-5 * (1 + rank)", "all ranks must agree about the layer"),
        ("3, axis=1 - rank", "all ranks must agree about the layer"),
        ("3, dtype=['f4', 'f8', 'f4'][rank]", "all ranks must agree about the layer"),
        ("3 if rank else -3", "num_features must be at least 0, got -3"),
    ],
)
def test_ranks_that_disagree_all_raise(tmp_path, arguments, message):
    path = program(
        tmp_path,
        f"""
        try:
            SyncBatchNorm({arguments})
        except ValueError as error:
            say("refused", error)
        """,
    )
    done = run(3, path, timeout=30)
    assert done.stdout.count("refused") == 3, done.stdout + done.stderr
    assert message in done.stdout


@needs_mpiexec
@pytest.mark.parametrize(
    ("x", "own", "others"),
    [
        ("np.ones((4, 3 if rank != 1 else 2))", "ValueError x must have 3 channels", "RuntimeError rank 1 refused"),
        ("np.ones((4, 3), int if rank == 1 else float)", "TypeError x must have dtype", "RuntimeError rank 1 refused"),
        (
            "np.ones((4, 3), 'f2' if rank == 1 else 'f8')",
            "TypeError x must have the same dtype on all ranks, got float64 and float16, float",
            None,
        ),
        (
            "np.ones((1 if rank == 2 else 0, 3))",
            "ValueError training needs more than one value per channel on all",
            None,
        ),
    ],
)
def test_a_bad_x_on_one_rank_is_an_error_on_all(tmp_path, x, own, others):
    """Nothing has changed then: the next step is right."""
    path = program(
        tmp_path,
        f"""
        layer = SyncBatchNorm(3)
        try:
            layer({x})
        except Exception as error:
            say(type(error).__name__, error)
        assert layer.num_batches_tracked == 0 and not layer.running_mean.any()
        y = layer(np.full((2, 3), float(rank)))
        assert layer.num_batches_tracked == 1
        try:
            layer.backward(np.ones((2, 3 if rank != 1 else 4)))
        except ValueError as error:
            say("backward", error)
        except RuntimeError as error:
            say("backward", error)
        assert abs(layer.backward(np.ones((2, 3))).sum()) < 1e-9
        say("went on")
        """,
    )
    done = run(3, path, timeout=30)
    assert done.stdout.count("went on") == 3, done.stdout + done.stderr
    assert done.stdout.count(own) == (1 if others else 3), done.stdout
    assert done.stdout.count("backward dy must have the shape of x, (2, 3), got (2, 4)") == 1
    assert done.stdout.count("backward rank 1 refused its arguments") == 2
    if others:
        assert done.stdout.count(others) == 2


@needs_mpiexec
@pytest.mark.parametrize("name", ["mask", "lengths", "weights"])
def test_what_counts_on_each_rank(tmp_path, name):
    """Ranks with masks, lengths or weights of their own are one process with all of them; one rank has nothing."""
    path = program(
        tmp_path,
        f"""
        import batchnorm as bn
        rng = np.random.default_rng(4)
        x, dy = rng.standard_normal((2, 12, 3, 10)) + 50
        chosen = {{
            "mask": rng.random((12, 10)) < 0.5,
            "lengths": rng.integers(0, 11, 12),
            "weights": rng.random((12, 10)),
        }}["{name}"]
        chosen[:3] = 0
        parts = [slice(0, 3), slice(3, 4), slice(4, 12)]
        whole, layer = bn.BatchNorm(3, dtype=np.float64), SyncBatchNorm(3, dtype=np.float64, reduce="sum")
        own = parts[rank]
        for _ in range(2):
            expected = whole(x, {name}=chosen)[own], whole.backward(dy)[own]
            got = layer(x[own], {name}=chosen[own]), layer.backward(dy[own])
        pairs = [*zip(got, expected), (layer.running_var, whole.running_var), (layer.running_mean, whole.running_mean)]
        pairs += [(layer.dgamma, whole.dgamma), (layer.dbeta, whole.dbeta)]
        assert all(np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs), pairs
        layer.recalibrate([x[own]], {name}=[chosen[own]])
        whole.recalibrate([x], {name}=[chosen])
        assert np.allclose(layer.running_var, whole.running_var, rtol=1e-12)
        try:
            layer(x[own], mask=np.zeros((len(x[own]), 10)))
        except TypeError as error:
            say("refused", error)
        say("done")
        """,
    )
    done = run(3, path, timeout=60)
    assert done.stdout.count("done") == 3, done.stdout + done.stderr
    assert done.stdout.count("refused mask must have dtype bool") == 3


@needs_mpiexec
@pytest.mark.parametrize("way", [{"renorm": (1.1, 0.25)}, {"statistics": "running"}, {"update": False}], ids=str)
def test_ways_to_train(tmp_path, way):
    """As one process with the whole batch, and the same bits on all ranks; one rank has a single sample, one none."""
    path = program(
        tmp_path,
        f"""
        import batchnorm as bn
        rng = np.random.default_rng(4)
        x, dy, add = rng.standard_normal((3, 12, 3, 10)) + 2
        parts = [slice(0, 3), slice(3, 4), slice(4, 12), slice(12, 12)]
        settings = dict(dtype=np.float64, activation="relu", momentum=0.5, **{way!r})
        whole = bn.BatchNorm(3, **settings)
        kinds = ("local", "local" if "statistics" in {way!r} else "sum")
        local, summed = (SyncBatchNorm(3, reduce=reduce, **settings) for reduce in kinds)
        own = parts[rank]
        for layer in (whole, summed, local):
            layer.gamma, layer.beta = [1, 2, -3], [0, 1, 2]
        for need in (("dx", "dgamma", "dbeta", "dadd"), ("dx", "dadd", "dgamma")):
            y, dx = whole(x, add=add), whole.backward(dy, need=need)
            pairs = []
            for layer in (summed, local):
                pairs += [(layer(x[own], add=add[own]), y[own]), (layer.backward(dy[own], need=need), dx[own])]
                pairs += [(layer.dadd, whole.dadd[own])]
                pairs += [(getattr(layer, name), getattr(whole, name)) for name in ("running_mean", "running_var")]
            for name in ("dgamma", "dbeta"):
                if name in need:
                    together = comm.allreduce(getattr(local, name))
                    pairs += [(together, getattr(whole, name))]
                    pairs += [(getattr(summed, name), getattr(whole, name))] * (summed.reduce == "sum")
                else:
                    assert getattr(summed, name) is getattr(local, name) is None
            assert all(np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs), pairs
        assert len(set(comm.allgather(summed.running_var.tobytes() + summed.running_mean.tobytes()))) == 1
        assert summed.num_batches_tracked == whole.num_batches_tracked
        say("done")
        """,
    )
    done = run(4, path, timeout=60)
    assert done.stdout.count("done") == 4, done.stdout + done.stderr


def test_ways_that_several_ranks_cannot_go(tmp_path):
    message = "ghost must be None, got 4: SyncBatchNorm makes one batch of the ranks' parts"
    with pytest.raises(ValueError, match=message):
        SyncBatchNorm(3, MPI.COMM_SELF, ghost=4)
    layer = SyncBatchNorm(3, MPI.COMM_SELF, renorm=(3, 5))
    with pytest.raises(ValueError, match=message):
        layer.ghost = 4
    assert repr(layer).endswith("dtype=float32, renorm=(3.0, 5.0), reduce='local')")
    layer.save(tmp_path / "layer")
    assert repr(SyncBatchNorm.load(tmp_path / "layer", comm=MPI.COMM_SELF)) == repr(layer)
    message_of_sums = "statistics='running' needs reduce='local': with fixed statistics the backward pass sends nothing"
    with pytest.raises(ValueError, match=message_of_sums):
        SyncBatchNorm(3, MPI.COMM_SELF, reduce="sum", statistics="running", update=False)
    bn.BatchNorm(3, ghost=4).save(tmp_path / "ghost")
    with pytest.raises(ValueError, match=message):
        SyncBatchNorm.load(tmp_path / "ghost", comm=MPI.COMM_SELF)


FAULTS = {
    "an exception of its own in x.__array__": ("x = Fails(KeyError('no data'))", "KeyError", "no data"),
    "an interrupt in x.__array__": ("x = Fails(KeyboardInterrupt('by hand'))", "KeyboardInterrupt", "by hand"),
    "the end of the program in x.__array__": ("x = Fails(SystemExit('at once'))", "SystemExit", "at once"),
    "no memory for y": ("_arrays.Layout.empty = no_memory", "MemoryError", "no room"),
    "no memory for a dense x": ("_arrays.Layout.copy = no_memory; x = x[:, ::-1]", "MemoryError", "no room"),
    "another eps": ("layer.eps = -1.0", "ValueError", "eps must be finite and at least 0"),
    "out of another shape": ("out = np.empty((2, 3))", "ValueError", "out must have shape (2, 2)"),
    "out that cannot be written": ("out = np.empty((2, 2)); out.flags.writeable = False", "ValueError", "writeable"),
    "no number of threads": ("threads = 0", "ValueError", "num_threads must be between"),
}


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory):
    """What four ranks say, of which one has the faults, in one program: to start it takes a second."""
    path = program(
        tmp_path_factory.mktemp("faults"),
        f"""
        from batchnorm import _arrays
        class Fails:
            def __init__(self, error): self.error = error
            def __array__(self, dtype=None, copy=None): raise self.error
        def no_memory(*_): raise MemoryError("no room")
        def state(layer): return b"".join(np.asarray(value).tobytes() for value in layer.state_dict().values())
        good = np.arange(4.0).reshape(2, 2) + rank
        kept = _arrays.Layout.empty, _arrays.Layout.copy

        for fault, spoil in {[(fault, spoil) for fault, (spoil, *_) in FAULTS.items()]}:
            layer = SyncBatchNorm(2)
            layer(good)
            before = state(layer)
            for call in (layer, layer.backward):
                given = {{"x": good, "out": None, "threads": None, "layer": layer}}
                if rank == 2:
                    exec(spoil, globals(), given)
                try:
                    call(given["x"], out=given["out"], num_threads=given["threads"])
                except BaseException as error:
                    say(f"{{fault}}: {{type(error).__name__}} {{error}}")
                _arrays.Layout.empty, _arrays.Layout.copy = kept
                layer.eps = 1e-5
                assert state(layer) == before, fault
            layer(good)
            assert layer.num_batches_tracked == 2
            assert len(set(comm.allgather(state(layer)))) == 1
            say(f"{{fault}}: went on")
        """,
    )
    return run(4, path, timeout=120)


@needs_mpiexec
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_of_four_ranks_moves_no_layer(fault, with_faults):
    """Nor does it leave anybody waiting, in the forward pass or in the backward pass."""
    spoil, error, message = FAULTS[fault]
    said = with_faults.stdout.splitlines()
    lines = [line.removeprefix(f"{fault}: ") for line in said if line.startswith(f"{fault}: ")]
    assert lines.count("went on") == 4, with_faults.stdout + with_faults.stderr
    passes = 1 if "eps" in spoil else 2
    assert len([line for line in lines if line.startswith(error) and message in line]) == passes, lines
    assert lines.count("RuntimeError rank 2 refused its arguments; its own error says why") == 3 * passes


@needs_mpiexec
def test_sub_communicators(tmp_path):
    """Two pairs of ranks, each with a batch of its own."""
    path = program(
        tmp_path,
        """
        half = comm.Split(rank // 2)
        layer = SyncBatchNorm(1, half, dtype=np.float64)
        layer(np.array([[10.0 * (rank // 2) + rank % 2]]))
        say(rank, layer.running_mean[0])
        """,
    )
    done = run(4, path, timeout=30)
    means = dict(line.split() for line in done.stdout.splitlines())
    assert [float(means[rank]) for rank in "0123"] == pytest.approx([0.05, 0.05, 1.05, 1.05])


@needs_mpiexec
def test_recalibrating_from_the_batches_of_all_ranks(tmp_path):
    path = program(
        tmp_path,
        """
        layer = SyncBatchNorm(2, dtype=np.float64)
        data = np.random.default_rng(0).standard_normal((90, 2)) + 5
        layer.recalibrate([np.array_split(data, [4, 4, 60])[rank]])
        assert np.allclose(layer.running_mean, data.mean(axis=0), rtol=1e-14)
        assert np.allclose(layer.running_var, data.var(axis=0, ddof=1), rtol=1e-14)
        assert len(set(comm.allgather(layer.running_var.tobytes()))) == 1
        try:
            layer.recalibrate([np.ones((4, 2 + (rank == 2)))])
        except (ValueError, RuntimeError) as error:
            say("refused", error)
        """,
    )
    done = run(4, path, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused rank 2 refused its arguments") == 3
    assert "refused batches must have 2 channels, got 3" in done.stdout


@needs_mpiexec
def test_a_rank_that_dies_ends_the_others(tmp_path):
    """As documented: with `-m mpi4py` an exception on one rank ends all ranks, which would wait for it otherwise."""
    path = program(
        tmp_path,
        """
        layer = SyncBatchNorm(3)
        layer(np.ones((4, 3)))
        if rank == 1:
            raise KeyError("something else")
        layer(np.ones((4, 3)))
        """,
    )
    done = run(2, "-m", "mpi4py", path, timeout=30)
    assert done.returncode != 0
    assert "something else" in done.stderr


@needs_mpiexec
def test_a_rank_that_is_killed_ends_the_others(tmp_path):
    """Without anything: mpiexec sees it. Three of the ranks wait for a packet then."""
    path = program(
        tmp_path,
        """
        import signal
        layer = SyncBatchNorm(3)
        layer(np.ones((4, 3)))
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        layer(np.ones((4, 3)))
        say("went on")
        """,
    )
    done = run(4, path, timeout=60)
    assert done.returncode != 0
    assert "went on" not in done.stdout


@needs_mpiexec
@pytest.mark.parametrize("ranks", [3, 4])
def test_the_example_is_the_single_process_step_by_step(ranks):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    done = run(ranks, "-W", "error", "-m", "mpi4py", str(EXAMPLES / "digits_mpi.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()][1:]
    assert len(rows) == 5
    assert all(float(row[-1]) < 1e-12 for row in rows)
    assert float(rows[-1][-1]) > 0
    assert float(rows[-1][2]) > 95


@needs_mpiexec
def test_adding_up_twice_is_seen_by_the_example(tmp_path):
    """Gradients of gamma and beta that are summed already, and summed again: the comparison must notice."""
    pytest.importorskip("sklearn")
    text = (
        (EXAMPLES / "digits_mpi.py")
        .read_text()
        .replace("dtype=np.float64)\n        self.param", "dtype=np.float64, reduce='sum')\n        self.param")
    )
    assert "reduce='sum'" in text
    (tmp_path / "wrong.py").write_text(text)
    shutil.copy(EXAMPLES / "digits.py", tmp_path)
    assert run(2, "-m", "mpi4py", str(tmp_path / "wrong.py")).returncode != 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="reduce must be 'local' or 'sum', got 'mean'"):
        SyncBatchNorm(3, MPI.COMM_SELF, reduce="mean")
    layer = SyncBatchNorm(3, MPI.COMM_SELF)
    with pytest.raises(ValueError, match="training needs more than one value per channel, got x of shape"):
        layer(np.ones((1, 3)))
    with pytest.raises(RuntimeError, match="backward needs a call"):
        layer.backward(np.ones((1, 3)))
    assert repr(layer) == (
        "SyncBatchNorm(3, axis=1, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, dtype=float32, "
        "reduce='local')"
    )


def test_without_mpi4py_it_says_what_is_missing(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no mpi4py')\n")
    code = "from batchnorm.mpi import SyncBatchNorm; SyncBatchNorm(3)"
    environment = os.environ | {"PYTHONPATH": search_path(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    install = "python -m pip install 'mpi4py>=4' mpich"
    assert done.stderr.endswith(f"ImportError: batchnorm.mpi needs mpi4py and an MPI library: {install}\n")
