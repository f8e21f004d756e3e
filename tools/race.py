"""Work for ThreadSanitizer: every view with a team, then several Python threads with a team each.

With --race two Python threads write the same `out`, which has to be found. Arrays are small, because a race is reported
only while the older access is still in the history.
"""

import sys
import threading

import numpy as np
import test_bits
from shapes import VIEWS

import batchnorm as bn
from batchnorm import _threads

SHAPES = [(64, 32, 12, 12), (3, 5), (2000, 40), (8, 3, 60, 60)]


def together(work, count):
    start = threading.Barrier(count)

    def run(k):
        start.wait()
        work(k)

    workers = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def race():
    x = np.ones((64, 32, 20, 20))
    out = np.empty_like(x)
    together(lambda _: [bn.forward(x, out=out, num_threads=4) for _ in range(20)], 2)


def main():
    _threads.SERIAL_VALUES = 0
    if "--race" in sys.argv:
        race()
        return
    for view in VIEWS.values():
        for dtype in test_bits.DTYPES:
            test_bits.everything(view, dtype, 4)
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal(shape).astype(dtype) for shape in SHAPES for dtype in (*test_bits.DTYPES, "f2")]

    def results(x):
        y, saved = bn.forward(x, num_threads=4)
        after, noted = bn.forward(x, activation="relu", add=y, num_threads=4)
        gradients = [bn.backward(x, saved, num_threads=4).dx, bn.backward(x, noted, num_threads=4).dadd]
        return b"".join(array.tobytes() for array in (y, after, *gradients))

    expected, wrong = [results(x) for x in inputs], []
    layer = bn.BatchNorm(32)

    def work(k):
        for turn in range(16):
            i = (k + turn) % len(inputs)
            if results(inputs[i]) != expected[i]:
                wrong.append((k, i))
            layer(inputs[0])

    together(work, 4)
    assert not wrong, wrong
    assert layer.num_batches_tracked == 64


if __name__ == "__main__":
    main()
