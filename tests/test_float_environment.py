"""The processor's modes of floating-point arithmetic: never changed, in no thread, and without influence on results."""

import platform
import sys

import numpy as np
import pytest
from processes import succeeds
from test_bits import digest

import batchnorm as bn

# fegetenv's structure on x86-64 ends with MXCSR: 6 flags that stick, then the modes, FTZ the highest and DAZ bit 6.
MODES = """
import ctypes
libm = ctypes.CDLL("libm.so.6")
def modes():
    environment = (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    return environment[7] & ~0x3F
def flush_subnormals():
    environment = (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    environment[7] |= 0x8040
    libm.fesetenv(environment)
"""

x86 = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="reads MXCSR as glibc on x86-64 has it",
)


@x86
def test_import_and_calls_leave_the_modes(level):
    program = """
before = modes()
import numpy as np
import batchnorm as bn
from batchnorm import _threads
after_import = modes()
x = np.random.default_rng(0).standard_normal((64, 32, 20, 20))
y, saved = bn.forward(x, num_threads=2)
bn.backward(y, saved, num_threads=2)
print(before == after_import == modes())
"""
    assert succeeds(MODES + program, BATCHNORM_ISA=level) == "True"


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_subnormal_numbers_pass_every_thread(dtype):
    smallest = np.finfo(dtype).smallest_subnormal
    x = np.arange(1, 4 * 300 * 200 + 1).reshape(1200, 200).astype(dtype) * smallest
    y = bn.inference(x, np.zeros(200), np.ones(200), eps=0.0, num_threads=4)
    assert y.tobytes() == x.tobytes()
    assert (y > 0).all()


@pytest.mark.slow
@x86
def test_a_process_that_flushes_subnormals_gets_the_same_bits(level):
    """As some libraries make it; ordinary data has none."""
    assert digest({"BATCHNORM_ISA": level}, MODES + "flush_subnormals()") == digest({"BATCHNORM_ISA": level})
