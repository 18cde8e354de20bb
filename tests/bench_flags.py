"""What a benchmark says of flags that it refuses: in a process of its own, because the flags of two
benchmarks do not go into one."""

import subprocess
import sys

CODE = """
import importlib, sys
from absl import flags
from absl.testing import flagsaver
bench = importlib.import_module(sys.argv[1])
flags.FLAGS.mark_as_parsed()
for flag in sys.argv[2:]:
    with flagsaver.flagsaver():
        try:
            bench.main(flags.FLAGS([sys.argv[1], flag]))
        except SystemExit as error:
            assert error.code == 2
"""


def check_refusals(module: str, says: dict[str, str]) -> None:
    """Each flag alone is refused in one line that holds its message."""
    command = [sys.executable, "-c", CODE, module, *says]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("experiments")]
    assert len(lines) == len(says), done.stdout + done.stderr
    for line, message in zip(lines, says.values(), strict=True):
        assert line.startswith(f"{module}: ")
        assert message in line
