"""Programs in their own process, so that a hang, an exit or a setting ends with them."""

import os
import subprocess
import sys

WORKLOAD = """
import numpy as np
import batchnorm as bn
from batchnorm import _threads

x = np.random.default_rng(0).standard_normal((64, 32, 20, 20)).astype(np.float32)
ones = np.ones(32, np.float32)

def results(threads=2):
    y, saved = bn.forward(x, ones, ones, num_threads=threads)
    dx, dgamma, dbeta = bn.backward(x, saved, num_threads=threads)
    return y.tobytes() + dx.tobytes() + dgamma.tobytes() + dbeta.tobytes()
"""


def search_path(*folders):
    """PYTHONPATH with these folders first; its old entries stay, such as a build of the package with sanitizers."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def python(program, *flags, timeout=60, **environment):
    """Run a program in this environment with these changes; a value of None removes a variable."""
    merged = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run(
        [sys.executable, *flags, "-c", program], env=merged, capture_output=True, text=True, timeout=timeout
    )


def succeeds(program, *flags, timeout=60, **environment):
    """The output of a program that must end without an error."""
    run = python(program, *flags, timeout=timeout, **environment)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}{run.stderr}"
    return run.stdout.strip()
