"""How many threads, and why; and what a fork, a limit or a crowd of Python threads does to results: nothing."""

import os
import sys
import threading

import numpy as np
import pytest
from processes import WORKLOAD, python, succeeds
from threadpoolctl import threadpool_limits

import batchnorm as bn
from batchnorm import _kernels, _threads, fixed, functional
from batchnorm._kernels import runtime

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, or is about processors")
pytestmark = pytest.mark.skipif(runtime.openmp() == 0, reason="a serial build has no threads to choose")


@pytest.fixture
def undecided(monkeypatch):
    """No number is set by the environment, an earlier call or a quota."""
    monkeypatch.setattr(_threads, "_asked", None)
    monkeypatch.setattr(_threads, "_named_at_import", None)
    monkeypatch.setattr(_threads, "_omp_named_at_import", False)
    monkeypatch.setattr(_threads, "_quota_at_import", None)
    monkeypatch.setattr(runtime, "processors", lambda: 6)
    monkeypatch.setattr(_threads, "_openmp_at_import", runtime.max_threads())


@pytest.mark.once
def test_who_decides(undecided, monkeypatch):
    assert _threads.decide() == (6, "processors of this process")
    monkeypatch.setattr(_threads, "_quota_at_import", 4)
    assert _threads.decide() == (4, "cgroup quota")
    monkeypatch.setattr(_threads, "_omp_named_at_import", True)
    assert _threads.decide() == (runtime.max_threads(), "OMP_NUM_THREADS")
    monkeypatch.setattr(_threads, "_named_at_import", 3)
    assert _threads.decide() == (3, "BATCHNORM_NUM_THREADS")
    bn.set_num_threads(5)
    assert _threads.decide() == (5, "set_num_threads")
    assert bn.get_num_threads() == 5
    assert _threads.threads_for(10**6, None) == 5
    assert _threads.threads_for(10**6, 9) == 9
    assert _threads.threads_for(10, 9) == 1


@pytest.mark.once
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"BATCHNORM_NUM_THREADS": "3"}, "3 BATCHNORM_NUM_THREADS"),
        ({"BATCHNORM_NUM_THREADS": "3", "OMP_NUM_THREADS": "2"}, "3 BATCHNORM_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "7,2"}, "7 OMP_NUM_THREADS"),
        ({"BATCHNORM_NUM_THREADS": "1000000"}, "4096 BATCHNORM_NUM_THREADS"),
        ({"BATCHNORM_NUM_THREADS": "1" + 20 * "0"}, "4096 BATCHNORM_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "1000000"}, "4096 OMP_NUM_THREADS"),
        ({"BATCHNORM_NUM_THREADS": "3", "OMP_STACKSIZE": "16K"}, "1 OMP_STACKSIZE"),
        ({"BATCHNORM_NUM_THREADS": "3", "OMP_STACKSIZE": " 16 "}, "1 OMP_STACKSIZE"),
        ({"BATCHNORM_NUM_THREADS": "3", "OMP_STACKSIZE": "1m"}, "3 BATCHNORM_NUM_THREADS"),
        ({"BATCHNORM_NUM_THREADS": "3", "OMP_STACKSIZE": "little"}, "3 BATCHNORM_NUM_THREADS"),
    ],
    ids=str,
)
def test_the_environment_decides(environment, expected):
    assert decided_with(environment) == expected


@pytest.mark.once
@pytest.mark.parametrize("text", ["", "0", "-2", "many", "1.5", pytest.param("9" * 5000, id="5000 digits")])
def test_a_useless_variable_decides_nothing(text):
    assert decided_with({"BATCHNORM_NUM_THREADS": text}) == decided_with({})


def decided_with(environment, before="pass"):
    """What a new process decides."""
    nobody = {"BATCHNORM_NUM_THREADS": None, "OMP_NUM_THREADS": None}
    program = f"import os; {before}; from batchnorm import _threads; print(*_threads.decide())"
    return succeeds(program, **nobody | environment)


CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
BOUND = [
    *({"OMP_PROC_BIND": how} for how in ("true", "close", "spread", "master")),
    {"OMP_PLACES": "cores"},
    {"OMP_PLACES": ",".join(f"{{{cpu}}}" for cpu in CPUS)},
    {"GOMP_CPU_AFFINITY": ",".join(map(str, CPUS))},
]


@pytest.mark.once
@linux
@pytest.mark.parametrize("environment", BOUND, ids=str)
def test_a_runtime_that_pins_its_threads_has_all_processors(environment):
    """It pins the thread that loads it before anybody can ask where that may run."""
    assert decided_with(environment) == decided_with({})


@pytest.mark.once
@linux
def test_processors_that_are_not_for_this_process_do_not_count():
    one = f"os.sched_setaffinity(0, {{{CPUS[0]}}})"
    assert decided_with({}, one) == "1 processors of this process"
    assert decided_with({"OMP_PROC_BIND": "true"}, one) == "1 processors of this process"
    assert decided_with({"OMP_PLACES": f"{{{CPUS[0]}}}"}) == "1 processors of this process"
    after = f"from batchnorm import _threads; {one}"
    assert decided_with({}, after) == "1 processors of this process"


@pytest.mark.once
def test_the_number_of_threads_for_a_while(undecided):
    with bn.num_threads(5):
        assert _threads.decide() == (5, "set_num_threads")
        with bn.num_threads(3):
            assert bn.get_num_threads() == 3
        assert bn.get_num_threads() == 5
        with bn.num_threads(None):
            assert bn.get_num_threads() == 6
        with pytest.raises(RuntimeError, match="stop"), bn.num_threads(2):
            raise RuntimeError("stop")
        with pytest.raises(ValueError, match="num_threads must be between 1 and 4096, got 0"), bn.num_threads(0):
            pass
        assert bn.get_num_threads() == 5
    assert _threads.decide() == (6, "processors of this process")


@pytest.mark.once
def test_back_to_the_default(undecided):
    bn.set_num_threads(5)
    bn.set_num_threads(None)
    assert _threads.decide() == (6, "processors of this process")


@pytest.mark.once
def test_limits_of_threadpoolctl_are_obeyed(undecided):
    before = _threads.decide()
    with threadpool_limits(1):
        assert _threads.decide() == (1, "limit set on the OpenMP runtime")
    assert _threads.decide() == before


@pytest.mark.once
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


@pytest.mark.once
def test_quota_without_cgroups(tmp_path):
    assert _threads._quota(str(tmp_path), str(tmp_path / "missing")) is None


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


# What a process does with its threads is seen from outside, in one of its own.

WATCHED = (
    WORKLOAD
    + """
import ctypes, gc, hashlib, os, threading, time
from threadpoolctl import threadpool_limits

def threads():
    return len(os.listdir("/proc/self/task"))

def resident():
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)(0)     # free memory that glibc keeps
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

def settled(number):
    # Teams leave a moment after their threads, on a busy machine a long one.
    end = time.monotonic() + 10
    while threads() > number and time.monotonic() < end:
        time.sleep(0.02)
    return threads()

"""
)
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}  # glibc keeps a heap for every thread there ever was, which looks like a leak

SETTINGS = [
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "3"},
    {"OMP_DYNAMIC": "true"},
    {"OMP_THREAD_LIMIT": "1"},
    {"OMP_PROC_BIND": "true"},
    {"OMP_NESTED": "true"},
    {"OMP_MAX_ACTIVE_LEVELS": "3"},
    {"OMP_SCHEDULE": "dynamic,1"},
    {"OMP_WAIT_POLICY": "passive"},
    {"OMP_STACKSIZE": "256k"},
    {"OMP_STACKSIZE": "16k"},
    {"GOMP_SPINCOUNT": "1"},
    {"BATCHNORM_NUM_THREADS": "7"},
]


@pytest.mark.slow
def test_no_setting_of_openmp_changes_bits(level):
    program = WATCHED + "print(hashlib.sha256(results(None)).hexdigest(), hashlib.sha256(results(4)).hexdigest())"
    nothing = {name: None for setting in SETTINGS for name in setting}
    found = {str(these): succeeds(program, BATCHNORM_ISA=level, **nothing | these) for these in [{}, *SETTINGS]}
    assert len(set(found.values())) == 1, found
    assert len(set(found["{}"].split())) == 1


@pytest.mark.once
@pytest.mark.parametrize(
    ("setting", "spins"),
    [
        ({}, str(_kernels.SPINS)),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
    ids=str,
)
def test_idle_threads_soon_sleep_unless_the_environment_says_otherwise(setting, spins):
    """libgomp says what it has read, and the environment is as before."""
    if "gomp" not in str(runtime.openmp_runtime()):
        pytest.skip("another OpenMP runtime")
    program = "import os; before = dict(os.environ); import batchnorm; assert before == dict(os.environ)"
    nothing = {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": None}
    done = python(program, OMP_DISPLAY_ENV="verbose", **nothing | setting)
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.measures
def test_a_python_thread_with_a_small_stack(level):
    """32 KiB are for Python and NumPy."""
    program = """
arrays = [x, x.astype(np.float64), np.moveaxis(x, 1, -1).copy(), x[:, :, 0, 0].copy(), x[:4]]

def work():
    for a in arrays:
        axis = -1 if a.shape[-1] == 32 else 1
        for threads in (1, 2):
            _, saved = bn.forward(a, axis=axis, num_threads=threads)
            bn.backward(a, saved, num_threads=threads)
            _, noted = bn.forward(a, axis=axis, activation="relu", add=a, num_threads=threads)
            bn.backward(a, noted, num_threads=threads)
            _, seen = bn.forward(a, axis=axis, activation="relu", num_threads=threads)
            bn.backward(a, seen, num_threads=threads)
            bn.inference(a, ones, ones, axis=axis, num_threads=threads)
    done.append(True)

done = []
_threads.SERIAL_VALUES = 0
threading.stack_size(_threads.STACK + (32 << 10))
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert done
"""
    succeeds(WATCHED + program, BATCHNORM_ISA=level)


@pytest.mark.once
@linux
def test_a_limit_of_threadpoolctl_is_the_number_of_threads(level):
    program = """
bn.set_num_threads(3)
with threadpool_limits(1):
    results(None)
    alone = threads()
results(None)
print(alone, threads())
"""
    assert succeeds(WATCHED + program, BATCHNORM_ISA=level, OPENBLAS_NUM_THREADS="1") == "1 3"


@pytest.mark.once
@linux
@pytest.mark.measures
def test_an_idle_team_uses_no_processor(level):
    program = "results(); begin = time.process_time(); time.sleep(2); print(time.process_time() - begin)"
    assert float(succeeds(WATCHED + program, BATCHNORM_ISA=level)) < 0.1


@pytest.mark.once
@linux
@pytest.mark.slow
@pytest.mark.measures
def test_small_and_large_calls_in_turns_keep_threads_and_memory(level):
    program = """
small, large = x[:1, :, :2, :2].copy(), x[:16].copy()
def turns(n):
    for _ in range(n):
        bn.forward(small)
        bn.forward(large, num_threads=2)
turns(500)
before = threads(), resident()
turns(5000)
print(settled(before[0]) - before[0], resident() - before[1])
"""
    more, grown = map(int, succeeds(WATCHED + program, timeout=300, BATCHNORM_ISA=level).split())
    assert more == 0
    assert grown < 1 << 20


MIXED = """
import sys
inputs = [x[:48].copy(), x[:1, :, :3, :3].copy(), np.moveaxis(x[:2], 1, -1).astype(np.float64), x[:4, :, 0, 0].copy()]

def bits(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.digest()

def work(k, i):
    a, axis = inputs[i], -1 if i == 2 else 1
    if k % 3 == 0:
        return bits(bn.inference(a, ones, ones, ones, axis=axis))
    y, saved = bn.forward(a, ones, ones, axis=axis)
    if k % 3 == 1:
        return bits(y, saved.var)
    return bits(*bn.backward(a, saved))

# One in fifty is large enough for a team: 16 teams on a few processors mostly wait for each other.
def which(turn):
    return (turn // 50) % 3, 0 if turn % 50 == 0 else 1 + turn % 3

expected = {(k, i): work(k, i) for k in range(3) for i in range(4)}
alone = threads()
wrong = []

def run(offset):
    start.wait()
    for turn in range(offset, offset + CALLS):
        if work(*which(turn)) != expected[which(turn)]:
            wrong.append(turn)

def crowd():
    global start
    start = threading.Barrier(16)
    crowd = [threading.Thread(target=run, args=(37 * k,)) for k in range(16)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    settled(alone)
"""


@linux
@pytest.mark.slow
@pytest.mark.measures
def test_sixteen_threads_of_ten_thousand_calls(level):
    program = """
CALLS = 200
crowd()
before = threads(), resident()
CALLS = 10_000
crowd()
assert not wrong, wrong[:10]
print(settled(before[0]) - before[0], resident() - before[1])
"""
    more, grown = map(int, succeeds(WATCHED + MIXED + program, timeout=500, BATCHNORM_ISA=level, **ONE_HEAP).split())
    assert more <= 0
    assert grown < 4 << 20


@linux
def test_sixteen_threads_that_are_switched_all_the_time(level):
    program = "CALLS = 300; sys.setswitchinterval(1e-6); crowd(); assert not wrong, wrong[:10]"
    succeeds(WATCHED + MIXED + program, timeout=300, BATCHNORM_ISA=level)


@pytest.mark.once
@linux
@pytest.mark.measures
def test_threads_that_end_leave_nothing(level):
    program = """
def many(n):
    for _ in range(n):
        thread = threading.Thread(target=bn.forward, args=(x,), kwargs={"num_threads": 2})
        thread.start()
        thread.join()
x = x[:8].copy()
many(50)
before = threads(), resident()
many(2000)
print(settled(before[0]) - before[0], resident() - before[1])
"""
    more, grown = map(int, succeeds(WATCHED + program, timeout=300, BATCHNORM_ISA=level, **ONE_HEAP).split())
    assert more <= 0
    assert grown < 4 << 20


@pytest.mark.once
def test_python_goes_on_during_a_call(level):
    program = """
large = np.broadcast_to(x, (40, *x.shape)).reshape(-1, *x.shape[1:])
out = np.empty_like(large)
ticks = []
def tick():
    while not done:
        ticks.append(time.perf_counter())
        time.sleep(0.001)
done = False
ticking = threading.Thread(target=tick)
ticking.start()
time.sleep(0.05)
for _ in range(5):
    begin = time.perf_counter()
    bn.forward(large, out=out, num_threads=1)
    end = time.perf_counter()
    between = [begin, *(t for t in ticks if begin < t < end), end]
    print(max(b - a for a, b in zip(between, between[1:])) / (end - begin))
done = True
ticking.join()
"""
    # On a busy machine either thread may wait for a processor, but not in every call.
    assert min(map(float, succeeds(WATCHED + program, BATCHNORM_ISA=level).split())) < 0.7


@pytest.mark.once
@pytest.mark.parametrize("momentum", [None, 0.25])
def test_threads_that_share_a_layer_in_training(momentum, rng):
    """Every batch counts once: for the cumulative mean, and for the counter."""
    layer = bn.BatchNorm(3, momentum=momentum, dtype=np.float64)
    batches = rng.standard_normal((8, 200, 5, 3))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(part):
        for x in part:
            layer(x)
            assert layer.backward(np.ones_like(x)).shape == x.shape
            assert int(layer.state_dict()["num_batches_tracked"]) > 0

    try:
        workers = [threading.Thread(target=work, args=(part,)) for part in batches]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert layer.num_batches_tracked == 1600
    if momentum is None:
        all_batches = batches.reshape(1600, 5, 3)
        np.testing.assert_allclose(layer.running_mean, all_batches.mean(axis=(0, 1)), rtol=0, atol=1e-13)
        np.testing.assert_allclose(layer.running_var, all_batches.var(axis=1, ddof=1).mean(axis=0), rtol=1e-13)


@pytest.mark.once
def test_threads_that_share_a_layer_work_at_the_same_time(monkeypatch, rng):
    """The lock is for copying numbers per channel: it is free while a batch is worked on."""
    layer, x, free = bn.BatchNorm(3), rng.standard_normal((4, 3)), []

    def take():
        free.append(layer._state.lock.acquire(timeout=5))
        layer._state.lock.release()

    def watched(work):
        def call(*arguments, **settings):
            worker = threading.Thread(target=take)
            worker.start()
            worker.join()
            return work(*arguments, **settings)

        return call

    monkeypatch.setattr(functional, "forward", watched(functional.forward))
    monkeypatch.setattr(fixed, "inference", watched(fixed.inference))
    layer(x)
    layer.eval()(x)
    assert free == [True, True]


@pytest.mark.once
def test_sleeping_threads_are_not_woken_for_small_work(monkeypatch):
    """After a pause they sleep; one that follows another call closely finds them awake."""
    second = 10**9
    clock = iter([1, second, second + 1000, 2 * second, 2 * second + 400_000, *(3 * second + i for i in range(3))])
    monkeypatch.setattr(_threads, "ASLEEP", 16)
    monkeypatch.setattr(_threads.time, "perf_counter_ns", lambda: next(clock))
    small = _threads.SERIAL_VALUES
    assert _threads.threads_for(small - 1, 2) == 1
    assert _threads.threads_for(16 * small, 2) == 2
    assert _threads.threads_for(16 * small - 1, 2) == 1
    assert _threads.threads_for(small, 2) == 2
    assert _threads.threads_for(16 * small - 1, 2) == 1
    assert _threads.threads_for(small, 2) == 2  # 0.4 ms after the start of a call that takes 0.26 ms
    assert _threads.threads_for(2 * small - 1, 3) == 1
    assert _threads.threads_for(16 * small - 1, 2) == 1
    assert _threads.threads_for(7 * small // 2 - 1, 2, once=True) == 1
    assert _threads.threads_for(7 * small // 2, 2, once=True) == 2
    assert _threads.threads_for(2 * small, 3) == 3
