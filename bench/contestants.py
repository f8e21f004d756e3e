"""The contestants, each served by a process of its own."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import batchnorm as bn
from batchnorm import profile, reference

BURST = 0.03


def allocating(problem, threads):
    x, dy, gamma, beta, mean, var, _, axis = problem
    _, saved = bn.forward(x, gamma, beta, axis=axis)
    return {
        "forward": lambda: bn.forward(x, gamma, beta, axis=axis, num_threads=threads)[0],
        "backward": lambda: bn.backward(dy, saved, num_threads=threads).dx,
        "inference": lambda: bn.inference(x, mean, var, gamma, beta, axis=axis, num_threads=threads),
    }


def limit(problem, threads):
    pool = ThreadPoolExecutor(threads)
    x, dy, out = (np.array_split(array.reshape(-1), threads) for array in (problem.x, problem.dy, problem.out))

    def split(work):
        others = [pool.submit(work, part) for part in range(1, threads)]
        work(0)
        for other in others:
            other.result()

    return {
        "forward": lambda: split(lambda part: np.copyto(out[part], x[part])),
        "backward": lambda: split(lambda part: np.add(x[part], dy[part], out=out[part])),
        "inference": lambda: split(lambda part: np.copyto(out[part], x[part])),
    }


CONTESTANTS = {
    "limit": limit,
    "NumPy": profile.CONTESTANTS["numpy"].prepare,
    "torch": profile.CONTESTANTS["torch"].prepare,
    "batchnorm": allocating,
    "batchnorm, out=": profile.CONTESTANTS["batchnorm"].prepare,
}


def serve(name, pipe):
    """One contestant: measures a burst whenever it is asked to, until the other end closes."""
    prepared = {}
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        shape, axis, dtype, threads, which, check = request
        if prepared.get("key") != request[:4]:
            problem = profile.activations(shape, axis, dtype)
            prepared = {"key": request[:4], "problem": problem, "calls": CONTESTANTS[name](problem, threads)}
        call, problem = prepared["calls"][which], prepared["problem"]
        if check:
            pipe.send(error_of(problem, which, call()))
            continue
        taken = []
        end = time.perf_counter() + BURST
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        pipe.send(taken)


def error_of(problem, which, result):
    """Largest error over the largest value, against the reference in float64 or wider."""
    wide = problem.widened()
    if which == "inference":
        exact = reference.inference(wide.x, wide.mean, wide.var, wide.gamma, wide.beta, wide.axis)
    else:
        exact, cache = reference.forward(wide.x, wide.gamma, wide.beta, wide.axis)
        exact = reference.backward(wide.dy, cache)[0] if which == "backward" else exact
    return problem.error(result, exact)
