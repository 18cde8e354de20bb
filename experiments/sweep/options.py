"""From a command line to what is run: the driver's own options, and one checked set-up a run."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.flags import fields, grid, helppage
from experiments.flags.fields import Flag
from noisefl import presets
from noisefl.data import Deal
from noisefl.errors import nearest, refuse
from noisefl.experiment import Experiment
from noisefl.measure import Measure, Standard, Thieves
from noisefl.models import MODELS
from noisefl.parts import Part, changed, choice, part, size, switch, text, walk

FILES = Path(__file__).parent.parent / "flags" / "presets"
DEFAULT_FILE = "quickstart"
HELP = ("help", "helpshort", "helpfull")
MOST_CPU_DEVICES = 8  # each holds a copy of the images


@part
class Driver(Part):
    """Options of the driver itself."""

    dataset: str = text(
        "mnist", "mnist (embedded), a TFDS name, a folder of idx files, or an .npz file"
    )
    data_dir: str = text(
        "", "folder of TFDS data or of original .gz files; empty: ~/tensorflow_datasets"
    )
    preset: str = text("quickstart", "experiment to begin from: a name, or module:function")
    model: str = choice("preset", ("preset", *MODELS), "network; preset: that of the preset")
    rounds: int = size(100, "rounds of each run", unit="rounds")
    seed: int = size(
        0, "of partition, initial model and every draw; FedAvg shares it", low=0, high=2**31 - 1
    )
    out: str = text("", "folder of the results; empty: results/<flag file>")
    grid: str = text("", "FLAG=VALUE,VALUE or, of whole numbers, FLAG=START:STOP; repeat for more")
    baseline: bool = switch(True, "also run FedAvg, once for all runs that need the same")
    dry_run: bool = switch(False, "estimate compilations, time and memory; write nothing")
    rounds_per_chunk: int = size(
        1, "rounds in one call of the device; more is faster on a GPU", unit="rounds"
    )
    checkpoint_every: int = size(5, "rounds between checkpoints, at ends of chunks", unit="rounds")
    compilation_cache: str = text(
        "auto", "folder of compiled programs, auto: in the user's cache, or off"
    )
    lanes_at_once: int | None = size(
        None, "runs side by side in one program", unit="runs", none="what fits"
    )
    client_devices: int | None = size(
        None,
        "devices that share the clients and evaluations of one run; the others are lanes",
        unit="devices",
        none="those that are more than runs",
    )
    cpu_devices: int | None = size(
        None, "devices that a CPU is split into", unit="devices", high=1024, none="its cores, to 8"
    )
    distributed: bool = switch(
        False, "several processes on one mesh; all get the same flags and see one --out"
    )
    coordinator: str = text("", "host:port of the first process; empty: the cluster is detected")
    num_processes: int | None = size(
        None, "processes of the sweep, with --coordinator", none="the cluster's"
    )
    process_id: int | None = size(
        None, "which of them this is, from 0", low=0, none="the cluster's"
    )

    def check(self) -> None:
        if not self.distributed:
            for name in ("coordinator", "num_processes", "process_id"):
                if getattr(self, name) not in ("", None):
                    raise refuse(name, getattr(self, name), "needs --distributed")

    def start_devices(self) -> None:
        """Before the first use of a device: splits the CPU, joins the other processes."""
        from experiments.sweep import hosts

        devices = self.cpu_devices or min(os.cpu_count() or 1, MOST_CPU_DEVICES)
        # Once a device was used it is too late; the devices are then what they are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)
        if self.distributed:
            try:
                hosts.initialize(self.coordinator or None, self.num_processes, self.process_id)
            except (RuntimeError, ValueError) as error:
                allowed = f"the processes did not meet, by --coordinator=HOST:PORT or else: {error}"
                raise refuse("distributed", True, allowed) from None


# Flags that a run has and a sweep has only once, and why.
WHOLE_SWEEP = {
    "out": "one folder holds all runs",
    "grid": "it is the grid",
    "preset": "what is varied begins from one experiment",
    "rounds": "runs are compared at equal length",
    "data_dir": "all runs read the same folder",
    **dict.fromkeys(("rounds_per_chunk", "checkpoint_every"), "no result depends on it"),
    **dict.fromkeys(
        ("baseline", "dry_run", "compilation_cache", "lanes_at_once", "client_devices",
         "cpu_devices", "distributed", "coordinator", "num_processes", "process_id"),
        "all runs share it",
    ),
}  # fmt: skip
OF_A_RUN = ("dataset", "model", "rounds", "seed")  # what of the driver's a result depends on


@dataclasses.dataclass(frozen=True)
class Setup:
    """One run, checked as far as that goes without data.

    Attributes:
      experiment: numbers [].
      deal: of the training images.
      measures: what is recorded.
      driver: dataset, model, seed and rounds among them.
      flags: what its result depends on, JSON values by flag.
    """

    experiment: Experiment
    deal: Deal
    measures: Measure
    driver: Driver
    flags: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class CommandLine:
    """One parsed command line.

    Attributes:
      driver: its own options; `out` is filled in.
      axes: the grid.
      points: of a grid that is no product of its axes: their values, point by point.
      given: values of the flags that were given, by path, without the driver's.
      preset: name of the flag file, or of the preset where that alone is given.
      start: the experiment and the measures that flags change.
      known: all flags by name.
    """

    driver: Driver
    axes: tuple[grid.Axis, ...]
    given: dict[fields.Path, Any]
    preset: str
    start: tuple[Experiment, Measure]
    known: dict[str, Flag]
    points: tuple[dict[str, Any], ...] = ()

    @property
    def single(self) -> bool:
        """No grid: FedAvg and the scheme, on one seed."""
        return not self.axes

    @property
    def out(self) -> str:
        return self.driver.out

    def path_of(self, name: str) -> fields.Path:
        """Where a flag lies; what no flag can set is called by its path."""
        return self.known[name].path if name in self.known else tuple(name.split("."))

    def at(self, points: Sequence[dict[str, Any]]) -> "CommandLine":
        """With a grid that is a list of points instead of a product.

        Args:
          points: values of flags, as `Flag.parse` gives them.

        Raises:
          ValueError: as `setups`; more than `grid.MOST`.
        """
        if len(points) > grid.MOST:
            raise refuse("grid", f"{len(points)} points", f"must be at most {grid.MOST}")
        axes: dict[str, dict[Any, None]] = {}
        for name, value in (item for point in points for item in point.items()):
            axes.setdefault(name, {})[value] = None
        made = tuple(grid.Axis(name, tuple(values)) for name, values in axes.items())
        command = dataclasses.replace(self, axes=made, points=tuple(points))
        command.setups()
        return command

    def setup(self, values: Mapping[str, Any]) -> Setup:
        """The run with these values of the grid.

        Raises:
          ValueError: values that do not go together.
        """
        return self._setup(values, {})[0]

    def setups(self) -> list[tuple[dict[str, Any], Setup]]:
        """Every combination of the grid, as far as its run has the flags, and that run.

        Raises:
          ValueError: as `setup`; a flag that none of the runs has.
        """
        return self._every

    @functools.cached_property
    def _every(self) -> list[tuple[dict[str, Any], Setup]]:
        found, read, trees = [], set[fields.Path](), {}
        for values in self.points or grid.combinations(self.axes):
            setup, has = self._setup(values, trees)
            found.append(({n: v for n, v in values.items() if self.path_of(n) in has}, setup))
            read |= has
        varied = {self.path_of(axis.flag): axis.values for axis in self.axes}
        for path, value in {**self.given, **varied}.items():
            if path not in read:
                flag = next(flag for flag in self.known.values() if flag.path == path)
                values = ",".join(map(fields.shown, value if path in varied else (value,)))
                owners = ", ".join(fields.name_of(cls) for cls in flag.owners)
                have = f"is of {owners} alone, and none of these is chosen"
                if path in varied:
                    raise refuse("grid", f"{flag.name}={values}", f"{flag.name} {have}")
                raise refuse(flag.name, value, have)
        return found

    def _setup(
        self, values: Mapping[str, Any], trees: dict[Any, Any]
    ) -> tuple[Setup, set[fields.Path]]:
        """The run with these values, and the paths of flags that it has.

        Args:
          values: of the grid, by flag.
          trees: what was built before, for runs that differ in nothing but the driver's flags.
        """
        given = {**self.given, **{self.path_of(name): value for name, value in values.items()}}
        own = {path: given.pop(path) for path in list(given) if path[0] in fields.specs(Driver)}
        driver = self.driver.replace(**{name: value for (name,), value in own.items()})
        same = (driver.model, *given.items())
        if same not in trees:
            names = {flag.path: flag.name for flag in self.known.values()}
            (experiment, measures), read = self.start, set[fields.Path]()
            if driver.model != "preset":
                experiment = experiment.replace(model=MODELS[driver.model]())
            parts = [
                (path, fields.applied(root, path, given, names, read))
                for path, root in _roots(experiment, measures)
            ]
            parts[2] = parts[2][0], followed(parts[2][1], driver.rounds)
            texts = {
                names.get(path, ".".join(path)): value
                for first, root in parts
                for path, value in fields.described(root, first)
            }
            trees[same] = [root for _, root in parts], texts, read
        (experiment, deal, measures), texts, read = trees[same]
        texts = {**{name: getattr(driver, name) for name in OF_A_RUN}, **texts}
        return Setup(experiment, deal, measures, driver, texts), read | set(own)


def _roots(experiment: Experiment, measures: Measure) -> list[tuple[fields.Path, Part]]:
    return [((), experiment), (("data",), Deal()), (("measure",), measures)]


def followed(measures: Measure, rounds: int) -> Measure:
    """The measures, told the last round where views are of many."""
    kept = [place.value for place in walk(measures) if place.name == "kept_copies"]
    return changed(measures, Thieves, until=rounds) if kept and kept[0] > 1 else measures


def preset_of(name: str) -> tuple[Experiment, Measure]:
    """What a function of `noisefl.presets`, or module:function of yours, returns; and what that
    module calls MEASURE, or else the standard measures.

    Raises:
      ValueError: there is no such function, or it returns something else.
    """
    module, colon, function = name.rpartition(":")
    functions = inspect.getmembers(presets, inspect.isfunction)
    names = [name for name, one in functions if one.__module__ == presets.__name__]
    if not colon and name not in names:
        raise refuse("preset", name, f"{nearest(name, names)}, or module:function")
    try:
        source = importlib.import_module(module) if colon else presets
    except Exception as error:  # a module of yours may do anything
        raise refuse("preset", name, f"cannot be imported ({_line(error)})") from None
    found = getattr(source, function, None)
    try:
        experiment = found() if callable(found) else found
    except Exception as error:
        raise refuse("preset", name, f"{function} fails ({_line(error)})") from None
    if not isinstance(experiment, Experiment):
        allowed = f"{module} must have a function {function} that returns a noisefl.Experiment"
        raise refuse("preset", name, allowed)
    measures = getattr(source, "MEASURE", None) or Standard(thieves=Thieves())
    if not isinstance(measures, Measure):
        raise refuse("preset", name, f"MEASURE of {module} must be a noisefl.measure.Measure")
    return experiment, measures


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def parse(argv: list[str], beside: Iterable[str] = ()) -> CommandLine | None:
    """Parses a command line, the program's name first.

    Args:
      beside: names of flags that a driver around this one has read already.

    A flag file is read before everything else, wherever its flag stands, so that each flag given
    overrides it. Without `--flagfile` it is `DEFAULT_FILE`.

    Returns:
      None after printing the help page.

    Raises:
      ValueError: one line about the first bad flag.
    """
    files, rest = named("flagfile", argv[1:])
    read = [find_file(name) for name in files or [DEFAULT_FILE]]
    words = [*(word for file in read for word in read_file(file)), *rest]
    # A user's parts are flags as soon as their module is imported, so it is imported first.
    begin = ["quickstart", *named("preset", words)[0]][-1]
    own = named("preset", rest)[0] and not files
    name = begin.split(":")[0].split(".")[-1] if own else read[-1].stem
    start = preset_of(begin)
    known = catalogue(start)
    values = _absl(known, [argv[0], *words], beside)
    given = {
        flag.path: flag.parse(fields.shown(values[flag.name].value))
        for flag in known.values()
        if values[flag.name].present and flag.name != "grid"
    }
    mine = {path[0]: given.pop(path) for path in list(given) if path[0] in fields.specs(Driver)}
    driver = Driver(**mine)
    if any(values[one].value for one in HELP):
        print(_page(driver, start, known, given, [file.stem for file in read]))
        return None
    axes = grid.parse_grid(values["grid"].value or [], known, WHOLE_SWEEP)
    out = driver.out or str(Path("results") / f"{name}{'-sweep' if axes else ''}")
    command = CommandLine(driver.replace(out=out), axes, given, name, start, known)
    command.setups()
    return command


def catalogue(start: tuple[Experiment, Measure]) -> dict[str, Flag]:
    """All flags by name: of every part that any experiment may hold, and the driver's."""
    return fields.catalogue([*_roots(*start), ((), Driver())])


def _absl(
    known: Mapping[str, Flag], argv: Sequence[str], beside: Iterable[str]
) -> flags.FlagValues:
    """Parsed by absl, into a set of flags of its own: the process-wide one holds other
    libraries'."""
    values = flags.FlagValues()
    for flag in known.values():
        path = ".".join(flag.path)
        both = {"flag_values": values, "short_name": flag.name if flag.name != path else None}
        if flag.name == "grid":
            flags.DEFINE_multi_string(path, [], flag.spec.help, **both)
        elif flag.spec.kind == "switch":
            flags.DEFINE_bool(path, None, flag.spec.help, **both)
        else:
            flags.DEFINE_string(path, None, flag.spec.help, **both)
    for name in HELP:
        flags.DEFINE_bool(name, False, "this page", flag_values=values)
    try:
        if unparsed := values(list(argv))[1:]:
            raise ValueError(f"unexpected argument {unparsed[0]!r}: flags begin with --")
    except flags.UnrecognizedFlagError as error:
        what = fields.hint(error.flagname, known.values(), "--", beside)
        raise ValueError(f"--{error.flagname} is no flag ({what})") from None
    except flags.Error as error:
        match = re.match(r"flag --([\w.]+)=(.*?): ", str(error), re.DOTALL)
        if match is None:
            raise ValueError(" ".join(str(error).split())) from None
        flag = fields.find(match[1], known)
        raise refuse(flag.name if flag else match[1], match[2], "must be true or false") from None
    return values


def _page(
    driver: Driver, start: tuple[Experiment, Measure], known: Mapping[str, Flag],
    given: Mapping[fields.Path, Any], read: Sequence[str],
) -> str:  # fmt: skip
    """Of what would run: the preset, under what the command line and its flag files give."""
    roots = [*_roots(*start), ((), driver)]
    tree = {p: value for first, root in roots for p, value in fields.described(root, first)}
    width = shutil.get_terminal_size((helppage.WIDTH, 24)).columns
    return helppage.page(known, roots, {**tree, **given}, file_names(), read, width)


def file_names() -> list[str]:
    """Of the flag files that come with the driver."""
    return sorted(file.stem for file in FILES.glob("*.flags"))


def read_file(file: Path) -> list[str]:
    """The flags of a file, without comments and blank lines.

    Raises:
      ValueError: it cannot be read, is no text, a quote is not closed, or it names another file:
        absl would read that, but neither its preset nor an end where two name each other.
    """
    try:
        lines = (line.strip() for line in file.read_text().splitlines())
        words = [word for line in lines if line[:1] != "#" for word in shlex.split(line)]
    except (OSError, ValueError) as error:
        raise refuse("flagfile", str(file), f"cannot be read ({error})") from None
    if others := named("flagfile", words)[0]:
        raise refuse("flagfile", str(file), f"must not name another, {others[0]!r}: give both")
    return words


def named(flag: str, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of one flag, and the other arguments."""
    names, rest = [], []
    remaining = iter(args)
    for arg in remaining:
        match = re.fullmatch(rf"--?{flag}(?:=(.*))?", arg, re.DOTALL)
        if match is None:
            rest.append(arg)
        else:
            names.append(match[1] if match[1] is not None else next(remaining, ""))
    return names, rest


def find_file(name: str) -> Path:
    """A path as it stands, or a bare name of those that come with the driver."""
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        file = FILES / f"{name.removesuffix('.flags')}.flags"
        if path.name == name and file.is_file():
            return file
    except (OSError, RuntimeError) as error:  # too long; the home of nobody
        raise refuse("flagfile", name, f"cannot be read ({error})") from None
    allowed = f"{nearest(name.removesuffix('.flags'), file_names())}, or a file"
    raise refuse("flagfile", name, allowed)
