"""`SyncBatchNorm` over processes of gloo, against PyTorch's batch norm in float64 on the whole batch."""

import copy
import doctest
import importlib
import os
import pickle
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")
distributed = pytest.importorskip("torch.distributed")

from batchnorm.torch import SyncBatchNorm, convert, revert  # noqa: E402

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

PREAMBLE = """
    import sys
    import numpy as np
    import torch
    from torch import distributed
    from batchnorm.torch import SyncBatchNorm, convert
    torch.set_num_threads(1)
    folder, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    """


pytestmark = pytest.mark.once  # other tests compare the levels


def run(folder, ranks, body):
    """Each rank runs the same program; what they printed."""
    program = textwrap.dedent(PREAMBLE) + textwrap.dedent(body) + "\ndistributed.destroy_process_group()\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error::UserWarning:batchnorm", "-c", program, str(folder)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(ranks)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in ended]


TRAIN = """
    from batchnorm.mpi import exchange
    exchange.GATHERED = {gathered}
    generator = torch.Generator().manual_seed(20150211)
    cuts = [0, *np.cumsum({sizes})]
    module = SyncBatchNorm(5, momentum={momentum})
    seen = {{}}
    for step in range(3):
        x, dy = (torch.randn(cuts[-1], 5, 4, 3, generator=generator) * 2 + 10 for _ in range(2))
        own = slice(cuts[rank], cuts[rank + 1])
        leaf = x[own].contiguous(memory_format=torch.channels_last).requires_grad_()
        module.zero_grad()
        y = module(leaf)
        y.backward(dy[own])
        parameters = [p.grad.clone() for p in module.parameters()]
        for gradient in parameters:
            distributed.all_reduce(gradient)
        seen[step] = (y.detach(), leaf.grad, *parameters, *(b.clone() for b in module.buffers()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), parameters):
                parameter -= 0.01 * gradient
    assert (y.stride(), leaf.grad.stride()) == (leaf.stride(), leaf.stride())
    module.eval()
    seen["eval"] = (module(x[own]).detach(),)
    torch.save(seen, f"{{folder}}/{{rank}}")
    """


@pytest.mark.parametrize(
    ("sizes", "momentum", "gathered"),
    [([4, 4], 0.1, 2), ([5, 0, 2], None, 2), ([1, 1, 1, 1, 3], 0.3, 6)],
    ids=["even", "empty, one after another", "five"],
)
def test_one_batch_of_several_processes(tmp_path, sizes, momentum, gathered):
    """y, dx, the sums of the gradients, running statistics and counter; all ranks have the same bits of the latter."""
    run(tmp_path, len(sizes), TRAIN.format(sizes=sizes, momentum=momentum, gathered=gathered))
    seen = [torch.load(tmp_path / str(rank)) for rank in range(len(sizes))]
    generator = torch.Generator().manual_seed(20150211)
    module = torch.nn.BatchNorm2d(5, momentum=momentum).double()
    for step in range(3):
        x, dy = (torch.randn(sum(sizes), 5, 4, 3, generator=generator) * 2 + 10 for _ in range(2))
        leaf = x.double().requires_grad_()
        module.zero_grad()
        y = module(leaf)
        y.backward(dy.double())
        gradients = [p.grad for p in module.parameters()]
        expected = (y.detach(), leaf.grad, *gradients, *module.buffers())
        own = [rank[step] for rank in seen]
        for number, value in enumerate(expected):
            got = torch.cat([rank[number] for rank in own]) if number < 2 else own[0][number]
            assert float((got.double() - value).abs().max()) <= 2e-5 * max(1.0, float(value.abs().max()))
        for one, other in pairwise(own):
            assert all(torch.equal(a, b) for a, b in zip(one[4:], other[4:], strict=True))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.01 * gradient
    y = torch.cat([rank["eval"][0] for rank in seen])
    assert float((y - module.eval()(x.double()).detach()).abs().max()) < 1e-4


def test_a_rank_that_is_wrong_leaves_no_other_waiting(tmp_path):
    """Its own error there, one that names it elsewhere; the next step works, and no statistics have moved."""
    outputs = run(
        tmp_path,
        3,
        """
        module = SyncBatchNorm(3)
        for wrong in (torch.ones(4, 2), torch.ones(4, 3, dtype=torch.int64), torch.ones(4)):
            try:
                module(wrong if rank == 1 else torch.randn(4, 3))
            except Exception as error:
                print(type(error).__name__, error)
        assert module.num_batches_tracked == 0 and bool((module.running_mean == 0).all())
        x = torch.randn(4, 3, requires_grad=True)
        module(x).square().sum().backward()
        assert module.num_batches_tracked == 1 and x.grad is not None
        """,
    )
    for rank, output in enumerate(outputs):
        lines = output.splitlines()
        assert len(lines) == 3
        if rank == 1:
            assert [line.split()[0] for line in lines] == ["ValueError", "TypeError", "ValueError"]
        else:
            assert set(lines) == {"RuntimeError rank 1 refused its arguments; its own error says why"}


def test_groups_and_16_bits(tmp_path):
    """Ranks of a group alone are one batch; a converted module of PyTorch; parameters of bfloat16."""
    pytest.importorskip("ml_dtypes")
    outputs = run(
        tmp_path,
        4,
        """
        groups = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, groups[rank % 2])
        model = convert(model).to(torch.bfloat16)
        x = torch.full((2, 3), float(rank)).bfloat16().requires_grad_()
        y = model(x)
        y.sum().backward()
        assert type(model[0]) is SyncBatchNorm
        assert y.dtype == x.grad.dtype == model[0].weight.grad.dtype == torch.bfloat16
        assert bool((y.sign() == (-1 if rank < 2 else 1)).all())
        mean = {0: 1.0, 1: 2.0}[rank % 2]
        assert torch.allclose(model[0].running_mean.float(), torch.full((3,), 0.1 * mean), rtol=1e-2)
        try:
            torch.autograd.grad(torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)[0].sum(), x)
        except RuntimeError:
            print("no second derivative")
        """,
    )
    assert outputs == ["no second derivative\n"] * 4


def test_alone_it_is_batch_norm():
    """Also its second derivative; PyTorch's own class says that it needs a GPU."""
    module, other = SyncBatchNorm(3), torch.nn.BatchNorm1d(3)
    x = torch.randn(4, 3, 5)
    assert torch.allclose(module(x), other(x), atol=1e-6)
    assert torch.allclose(module.running_var, other.running_var)
    module = module.double()
    leaf = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, leaf)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again.eval()(leaf), module.eval()(leaf))
    theirs = torch.nn.SyncBatchNorm(3)
    assert type(convert(theirs)) is SyncBatchNorm
    assert type(revert(theirs)) is torch.nn.SyncBatchNorm


@pytest.mark.parametrize("name", ["sync", "conversion"])
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(f"batchnorm.torch.{name}"))
    assert (failed, tried > 0) == (0, True)
