"""The sweep benchmark: what it measures, and what it refuses before minutes of work."""

import json
import subprocess
import sys

import pytest
from bench_flags import check_refusals


def test_bad_input_is_refused_first():
    says = {
        "--cpu_devices=1,a": "cpu_devices='a': must be whole numbers from 1 to 64",
        "--processes=0": "processes='0': must be whole numbers from 1 to 64",
        "--preset=quikstart": "did you mean quickstart",
        "--json=/no/such/folder/b.json": "/no/such/folder/b.json",
    }
    check_refusals("experiments.bench_sweep", says)


@pytest.mark.slow
def test_a_run_alone_and_a_sweep(tmp_path):
    (tmp_path / "small.flags").write_text("--preset=quickstart\n--model=mlp\n--local_test_size=1")
    file = tmp_path / "bench.json"
    flags = f"--preset={tmp_path}/small.flags --lanes=2 --rounds=2 --cpu_devices=2 --json={file}"
    command = [sys.executable, "-m", "experiments.bench_sweep", *flags.split(), "--processes="]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    alone, sweep, provenance = json.loads(file.read_text())
    assert [(r["runs"], r["devices"], r["processes"]) for r in (alone, sweep)] == [
        (1, 1, 1), (2, 2, 1),
    ]  # fmt: skip
    assert sweep["ratio"] == pytest.approx(sweep["seconds_a_run"] / alone["seconds"])
    assert all(0 < result["outside_programs"] < 1 for result in (alone, sweep))
    assert "versions" in provenance
