"""A few hundred inputs of each fuzz target, always the same; `tests/fuzz/` runs them by the million."""

import warnings

import pytest
from fuzz import arrays, state_files
from fuzz.source import ByteSource, RandomSource


@pytest.mark.parametrize("target", [arrays.target, state_files.target], ids=["arrays", "state files"])
def test_random_inputs(target):
    found = set()
    for number in range(400):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy, about headers that it has to guess
            found.add(target(RandomSource([20150211, number])))
    assert {"refused"} < found


@pytest.mark.parametrize("target", [arrays.target, state_files.target], ids=["arrays", "state files"])
@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"\xff" * 64], ids=["nothing", "zeros", "ones"])
def test_inputs_of_few_bytes(target, data):
    target(ByteSource(data))
