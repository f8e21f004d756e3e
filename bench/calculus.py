"""`python -m bench.calculus`: tangents compared to the gradient, and the gradient of the gradient to torch's.

The calls take turns, in one process, and the best time of each counts. torch differentiates its own backward pass
automatically, and only the second derivative is timed. "over limit" is the time of `double_backward` divided by the
time to move its five arrays, three read and two written, with `np.add`. That has one thread, so its time is divided by
the number of threads.
"""

import argparse
import importlib.util

import numpy as np

import batchnorm as bn

from .selection import best

SHAPES = [
    ((32, 64), 1),
    ((256, 1024), 1),
    ((4096, 64), 1),
    ((1, 64, 112, 112), 1),
    ((32, 256, 14, 14), 1),
    ((32, 256, 14, 14), -1),
    ((32, 2048, 7, 7), 1),
    ((8, 64, 112, 112), 1),
    ((32, 64, 56, 56), 1),
    ((32, 64, 56, 56), -1),
]


def of_torch(x, dy, u, gamma, axis, threads):
    import torch

    torch.set_num_threads(threads)
    ours, upstream, scale = (torch.from_numpy(array).requires_grad_() for array in (x, dy, gamma))
    seen, upstream_seen = ours.movedim(axis, 1), upstream.movedim(axis, 1)
    y = torch.nn.functional.batch_norm(seen, None, None, scale, torch.zeros_like(scale), True)
    gradients = torch.autograd.grad(y, (ours, scale), upstream_seen, create_graph=True)
    of_gradients = torch.from_numpy(u), torch.ones_like(scale)
    return lambda: torch.autograd.grad(gradients, (ours, upstream, scale), of_gradients, retain_graph=True)


def measure(shape, axis, threads, rounds):
    generator = np.random.default_rng(0)
    x, dy, u = generator.standard_normal((3, *np.moveaxis(np.empty(shape), 1, axis).shape), dtype=np.float32)
    gamma = np.ones(shape[1], np.float32)
    _, saved = bn.forward(x, gamma, gamma, axis=axis)
    out, ones = np.empty_like(x), np.ones(shape[1])
    calls = {
        "backward": lambda: bn.backward(dy, saved, need="dx", out=out),
        "jvp": lambda: bn.jvp(dy, saved, out=out),
        "double_backward": lambda: bn.double_backward(u, dy, saved, ddgamma=ones),
        "limit": lambda: np.add(x, dy, out=out),
    }
    if importlib.util.find_spec("torch"):
        calls["torch"] = of_torch(x, dy, u, gamma, axis, threads)
    return best(calls, rounds), x.nbytes


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.calculus", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each call (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="turns of each call (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the smallest shapes")
    chosen = parser.parse_args()
    bn.set_num_threads(chosen.threads)
    print("| x | axis | MB | jvp / backward | double_backward, ms | torch / double_backward | over limit |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for shape, axis in SHAPES[:2] if chosen.quick else SHAPES:
        t, size = measure(shape, axis, chosen.threads, chosen.rounds)
        second = t["double_backward"]
        cells = [
            f"{t['jvp'] / t['backward']:.2f}",
            f"{1e3 * second:.2f}",
            f"{t.get('torch', np.nan) / second:.1f}",
            f"{second / (t['limit'] * 5 / 3 / chosen.threads):.1f}",
        ]
        print(f"| {shape} | {axis} | {size / 1e6:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
