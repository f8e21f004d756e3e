"""A layer under signals, kills and forks: a few runs of each scenario of support/interruptions.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "support" / "interruptions.py"
SCENARIOS = [
    "a_handler_that_saves",
    "an_exception_in_training",
    "an_exception_in_load_state_dict",
    "evaluation_beside_load_state_dict",
    "fork",
    "a_handler_that_forks",
    "kill",
]

pytestmark = [
    pytest.mark.once,  # what is tested is the state of a layer, and the kernels do not touch it
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_layer_stays_whole(scenario):
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(PROGRAM), "3", "--only", scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 runs     0 failed" in done.stdout


def test_all_scenarios_are_run():
    done = subprocess.run([sys.executable, str(PROGRAM), "--help"], capture_output=True, text=True, timeout=60)
    assert "{" + ",".join(SCENARIOS) + "}" in done.stdout.replace("\n", "").replace(" ", "")
