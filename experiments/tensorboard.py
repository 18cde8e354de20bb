"""The runs of a sweep as TensorBoard event files."""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from experiments.sweep_results import Run, Sweep, describe, rounds
from noisefl.config import refuse


def writer_of(directory: str) -> Any:
    """The class that writes event files.

    Raises:
      ValueError: tensorboardX, which is optional, is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        allowed = "needs tensorboardX: pip install 'noisefl[tensorboard]'"
        raise refuse("tensorboard", directory, allowed) from None
    return SummaryWriter


def export(sweep: Sweep, directory: str) -> None:
    """Writes each complete run, failed ones too, into a folder of its own; replaces older ones.

    Numbers are scalars of their name at their round, and null is left out; the options are a text.

    Raises:
      ValueError: tensorboardX is not installed, or a metrics.jsonl is damaged.
      OSError: the directory is not writable.
    """
    writer_class = writer_of(directory)
    for run in sweep.runs.values():
        folder = Path(directory) / name_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):  # TensorBoard would show both
            old.unlink()
        config = json.loads((sweep.folder / run.path / "config.json").read_text())
        with writer_class(str(folder)) as writer:
            writer.add_text("hparams", _as_table(config["options"]), 0)
            for row in rounds(sweep.folder, run):
                for name, value in row.items():
                    if name != "round" and isinstance(value, bool | int | float):
                        writer.add_scalar(name, value, row["round"])


def name_of(run: Run) -> str:
    """`noise,cap=0.4,calibrator=sequential,3f2a/seed=0`: to be read in TensorBoard's list, and
    told from all others by the digest."""
    path = PurePosixPath(run.path)
    values = describe({flag: value for flag, value in run.values.items() if flag != "seed"})
    readable = ",".join(part for part in (run.kind, values.replace(", ", ",")) if part)
    readable = re.sub(r"[^\w.,=+-]", "_", readable)[:120]  # a name, and not too long for one
    return f"{readable},{path.parent.name}/{path.name}"


def _as_table(options: dict[str, Any]) -> str:
    lines = ["| flag | value |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | `{value}` |" for name, value in options.items())])
