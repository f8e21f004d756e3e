"""Where a fuzz target takes its decisions from, and how it is run: random numbers, or atheris with coverage.

python tests/fuzz/arrays.py 100000 --seed 7
python tests/fuzz/arrays.py --atheris -max_total_time=600 -rss_limit_mb=8192 corpus/
"""

import argparse
import sys
import time

import numpy as np


class RandomSource:
    """Decisions of a random number generator."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def integer(self, low, high):
        return int(self.rng.integers(low, high, endpoint=True))

    def data(self, count):
        return self.rng.bytes(count)


class ByteSource:
    """Decisions of the bytes that atheris gives, 0 when they are used up."""

    def __init__(self, data):
        self.bytes, self.at = data, 0

    def data(self, count):
        taken = self.bytes[self.at : self.at + count]
        self.at += count
        return taken + bytes(count - len(taken))

    def integer(self, low, high):
        width = ((high - low).bit_length() + 7) // 8
        return low + int.from_bytes(self.data(width), "little") % (high - low + 1) if width else low


def choose(source, options):
    return options[source.integer(0, len(options) - 1)]


def main(target, doc):
    """Run `target(source)`, which raises where the product is wrong, on many sources."""
    if "--atheris" in sys.argv:
        import atheris

        sys.argv.remove("--atheris")
        atheris.instrument_func(target)
        atheris.Setup(sys.argv, lambda data: target(ByteSource(data)))
        atheris.Fuzz()
        return
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("inputs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin, kinds = time.monotonic(), {}
    for number in range(arguments.inputs):
        try:
            kind = target(RandomSource([arguments.seed, number]))
        except BaseException:
            print(f"seed {arguments.seed}, input {number}", flush=True)
            raise
        kinds[kind] = kinds.get(kind, 0) + 1
    print(f"{arguments.inputs} inputs, seed {arguments.seed}, {time.monotonic() - begin:.0f} s: {kinds}")
