"""The throughput benchmark from outside: what it writes and what it refuses. Its figures prove
nothing here."""

import json
import subprocess
import sys

import pytest

KEYS = {
    *("workload", "backend", "strategy", "seconds_per_round", "client_steps_per_second"),
    *("gflops", "gemm_gflops", "fraction_of_gemm", "torch_ratio", "compile_seconds"),
    *("peak_memory_bytes", "images", "evaluation_fraction_of_gemm"),
}


def bench(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.bench_throughput", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_writes_what_it_measured(tmp_path):
    file = tmp_path / "bench.json"
    done = bench("--workloads=lenet", "--cohort=2", "--turns=1", f"--json={file}")
    assert done.returncode == 0, done.stderr
    [result] = json.loads(file.read_text())
    assert set(result) >= KEYS
    assert result["images"] == "synthetic"
    assert "synthetic images" in done.stdout
    assert result["torch_ratio"] is None
    # Two clients of 55 steps: the rates are of the same seconds.
    per_round = result["client_steps_per_second"] * result["seconds_per_round"]
    assert per_round == pytest.approx(110)
    ratio = result["gflops"] / result["gemm_gflops"]
    assert result["fraction_of_gemm"] == pytest.approx(ratio)  # of one turn, so the same


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--workloads=lenett", "workloads='lenett': must be one of mcmahan, femnist, cifar10, le"),
        ("--conv=winogard", "conv='winogard': must be one of auto, patches, winograd, lax (did"),
        ("--cohort=101", "cohort=101: must be 2 to the 100 clients of mcmahan"),
        ("--clients_at_once=-1", "clients_at_once='-1': must be a whole number, or auto"),
        ("--json=/no/such/folder/b.json", "/no/such/folder/b.json"),
        ("extra", "unexpected argument 'extra'"),
    ],
)
def test_bad_input_is_one_line(flag, says):
    done = bench(flag)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "xla_bridge" not in line]
    assert len(lines) == 1, done.stderr
    assert says in lines[0]
