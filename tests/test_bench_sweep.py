"""The sweep benchmark refuses what it could only notice after minutes of work."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--cpu_devices=1,a", "cpu_devices='a': must be whole numbers from 1 to 64"),
        ("--processes=0", "processes='0': must be whole numbers from 1 to 64"),
        ("--preset=quikstart", "did you mean quickstart"),
        ("--json=/no/such/folder/b.json", "/no/such/folder/b.json"),
    ],
)
def test_bad_input_is_refused_first(flag, message):
    command = [sys.executable, "-m", "experiments.bench_sweep", flag]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("experiments.bench_sweep: ")
    assert message in line
