"""How drivers begin and end: help, typos, signals and closed pipes, in processes of their own."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from small_runs import LIMIT, ROOT

DRIVERS = ("run", "report", "plot", "frontier", "bench_sweep", "studies.readings")
# As `python -m` begins one, before it is imported: then it says that it is there, and waits.
WAITS = """
import sys, time
sys.argv, sys.orig_argv = ["-m"], ["python", "-m", "experiments.NAME", "--out=a b"]
import experiments
sys.argv = ["experiments.NAME"]
print("ready", flush=True)
time.sleep(60)
"""


def started(*command: str, **environment: str) -> subprocess.Popen[str]:
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, **environment}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, text=True, **pipes)


@pytest.mark.parametrize("name", DRIVERS)
def test_help_is_its_own_in_any_encoding(name):
    process = started("-m", f"experiments.{name}", "--help", PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert f"python -m experiments.{name}" in out.splitlines()[0]
    assert "--" in out


def test_a_typo_of_a_benchmarks_flag_is_one_line():
    process = started("-m", "experiments.bench_sweep", "--lnes=3")
    _, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, len(err.splitlines())) == (2, 1), err
    assert err.startswith("experiments.bench_sweep: ")
    assert "lnes" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("name", "more"), [("run", "; go on with: python -m experiments.run '--out=a b'"), ("plot", "")]
)
def test_a_signal_is_one_line_from_the_start(name, more, number):
    process = started("-c", WAITS.replace("NAME", name))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT)
    assert err == f"experiments.{name}: interrupted{more}\n"
    assert process.returncode == 130


def test_what_is_ignored_stays_ignored():
    """As `nohup` and a shell's `&` ask for."""
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    process = started("-c", ignore + WAITS.replace("NAME", "run").replace("60", "0.2"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=LIMIT)[1] == ""
    assert process.returncode == 0


def test_a_closed_pipe_is_silent():
    """Of a driver that prints after nobody reads any more."""
    code = (
        "import sys\n"
        "from experiments.command import end\n"
        "def main(argv):\n"
        "    sys.stdin.readline()\n"
        "    print('x' * 100_000)\n"
        "end(main)\n"
    )
    reader, writer = os.pipe()
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": writer, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)
    os.close(writer)
    os.close(reader)
    _, err = process.communicate("go\n", timeout=LIMIT)
    assert (process.returncode, err) == (141, "")


def test_the_library_of_drivers_installs_no_handlers():
    code = (
        "import signal; before = signal.getsignal(signal.SIGINT)\n"
        "import experiments.interrupt\n"
        "assert signal.getsignal(signal.SIGINT) is before"
    )
    process = started("-c", code)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
