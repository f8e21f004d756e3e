"""How many threads, and why; and what a fork, a limit or a crowd of Python threads does to results: nothing."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import batchnorm as bn
from batchnorm import _dispatch, _threads

pytestmark = pytest.mark.skipif(_dispatch.kernels.openmp() == 0, reason="a serial build has no threads to choose")


@pytest.fixture
def undecided(monkeypatch):
    """No number from the environment, from an earlier call or from a quota."""
    monkeypatch.setattr(_threads, "_asked", None)
    monkeypatch.setattr(_threads, "_named_at_import", None)
    monkeypatch.setattr(_threads, "_omp_named_at_import", False)
    monkeypatch.setattr(_threads, "_quota_at_import", None)
    monkeypatch.setattr(_threads, "_processors", lambda: 6)
    monkeypatch.setattr(_threads, "_openmp_at_import", _dispatch.kernels.max_threads())


def test_who_decides(undecided, monkeypatch):
    assert _threads.decide() == (6, "processors of this process")
    monkeypatch.setattr(_threads, "_quota_at_import", 4)
    assert _threads.decide() == (4, "cgroup quota")
    monkeypatch.setattr(_threads, "_omp_named_at_import", True)
    assert _threads.decide() == (_dispatch.kernels.max_threads(), "OMP_NUM_THREADS")
    monkeypatch.setattr(_threads, "_named_at_import", 3)
    assert _threads.decide() == (3, "BATCHNORM_NUM_THREADS")
    bn.set_num_threads(5)
    assert _threads.decide() == (5, "set_num_threads")
    assert bn.get_num_threads() == 5
    assert _threads.threads_for(10**6, None) == 5
    assert _threads.threads_for(10**6, 9) == 9
    assert _threads.threads_for(10, 9) == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"BATCHNORM_NUM_THREADS": "3"}, "3 BATCHNORM_NUM_THREADS"),
        ({"BATCHNORM_NUM_THREADS": "3", "OMP_NUM_THREADS": "2"}, "3 BATCHNORM_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "7,2"}, "7 OMP_NUM_THREADS"),
    ],
    ids=str,
)
def test_the_environment_decides(environment, expected):
    assert decided_with(environment) == expected


@pytest.mark.parametrize("text", ["", "0", "-2", "many", "1.5"])
def test_a_useless_variable_decides_nothing(text):
    assert decided_with({"BATCHNORM_NUM_THREADS": text}) == decided_with({})


def decided_with(environment):
    """What a new process decides."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    program = "from batchnorm import _threads; print(*_threads.decide())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return run.stdout.strip()


def test_limits_of_threadpoolctl_are_obeyed(undecided):
    before = _threads.decide()
    with threadpool_limits(1):
        assert _threads.decide() == (1, "limit set on the OpenMP runtime")
    assert _threads.decide() == before


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({"cpu.max": "150000 100000"}, "0::/", 2),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"a/cpu.max": "max 100000", "cpu.max": "100000 100000"}, "0::/a", 1),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "250000 100000"}, "0::/a/b", 3),
        ({"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/a\n1:memory:/b", 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/", None),
        ({"cpu.max": "150000"}, "0::/", None),
        ({"cpu.max": "150000 0"}, "0::/", None),
        ({"cpu.max": "lots of"}, "0::/", None),
        ({}, "0::/a/b\nnonsense", None),
        ({}, "", None),
    ],
    ids=str,
)
def test_quota(files, membership, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    assert _threads._quota(str(tmp_path), str(tmp_path / "membership")) == expected


def test_quota_without_cgroups(tmp_path):
    assert _threads._quota(str(tmp_path), str(tmp_path / "missing")) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_serial_and_gets_the_same_bits():
    program = """
import os, sys
import numpy as np
import batchnorm as bn
from batchnorm import _threads
x = np.random.default_rng(0).standard_normal((64, 32, 20, 20)).astype(np.float32)
def results():
    y, saved = bn.forward(x, num_threads=2)
    return y.tobytes() + bn.backward(x, saved).dx.tobytes()
expected = results()
child = os.fork()
if child == 0:
    os._exit(0 if _threads.decide() == (1, "forked child") and results() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
assert results() == expected
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr


def test_many_python_threads_at_once(rng):
    shapes = [(64, 32, 12, 12), (3, 5), (2000, 40), (8, 3, 60, 60)]
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def results(x):
        y, saved = bn.forward(x)
        return y.tobytes() + bn.backward(x, saved).dx.tobytes()

    expected = [results(x) for x in inputs]
    start, wrong = threading.Barrier(8), []

    def work(k):
        start.wait()
        for turn in range(40):
            i = (k + turn) % len(inputs)
            if results(inputs[i]) != expected[i]:
                wrong.append((k, i))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
