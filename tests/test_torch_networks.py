"""Whole networks of torchvision, converted, against the same in PyTorch's own modules."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
models = pytest.importorskip("torchvision.models")

from batchnorm.torch import convert, revert  # noqa: E402

MEMORY = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}


pytestmark = pytest.mark.once  # other tests compare the levels


def network(name):
    torch.manual_seed(20150211)
    options = {"dropout": 0.0} if name == "mobilenet_v2" else {}
    return getattr(models, name)(num_classes=10, **options)


def gradients(model, x, labels):
    """The outputs and the gradients of a step, in float64."""
    model.zero_grad()
    outputs = model(x.to(next(model.parameters()).dtype))
    torch.nn.functional.cross_entropy(outputs, labels).backward()
    return {"outputs": outputs.detach().double()} | {n: p.grad.double() for n, p in model.named_parameters()}


def distance(got, expected):
    """The largest difference between two sets of tensors, by the norm of each."""
    floor = 1e-3 * max(float(value.norm()) for value in expected.values())
    return max(float((got[n] - value).norm()) / max(float(value.norm()), floor) for n, value in expected.items())


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_twenty_steps_of_training(name, memory):
    """Each from the state that PyTorch's has: rounding makes runs of a network part, and a state goes either way."""
    theirs = network(name).double().to(memory_format=MEMORY[memory])
    ours = convert(copy.deepcopy(theirs))
    step = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    for _ in range(20):
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(4, 3, 64, 64, dtype=torch.float64).to(memory_format=MEMORY[memory])
        labels = torch.randint(10, (4,))
        expected, got = (gradients(model, x, labels) for model in (theirs, ours))
        assert distance(got, expected) < 1e-9
        buffers = (dict(model.named_buffers()) for model in (ours, theirs))
        assert distance(*({n: value.double() for n, value in each.items()} for each in buffers)) < 1e-13
        step.step()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    back = network(name).double().eval()
    back.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert distance({"y": ours.eval()(x)}, {"y": back(x)}) < 1e-12
        assert distance({"y": revert(ours)(x)}, {"y": back(x)}) < 1e-12


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_float32_is_as_near_to_the_truth(name, memory):
    theirs = network(name).to(memory_format=MEMORY[memory])
    x, labels = torch.randn(4, 3, 64, 64).to(memory_format=MEMORY[memory]), torch.randint(10, (4,))
    exact = gradients(copy.deepcopy(theirs).double(), x, labels)
    ours = gradients(convert(copy.deepcopy(theirs)), x, labels)
    assert distance(ours, exact) < 2 * distance(gradients(theirs, x, labels), exact)


def test_the_example_compares_both(tmp_path):
    """Equal losses at first, and a picture."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    script = Path(__file__).parents[1] / "examples" / "torch_resnet.py"
    command = [sys.executable, "-W", "error", str(script), "--steps", "3", "--batch", "8", "--plot", "two.png"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"(torch\.nn|batchnorm\.torch) +([-+.\de]+) +[\d.]+ +[\d.]+ +-?\d+%", done.stdout)
    assert [name for name, _ in rows] == ["torch.nn", "batchnorm.torch"] * 2
    assert all(float(off) < 1e-2 for _, off in rows)
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
