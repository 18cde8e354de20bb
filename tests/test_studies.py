"""The study of the readings: its flags are the driver's, and each reading is another run."""

import json
import subprocess
import sys

CODE = """
import json, pathlib
from absl import flags
flags.FLAGS.mark_as_parsed()
from experiments.studies.readings import READINGS, command
from experiments.sweep.options import parse
lines = {name: ["run", *command(name, "0", pathlib.Path("out"))] for name in READINGS}
print(json.dumps({name: parse(line).setup({}).flags for name, line in lines.items()}))
"""


def test_each_reading_is_another_run():
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len({json.dumps(flags) for flags in found.values()}) == len(found)
    base = found["literal, geometric step"]
    for name, changed in {
        "literal": {"calibrator": "additive", "noise_scale": "absolute", "validation_size": 5000},
        "keep-best": {"owner": "keep_best+server_clients"},
        "next base = G": {"owner": "feeds_back+server_clients"},
        "4m server-side clients": {"server_clients": "4m"},
    }.items():
        assert changed.items() <= found[name].items()
        assert not changed.items() & base.items()
