"""The largest errors that a search finds: it changes the worst of many kinds of data a little, again and again.

    python tests/fuzz/accuracy.py float32 600 --seed 7

An input is a few bytes, from which every decision is taken. A mutation that makes an error larger replaces its parent.
Errors are printed in the units of docs/numerics.md; the exit status is 1 if a limit does not hold.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "support"))

import oracle
from batches import GRADIENTS, KINDS
from fuzz.source import ByteSource, choose

import batchnorm as bn

LENGTH = 64
"""Bytes of an input."""

VALUES = 12_000
"""The most values of an array, so that an input takes some milliseconds."""


def view_of(source):
    """(N, C, S) of every way through the kernels, with at least two values per channel."""
    S = choose(source, [1, 1, 1, 2, 4, 7, 9, 16, 25, 49, 63, 64, 65, 100, 196, 700, 8193])
    C = choose(source, [1, 2, 3, 5, 8, 17, 40])
    N = choose(source, [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 33, 64, 100, 257, 1000, 2956])
    while N * C * S > VALUES and C > 1:
        C //= 2
    while N * C * S > VALUES and N > 1:
        N //= 2
    return (N, C, S) if N * S > 1 else (2, C, S)


class Case:
    """One batch, by its bytes."""

    def __init__(self, data, dtype):
        source = ByteSource(data)
        rng = np.random.default_rng(np.frombuffer(source.data(8), np.uint64))
        view = view_of(source)
        self.kind, self.slope = choose(source, list(KINDS)), choose(source, list(GRADIENTS))
        fine = 1 + source.integer(0, 255) / 256
        self.offset = choose(source, [0.0, 0.0, 0.3, 1.0, 3.0, 30.0, 1e2, 1e3, 1e4, 1e6, -3e5]) * fine
        self.scale = choose(source, [1.0, 1.0, 1.0, 1e-3, 255.0, 1e-30, 1e15, 1e30]) * fine
        self.x = np.clip((KINDS[self.kind](rng, view) + self.offset) * self.scale, -3e38, 3e38).astype(dtype)
        self.dy = GRADIENTS[self.slope](rng, self.x).astype(dtype)
        size, shift = choose(source, [1.0, 1.0, 1e-3, 30.0]), choose(source, [0.0, 1.0, 1.0, 1e-3, 1e3])
        self.gamma = (size * rng.uniform(-2, 2, view[1])).astype(dtype)
        self.beta = (size * shift * rng.uniform(-2, 2, view[1])).astype(dtype)
        self.eps = choose(source, [1e-5, 1e-5, 0.0, 1e-12, 1e-3, 1.0])
        self.last = source.integer(0, 1)
        self.cuts = sorted(source.integer(0, view[0]) for _ in range(choose(source, [0, 1, 3])))
        if self.last:
            self.x, self.dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (self.x, self.dy))
        self.axis = -1 if self.last else 1

    def __str__(self):
        return (
            f"{self.x.shape} axis {self.axis}, {self.kind}, dy {self.slope}, offset {self.offset:.4g}, "
            f"scale {self.scale:.4g}, eps {self.eps}, cuts {self.cuts}"
        )


def fused(case):
    y, saved = bn.forward(case.x, case.gamma, case.beta, axis=case.axis, eps=case.eps)
    return y, saved, bn.backward(case.dy, saved)


def in_parts(case):
    """The same with merged statistics and sums."""
    x, dy = np.split(case.x, case.cuts), np.split(case.dy, case.cuts)
    moments = sum(bn.Moments.of(part, case.axis) for part in x)
    how = {"axis": case.axis, "eps": case.eps, "moments": moments}
    done = [bn.forward(part, case.gamma, case.beta, **how) for part in x]
    sums = sum(bn.grad_sums(part, saved) for part, (_, saved) in zip(dy, done, strict=True))
    each = [bn.backward(part, saved, sums=sums) for part, (_, saved) in zip(dy, done, strict=True)]
    y, dx = np.concatenate([y for y, _ in done]), np.concatenate([g.dx for g in each])
    return y, bn.Gradients(dx, each[0].dgamma, each[0].dbeta)


@np.errstate(all="ignore")
def errors_of(case):
    """Errors by name, in the units of `oracle.ULPS`."""
    t = oracle.truth(case.x, case.dy, case.gamma, case.beta, case.axis, case.eps)
    y, saved, gradients = fused(case)
    found = oracle.errors_by_name(y, saved, gradients, t, case.axis)
    if case.cuts:
        found["parts"] = oracle.parts_error(*in_parts(case), y, gradients, t, case.axis)
    return found


def mutated(rng, data):
    """A few bytes changed; now and then only the seed of the random values."""
    child = bytearray(data)
    if rng.random() < 0.4:
        child[:8] = rng.bytes(8)
    for _ in range(rng.integers(0, 4)):
        child[rng.integers(8, 40)] = rng.integers(256)
    return bytes(child)


def search(dtype, seconds, seed):
    """The worst (error, bytes) of each result."""
    rng, worst, count = np.random.default_rng(seed), {}, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        parent = list(worst.values())[rng.integers(len(worst))][1] if worst and rng.random() < 0.6 else None
        data = rng.bytes(LENGTH) if parent is None else mutated(rng, parent)
        count += 1
        for name, error in errors_of(Case(data, dtype)).items():
            if name not in worst or not error <= worst[name][0]:
                worst[name] = error, data
    return count, worst


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtype", choices=["float32", "float64"])
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    count, worst = search(arguments.dtype, arguments.seconds, arguments.seed)
    print(f"{count} inputs of {arguments.dtype}, seed {arguments.seed}, {arguments.seconds:g} s")
    broken = False
    for name, (error, data) in worst.items():
        limit = oracle.ULPS[name][arguments.dtype]
        broken |= not error <= limit
        print(f"{name:12} {error:8.3g} of {limit:<4} {Case(data, arguments.dtype)}\n             {data.hex()}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
