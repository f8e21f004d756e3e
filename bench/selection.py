"""`python -m bench.selection`: lengths, masks and weights, compared to the same call without them.

Sequences are half full: their lengths are evenly spread from 0 to L. Masks are random, half True. Every figure is the
time divided by that of the call without a selection. The calls take turns, and the best time of each counts.
"""

import argparse
import time

import numpy as np

import batchnorm as bn

# (shape, axis): sequences with channels first and last, long and short, within the caches and beyond; and images.
SHAPES = [
    ((64, 64, 64), 1),
    ((64, 64, 64), 2),
    ((32, 128, 512), 1),
    ((32, 512, 128), 2),
    ((8, 64, 4000), 1),
    ((128, 256, 1024), 1),
    ((128, 1024, 256), 2),
    ((32, 64, 56, 56), 1),
    ((32, 256, 14, 14), 1),
    ((256, 512), 1),
    ((20000, 512), 1),
]
NAMES = ("lengths", "mask", "weights")
SLICE = 0.004  # seconds that each call has before the next one's turn


def selections(shape, axis, generator):
    """The selections for `forward`, by name; the first is none."""
    places = shape[:axis] + shape[axis + 1 :]
    found = {"": {}, "mask": {"mask": generator.random(places) < 0.5}, "weights": {"weights": generator.random(places)}}
    if len(shape) == 3:
        found["lengths"] = {"lengths": generator.permutation(np.linspace(0, places[1], places[0]).astype(int))}
    return found


def best(calls, rounds):
    """The best time of each call, in turns."""
    found = dict.fromkeys(calls, np.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            end = time.perf_counter() + SLICE
            while (start := time.perf_counter()) < end:
                call()
                found[name] = min(found[name], time.perf_counter() - start)
    return found


def measure(shape, axis, dtype, threads, rounds):
    """The time divided by that of the call without a selection, by pass and name."""
    generator = np.random.default_rng(0)
    x, dy = (generator.standard_normal(shape).astype(dtype) for _ in range(2))
    y, dx = np.empty_like(x), np.empty_like(x)
    forward, backward = {}, {}
    for name, selects in selections(shape, axis, generator).items():
        _, saved = bn.forward(x, axis=axis, **selects)
        forward[name] = lambda selects=selects: bn.forward(x, axis=axis, out=y, num_threads=threads, **selects)
        backward[name] = lambda saved=saved: bn.backward(dy, saved, out=dx, num_threads=threads)
    passes = {"forward": best(forward, rounds), "backward": best(backward, rounds)}
    return {
        (what, name): taken / times[""] for what, times in passes.items() for name, taken in times.items() if name
    }, x.nbytes


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.selection", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each call (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="turns of each call (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="dtype of x (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the smallest shapes")
    chosen = parser.parse_args()
    columns = [(what, name) for name in NAMES for what in ("forward", "backward")]
    print(f"| x | axis | MB | {' | '.join(f'{name}, {what}' for what, name in columns)} |")
    print(f"|---|---:|---:|{'---:|' * len(columns)}")
    for shape, axis in SHAPES[:2] if chosen.quick else SHAPES:
        found, size = measure(shape, axis, chosen.dtype, chosen.threads, chosen.rounds)
        cells = [f"{found[column]:.2f}" if column in found else "" for column in columns]
        print(f"| {shape} | {axis} | {size / 1e6:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
