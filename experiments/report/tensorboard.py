"""The runs of a folder as TensorBoard event files."""

import json
import re
from pathlib import Path
from typing import Any

from experiments.report.results import Sweep, describe, rows
from noisefl.errors import refuse


def writer_of(directory: str) -> Any:
    """The class that writes event files, into a folder that is there from then on.

    Raises:
      ValueError: tensorboardX, which is optional, is not installed; the folder is not writable.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        allowed = "needs tensorboardX: pip install 'noisefl[tensorboard]'"
        raise refuse("tensorboard", directory, allowed) from None
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise refuse("tensorboard", directory, f"is not writable ({error})") from None
    return SummaryWriter


def export(sweep: Sweep, directory: str) -> None:
    """Writes each complete run, failed ones too, into a folder of its own; replaces older ones.

    Numbers are scalars of their name at their round, and null is left out; the options are a text.

    Raises:
      ValueError: tensorboardX is not installed, or a metrics.jsonl is damaged.
      OSError: the directory is not writable.
    """
    writer_class = writer_of(directory)
    for _, run in sweep.runs[sweep.runs["complete"]].iterrows():
        folder = Path(directory) / name_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):  # TensorBoard would show both
            old.unlink()
        options = json.loads((run["folder"] / "config.json").read_text())["options"]
        lines = [f"| {name} | `{value}` |" for name, value in options.items()]
        with writer_class(str(folder)) as writer:
            writer.add_text("hparams", "\n".join(["| flag | value |", "| --- | --- |", *lines]), 0)
            for row in rows(run["folder"], run["run"]):
                for name, value in row.items():
                    if name != "round" and isinstance(value, bool | int | float):
                        writer.add_scalar(name, value, row["round"])


def name_of(run: Any) -> str:
    """`noise,cap=0.4,calibrator=sequential,3f2a/seed=0`: to be read in TensorBoard's list, and
    told from all others by the configuration's digest."""
    values = describe(run["grid"], "seed").replace(", ", ",")
    readable = ",".join(part for part in (run["run"], values) if part)
    readable = re.sub(r"[^\w.,=+-]", "_", readable)[:120]  # a name, and not too long for one
    parts = dict.fromkeys([readable, run["configuration"]])  # of a single run they are the same
    return f"{','.join(parts)}/seed={run['seed']}"
