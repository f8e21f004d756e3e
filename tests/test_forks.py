"""A child gets the bits of its parent, serially, however it was made; nothing waits for threads that do not exist."""

import os
import sys

import pytest
from processes import WORKLOAD, search_path, succeeds

from batchnorm._kernels import runtime

pytestmark = [
    pytest.mark.once,  # what watches forks is compiled once
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.skipif(runtime.openmp() == 0, reason="a serial build has no threads to lose"),
]

SECONDS = 20
FORKING = ["-W", "ignore::DeprecationWarning"]  # Python 3.12 warns of any fork beside threads

CHILD = (
    WORKLOAD
    + """
import multiprocessing, os, sys, threading
from concurrent.futures import ThreadPoolExecutor

expected = results()

def is_right(_=None):
    return _threads.decide() == (1, "forked child") and results() == expected

def in_child(work):
    child = os.fork()
    if child == 0:
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1] == 0

"""
)

VARIANTS = {
    "os.fork": "assert in_child(is_right)",
    "os.fork, the child ending as programs do": """
child = os.fork()
if child == 0:
    sys.exit(0 if is_right() else 1)
assert os.waitpid(child, 0)[1] == 0
""",
    "under a limit, which stays": """
from threadpoolctl import threadpool_limits
with threadpool_limits(1):
    assert in_child(is_right)
    assert bn.get_num_threads() == 1
""",
    "grandchild": "assert in_child(lambda: is_right() and in_child(is_right))",
    "a child that asks for threads": """
def stubborn():
    bn.set_num_threads(4)
    return bn.get_num_threads() == 1 and results(threads=8) == expected
assert in_child(stubborn)
""",
    "a process of multiprocessing": """
def work():
    sys.exit(0 if is_right() else 1)
process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join()
assert process.exitcode == 0
""",
    "a pool of four": """
with multiprocessing.get_context("fork").Pool(4) as pool:
    assert all(pool.map(is_right, range(16)))
""",
    "from a thread that has a team, the child's thread returning": """
right = []
def work():
    results()
    child = os.fork()
    if child:
        right.append(os.waitpid(child, 0)[1] == 0)
        return
    if not is_right():
        os._exit(1)
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert right == [True]
""",
    "from threads of an executor": """
def work(_):
    return results() == expected and in_child(is_right)
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(work, range(12)))
""",
    "a fork that Python knows nothing of": """
import ctypes
libc = ctypes.PyDLL(None)
child = libc.fork()
if child == 0:
    os._exit(0 if is_right() else 1)
assert os.waitpid(child, 0)[1] == 0
""",
    "while another thread trains the layer": """
layer = bn.BatchNorm(32)
stop = threading.Event()
def train():
    while not stop.is_set():
        layer(x[:2])
thread = threading.Thread(target=train)
thread.start()
def use():
    y = layer(x)
    return layer.backward(x) is not None and len(layer.state_dict()) == 5
right = all(in_child(use) for _ in range(50))
stop.set()
thread.join()
assert right
""",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_forked(variant, level):
    if variant.endswith("returning") and not runtime.safe_forks():
        pytest.skip("OpenMP older than 5.0 cannot send a team home")
    program = CHILD + VARIANTS[variant] + "\nassert results() == expected"
    succeeds(program, *FORKING, timeout=SECONDS, BATCHNORM_ISA=level)


@pytest.mark.skipif(not runtime.safe_forks(), reason="before OpenMP 5.0 every child is serial")
def test_a_fork_before_threads_are_used_may_use_them(level):
    """As the workers of a fork server; their own children are serial again."""
    program = """
def fresh():
    before = _threads.decide()[1]
    return before != "forked child" and results() == expected and _threads.decide()[1] == before and in_child(is_right)
assert in_child(fresh)
assert fresh()
"""
    succeeds(CHILD.replace("= results()", "= results(threads=1)") + program, *FORKING, BATCHNORM_ISA=level)


def test_a_fork_after_parallel_use_takes_no_time(level):
    program = (
        CHILD + "import time; begin = time.monotonic(); assert in_child(is_right); print(time.monotonic() - begin)"
    )
    assert float(succeeds(program, *FORKING, BATCHNORM_ISA=level)) < 5


@pytest.mark.parametrize("method", ["spawn", "forkserver", "loky"])
def test_new_processes_are_like_the_first(method, level, tmp_path):
    """They are not children of a fork that lost threads, so they may use threads as the first process does."""
    if method == "loky":
        pytest.importorskip("loky")
    (tmp_path / "worker.py").write_text(
        WORKLOAD + "\ndef work(_):\n    return results(), bn.get_num_threads(), _threads.decide()[1]\n"
    )
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import worker

if __name__ == "__main__":
    expected = (worker.results(), *worker.work(0)[1:])
    if {method!r} == "loky":
        from loky import ProcessPoolExecutor
        with ProcessPoolExecutor(2) as pool:
            found = list(pool.map(worker.work, range(4)))
    else:
        import multiprocessing
        with multiprocessing.get_context({method!r}).Pool(2) as pool:
            found = pool.map(worker.work, range(4))
    assert [result[0] == expected[0] for result in found] == [True] * 4
    print(*{{result[2] for result in found}}, sep="\\n")
"""
    path = tmp_path / "program.py"
    path.write_text(program)
    printed = succeeds(
        f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')",
        BATCHNORM_ISA=level,
        PYTHONPATH=search_path(tmp_path),
    )
    assert printed
    assert "forked child" not in printed or (method == "forkserver" and not runtime.safe_forks())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python warns of threads since 3.12")
def test_a_serial_process_forks_without_a_warning(level):
    program = (
        CHILD.replace("expected = results()", "expected = results(threads=None)") + "assert in_child(lambda: True)"
    )
    succeeds(program, "-W", "error::DeprecationWarning", BATCHNORM_ISA=level, OMP_NUM_THREADS="1")
