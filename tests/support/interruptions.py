"""Signals, kills and forks while a layer works: every scenario in its own process, as often as the caller says.

    python tests/support/interruptions.py 200            # all scenarios, each 200 times
    python tests/support/interruptions.py 200 --only kill

A run that does not end within half a minute is a hang: it is ended, with a traceback of all its threads. The exit
status is 0 if no run failed.

States are numbered: in state k every array and the counter are k, so a mixture of two is obvious. In training the batch
is always the same, so the counter alone determines the running statistics.
"""

import argparse
import faulthandler
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np

import batchnorm as bn

SECONDS = 30
LONG_ENOUGH = 0.15
"""The seconds for which a run keeps a layer busy."""

CHANNELS = 40
X = np.random.default_rng(0).standard_normal((8, CHANNELS)).astype(np.float32)
NAMES = list(bn.BatchNorm(CHANNELS).state_dict())


class Interruption(Exception):  # noqa: N818
    """The exception that a signal handler raises."""


def numbered(k):
    return {name: np.full(CHANNELS, k, np.float32) for name in NAMES[:-1]} | {NAMES[-1]: k}


def number(state):
    """The k of a numbered state, which must not be a mixture."""
    found = {float(value) for array in state.values() for value in np.unique(array)}
    assert len(found) == 1, f"a mixture of the states {sorted(found)}"
    return found.pop()


def statistics(layer):
    state = layer.state_dict()
    return int(state["num_batches_tracked"]), state["running_mean"].tobytes(), state["running_var"].tobytes()


def followed(count):
    """The running statistics after this many batches."""
    layer = bn.BatchNorm(CHANNELS)
    expected = {0: statistics(layer)}
    for k in range(1, count + 1):
        layer(X)
        expected[k] = statistics(layer)
    return expected


def until(seconds=LONG_ENOUGH):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


def signals(handler):
    """Let the handler run again and again, 10 to 300 µs after its last run."""

    def again(*_):
        try:
            handler()
        finally:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 1e-4)


def quiet():
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


armed = False


def raising():
    """A handler that raises only within what `interruptible` runs."""
    global armed
    if armed:
        armed = False
        raise Interruption


def interruptible(work):
    """Whether `work` was interrupted."""
    global armed
    try:
        armed = True
        work()
        armed = False
    except Interruption:
        return True
    return False


def in_a_fork(work):
    """Run this in a forked child; if it hangs, a signal ends it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS // 2)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def a_handler_that_saves(folder):
    """The usual handler for preemption, in training calls, loads and saves."""
    layer, path, came = bn.BatchNorm(CHANNELS), folder / "layer", []

    def handler():
        if len(came) % 20 == 0:
            layer.save(path)
        came.append(statistics(layer))

    signals(handler)
    for _ in until():
        layer(X)
        layer.state_dict()
        layer.reset_running_stats()
        layer(X)
    quiet()
    expected = followed(2)
    assert came
    assert all(state == expected[state[0]] for state in came)
    assert statistics(bn.BatchNorm.load(path))[0] in expected


def an_exception_in_training(folder):
    layer, came, expected = bn.BatchNorm(CHANNELS), 0, followed(400)
    signals(raising)
    for _ in until():
        came += interruptible(lambda: [layer(X) for _ in range(100)])
        state = statistics(layer)
        assert state == expected[state[0]], state[0]
        if state[0] > 300:
            layer.reset_running_stats()
    quiet()
    assert came
    layer(X)


def an_exception_in_load_state_dict(folder):
    layer, states, came = bn.BatchNorm(CHANNELS), [numbered(k) for k in range(7)], 0
    layer.load_state_dict(states[0])
    signals(raising)
    for _ in until():
        came += interruptible(lambda: [layer.load_state_dict(state) for state in states])
        assert number(layer.state_dict()) in range(7)
    quiet()
    assert came


def evaluation_beside_load_state_dict(folder):
    """Every y, pickle and file belongs to one state."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    layer, states = bn.BatchNorm(CHANNELS).eval(), [numbered(k) for k in range(1, 7)]
    expected = set()
    for state in states:
        layer.load_state_dict(state)
        expected.add(layer(X).tobytes())
    assert len(expected) == len(states)
    stop, wrong = threading.Event(), []

    def load():
        while not stop.is_set():
            layer.load_state_dict(random.choice(states))

    def evaluate():
        while not stop.is_set():
            if layer(X).tobytes() not in expected:
                wrong.append("y")
            try:
                number(layer.state_dict())
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for work in (load, evaluate, evaluate)]
    for thread in threads:
        thread.start()
    time.sleep(LONG_ENOUGH)
    stop.set()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switch)
    assert not wrong, wrong[:3]


def fork(folder):
    """While other threads load and save, and so often hold the lock, the child has a whole state, and works."""
    sys.setswitchinterval(1e-6)
    layer, stop = bn.BatchNorm(CHANNELS), threading.Event()
    states = [numbered(k) for k in range(1, 7)]
    layer.load_state_dict(states[0])

    def load():
        while not stop.is_set():
            layer.load_state_dict(random.choice(states))

    def read():
        while not stop.is_set():
            layer.state_dict()

    def work():
        number(layer.state_dict())
        layer(X)
        layer.load_state_dict(states[2])
        layer.save(folder / "child")

    threads = [threading.Thread(target=target) for target in (load, load, read)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        time.sleep(random.uniform(0, 0.01))
        assert os.waitpid(in_a_fork(work), 0)[1] == 0
    stop.set()
    for thread in threads:
        thread.join()
    assert number(bn.BatchNorm.load(folder / "child").state_dict()) == 3


def a_handler_that_forks(folder):
    """It forks in the middle of a call, where its own thread may hold the lock."""
    layer, children = bn.BatchNorm(CHANNELS), []
    layer.load_state_dict(numbered(1))

    def handler():
        if len(children) < 5:
            children.append(in_a_fork(lambda: number(layer.state_dict())))

    signals(handler)
    for _ in until():
        layer.load_state_dict(numbered(2))
    quiet()
    assert children
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    layer(X)


def kill(folder):
    """After a kill in the middle of a save, the file is the old or the new one."""
    path, layers = folder / "layer", [bn.BatchNorm(CHANNELS), bn.BatchNorm(CHANNELS)]
    for k, layer in enumerate(layers, 1):
        layer.load_state_dict(numbered(k))
    layers[0].save(path)
    child = os.fork()
    if child == 0:
        while True:
            for layer in layers:
                layer.save(path)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert number(bn.BatchNorm.load(path).state_dict()) in (1, 2)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        a_handler_that_saves,
        an_exception_in_training,
        an_exception_in_load_state_dict,
        evaluation_beside_load_state_dict,
        fork,
        a_handler_that_forks,
        kill,
    )
}


def run(scenario, seed):
    """The exit status of a scenario: 0 if its promise holds."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        random.seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            scenario(Path(folder))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=int, help="runs of each scenario")
    parser.add_argument("--only", choices=SCENARIOS, action="append")
    arguments = parser.parse_args()
    failures = 0
    for name in arguments.only or SCENARIOS:
        start = time.monotonic()
        failed = sum(run(SCENARIOS[name], seed) != 0 for seed in range(arguments.times))
        failures += failed
        print(f"{name:36}{arguments.times:5} runs {failed:5} failed {time.monotonic() - start:7.1f} s", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
