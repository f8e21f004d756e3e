"""In one process with a framework that brings its own OpenMP: right answers, in either order of import; forks too."""

import importlib.util

import pytest
from processes import WORKLOAD, succeeds

ORDERS = {
    "this package first": ["import batchnorm", "import torch"],
    "torch first": ["import torch", "import batchnorm"],
}

PROGRAM = (
    WORKLOAD
    + """
import os
import torch
from threadpoolctl import threadpool_info

pytestmark = pytest.mark.once  # which OpenMP is loaded does not depend on the level

expected = results(1)
weight = torch.ones(32)
theirs = lambda: torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, weight, weight, training=True)
want = theirs().numpy()
for _ in range(20):
    assert results(2) == expected
    assert abs(theirs().numpy() - want).max() < 1e-6
    assert abs(bn.forward(x, ones, ones, num_threads=2)[0] - want).max() < 1e-5
child = os.fork()
if child == 0:
    os._exit(0 if results(2) == expected else 1)
assert os.waitpid(child, 0)[1] == 0
assert results(2) == expected
print(sum(info["user_api"] == "openmp" for info in threadpool_info()), bn.get_num_threads())
"""
)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("setting", [{}, {"OMP_PROC_BIND": "true"}, {"OMP_NUM_THREADS": "1"}], ids=str)
def test_beside_torch(order, setting, level):
    program = "\n".join([*ORDERS[order], PROGRAM])
    runtimes, threads = map(
        int, succeeds(program, "-W", "ignore::DeprecationWarning", BATCHNORM_ISA=level, timeout=120, **setting).split()
    )
    assert runtimes >= 1
    assert threads >= 1
