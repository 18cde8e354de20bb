"""Flags of the sweep driver: those of `experiments.run`, and its own."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import helppage, hosts
from experiments import options as run_options
from experiments.grid import Axis, parse_grid
from noisefl.config import refuse

MOST_CPU_DEVICES = 8  # each holds a copy of the images

# What does not belong to a run, of the flags that are given with it.
NOT_OF_A_RUN = ("out", "resume", "checkpoint_every", "compilation_cache")

HELP = {
    "grid": "FLAG=VALUE,VALUE or, of whole numbers, FLAG=START:STOP; repeat it for more axes",
    "baseline": "also run FedAvg, once for all runs that differ in the noise alone",
    "dry_run": "print groups, lanes, compilations, and an estimate of time and memory; then end",
    "lanes_at_once": "runs side by side in one program: a number, or auto: what fits [runs]",
    "client_devices": "devices that share the clients of one run; the others are lanes [devices]",
    "cpu_devices": "devices that a CPU is split into, or auto: its cores, at most 8 [devices]",
    "distributed": "several processes on one mesh; all get the same flags and see one --out",
    "coordinator": "host:port of the first process; none: the cluster that JAX detects",
    "num_processes": "processes of the sweep, with --coordinator",
    "process_id": "which of them this is, from 0, with --coordinator",
}


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """One parsed command line.

    Attributes:
      given: values of all flags of `experiments.run`.
      axes: the grid.
      own: values of the flags in `HELP`.
      lanes_at_once: None is auto.
      cpu_devices: a number.
    """

    given: dict[str, Any]
    axes: tuple[Axis, ...]
    own: dict[str, Any]
    lanes_at_once: int | None
    cpu_devices: int

    @property
    def out(self) -> str:
        return self.given["out"]

    @property
    def rounds(self) -> int:
        return self.given["rounds"]

    @property
    def chunk(self) -> int:
        return self.given["rounds_per_chunk"]

    @property
    def checkpoint_every(self) -> int:
        return self.given["checkpoint_every"]

    @property
    def baseline(self) -> bool:
        return self.own["baseline"]

    @property
    def dry_run(self) -> bool:
        return self.own["dry_run"]

    @property
    def client_devices(self) -> int:
        return self.own["client_devices"]

    def start_devices(self) -> None:
        """Before the first use of a device: splits the CPU, joins the other processes."""
        # Once a device was used it is too late; the devices are then what they are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", self.cpu_devices)
        if self.own["distributed"]:
            places = (self.own[name] for name in ("coordinator", "num_processes", "process_id"))
            try:
                hosts.initialize(*places)
            except (RuntimeError, ValueError) as error:
                raise refuse("distributed", True, f"the processes did not meet: {error}") from None


def parse(argv: list[str]) -> SweepOptions | None:
    """Parses a command line, the program's name first; None after printing the help page.

    Raises:
      ValueError: one line about the first bad flag.
    """
    values = run_options.define()
    flags.DEFINE_multi_string("grid", [], HELP["grid"], flag_values=values)
    for name in ("baseline", "dry_run", "distributed"):
        flags.DEFINE_bool(name, name == "baseline", HELP[name], flag_values=values)
    for name in ("lanes_at_once", "cpu_devices"):
        flags.DEFINE_string(name, "auto", HELP[name], flag_values=values)
    flags.DEFINE_integer("client_devices", 1, HELP["client_devices"], flag_values=values)
    flags.DEFINE_string("coordinator", None, HELP["coordinator"], flag_values=values)
    for name in ("num_processes", "process_id"):
        flags.DEFINE_integer(name, None, HELP[name], flag_values=values)
    preset = run_options.read(argv, values)
    if any(values[name].value for name in helppage.HELP_FLAGS):
        print(_page())
        return None
    given = {name: values[name].value for name in run_options.defaults()}
    given["out"] = given["out"] or str(Path("results") / f"{preset}-sweep")
    own: dict[str, Any] = {name: values[name].value for name in HELP}
    if not own["distributed"]:
        for name in ("coordinator", "num_processes", "process_id"):
            if own[name] is not None:
                raise refuse(name, own[name], "needs --distributed")
    return SweepOptions(
        given=given,
        axes=parse_grid(own["grid"]),
        own=own,
        lanes_at_once=_count("lanes_at_once", own["lanes_at_once"], 2**31 - 1),
        cpu_devices=_count("cpu_devices", own["cpu_devices"], 1024)
        or min(os.cpu_count() or 1, MOST_CPU_DEVICES),
    )


def _count(name: str, text: str, most: int) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise refuse(name, text, f"must be a whole number from 1 to {most}, or auto")
    return int(text)


def _page() -> str:
    lines = [
        "python -m experiments.sweep [--flagfile=PRESET] [--grid=FLAG=VALUES …] [--FLAG=VALUE …]",
        "Runs every combination of the grid, many at once; started again, it goes on.",
        "",
    ]
    lines += [f"  --{name:<16} {text}" for name, text in HELP.items()]
    lines += ["", "and every flag of experiments.run (python -m experiments.run --helpshort), in a"]
    lines += ["grid or for all runs."]
    return "\n".join(lines)
