"""Flags of the driver → `Options`. Names, types and defaults come from the dataclasses.

Every field of `Config` and `Hyper` is a flag of the same name, except `image_shape` (the data set
gives it) and `clipping` (`--clip_norm` above 0 turns it on; `--momentum` above 0 likewise).
"""

import dataclasses
import inspect
import math
import re
import shlex
from pathlib import Path
from typing import Any

from absl import flags

from experiments import helppage
from noisefl.config import Config, Hyper, check_hyper, nearest, refuse
from noisefl.data import SCHEMES, federate
from noisefl.models import MODELS, Lowering

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "quickstart"

# What `federate` calls otherwise, because it knows only one thing that has an alpha.
FEDERATE = {
    "partition": "scheme",
    "shards_per_client": "shards_per_client",
    "dirichlet_alpha": "alpha",
    "size_sigma": "size_sigma",
    "validation_size": "validation_size",
}


AUTOMATIC = ("clients_at_once", "eval_batch")  # a number, or "auto"


@dataclasses.dataclass(frozen=True)
class Driver:
    """Options that neither `Config` nor `Hyper` nor `federate` has; `helppage` explains each."""

    dataset: str = "mnist"
    data_dir: str | None = None
    model: str = "lenet5"
    rounds: int = 100
    seed: int = 0
    out: str = ""  # results/<preset>
    resume: bool = False
    rounds_per_chunk: int = 1
    checkpoint_every: int = 5
    compilation_cache: str = "auto"


# No result depends on these, so a resumed run may change them.
MAY_CHANGE = ("out", "resume", "checkpoint_every", "compilation_cache")


@dataclasses.dataclass(frozen=True)
class Options:
    """One parsed command line.

    Attributes:
      config: static options; its image_shape is that of the data set only after loading.
      lowering: of the model's layers.
      hyper: checked numbers.
      driver: the driver's own; `out` is filled in.
      federation: keyword arguments of `federate`, num_clients and seed among them.
      cap: the cap as the shortest decimal of its float32, as accuracies are.
      flags: every flag as a JSON value by name, for `config.json`.
    """

    config: Config
    lowering: Lowering
    hyper: Hyper
    driver: Driver
    federation: dict[str, Any]
    cap: float
    flags: dict[str, Any]


def defaults() -> dict[str, Any]:
    """The default of each flag, presets aside."""
    signature = inspect.signature(federate).parameters
    values = {
        **{field.name: field.default for field in dataclasses.fields(Driver)},
        **{flag: signature[name].default for flag, name in FEDERATE.items()},
        **{field.name: field.default for field in dataclasses.fields(Config)},
        **{field.name: field.default for field in dataclasses.fields(Lowering)},
        **{field.name: field.default for field in dataclasses.fields(Hyper)},
    }
    for name in ("image_shape", "clipping"):
        del values[name]
    # A number stands for the switch as well.
    numbers = {"momentum": 0.0, "clip_norm": 0.0, "server_clients": "m/2"}
    return {**values, **numbers, **dict.fromkeys(AUTOMATIC, "auto")}


def define() -> flags.FlagValues:
    """A fresh set of flags: the process-wide one is full of other libraries' flags."""
    values = flags.FlagValues()
    kinds = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for name, default in defaults().items():
        kind = kinds.get(type(default), flags.DEFINE_string)
        kind(name, default, helppage.HELP[name], flag_values=values)
    for name in helppage.HELP_FLAGS:
        flags.DEFINE_bool(name, False, "this page", flag_values=values)
    return values


def parse(argv: list[str]) -> Options | None:
    """Parses a command line, the program's name first.

    A preset is read before everything else, wherever its flag stands, so that each flag given
    overrides it. Without `--flagfile` it is `DEFAULT_PRESET`.

    Returns:
      The options; None after printing the help page.

    Raises:
      ValueError: one line about the first bad flag.
    """
    values = define()
    preset = read(argv, values)
    if any(values[name].value for name in helppage.HELP_FLAGS):
        quickstart = read_preset(PRESETS / f"{DEFAULT_PRESET}.flags")
        print(helppage.page(defaults(), preset_names(), DEFAULT_PRESET, quickstart))
        return None
    given = {name: values[name].value for name in defaults()}
    if not given["out"]:
        given["out"] = str(Path("results") / preset)
    return from_flags(given)


def read(argv: list[str], values: flags.FlagValues) -> str:
    """Reads a command line into `values`, presets first; returns the name of the last preset."""
    try:
        preset_files, rest = _presets(argv[1:])
        lines = [line for file in preset_files for line in read_preset(file)]
        if unparsed := values([argv[0], *lines, *rest])[1:]:
            raise ValueError(f"unexpected argument {unparsed[0]!r}: flags begin with --")
    except flags.Error as error:
        raise ValueError(_explained(error, values)) from None
    return preset_files[-1].stem


def from_flags(given: dict[str, Any]) -> Options:
    """Checks flag values as far as that goes without data, and sorts them by who reads them.

    Raises:
      ValueError: one line that names the flag, its value and what is allowed.
    """
    given = dict(given)
    for name, value in given.items():
        if isinstance(value, int):
            _check_size(name, value)
    for name in ("rounds", "rounds_per_chunk", "checkpoint_every", "shards_per_client"):
        if given[name] < 1:
            raise refuse(name, given[name], "must be at least 1")
    if not 0 <= given["seed"] < 2**31:
        raise refuse("seed", given["seed"], "must be 0 to 2147483647")
    if given["partition"] not in SCHEMES:
        raise refuse("partition", given["partition"], nearest(given["partition"], SCHEMES))
    if given["model"] not in MODELS:
        raise refuse("model", given["model"], nearest(given["model"], list(MODELS)))
    for name in ("momentum", "clip_norm"):
        if not 0 <= given[name] < math.inf:
            raise refuse(name, given[name], "must not be negative; 0 turns it off")

    for name in AUTOMATIC:
        given[name] = _number(name, given[name])
    lowering = Lowering(**{f.name: given[f.name] for f in dataclasses.fields(Lowering)})
    fields = {field.name for field in dataclasses.fields(Config)}
    chosen = {name: value for name, value in given.items() if name in fields}
    switches = {"momentum": given["momentum"] > 0, "clipping": given["clip_norm"] > 0}
    config = Config(**{**chosen, "server_clients": None, **switches})
    server_clients = _server_clients(given["server_clients"], config.sampled)
    config = dataclasses.replace(config, server_clients=server_clients)

    numbers = {field.name: given[field.name] for field in dataclasses.fields(Hyper)}
    for name, switch in (("momentum", config.momentum), ("clip_norm", config.clipping)):
        if not switch:  # not read then, and its 0 may be out of range
            del numbers[name]
    hyper = check_hyper(Hyper(**numbers), config)
    given["server_clients"] = server_clients
    return Options(
        config=config,
        lowering=lowering,
        hyper=hyper,
        driver=Driver(**{f.name: given[f.name] for f in dataclasses.fields(Driver)}),
        federation={
            "num_clients": config.num_clients,
            "seed": given["seed"],
            **{name: given[flag] for flag, name in FEDERATE.items()},
        },
        cap=float(str(hyper.cap)),
        flags=given,
    )


def preset_names() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.flags"))


def read_preset(file: Path) -> list[str]:
    """The flags of a preset, without comments and blank lines."""
    lines = (line.strip() for line in file.read_text().splitlines())
    return [word for line in lines if line[:1] != "#" for word in shlex.split(line)]


def _explained(error: flags.Error, values: flags.FlagValues) -> str:
    """One line in the form of every other complaint where the value is of the wrong kind."""
    match = re.match(r"flag --(\w+)=(.*?): ", str(error), re.DOTALL)
    if match is None:
        return " ".join(str(error).split())
    kinds = {"bool": "true or false", "int": "a whole number", "float": "a number"}
    kind = kinds.get(values[match[1]].flag_type(), "another value")
    return str(refuse(match[1], match[2], f"must be {kind}"))


def _presets(args: list[str]) -> tuple[list[Path], list[str]]:
    """The preset files that `args` name, and the other arguments."""
    names, rest = [], []
    remaining = iter(args)
    for arg in remaining:
        match = re.fullmatch(r"--?flagfile(?:=(.*))?", arg)
        if match is None:
            rest.append(arg)
            continue
        name = match[1] if match[1] is not None else next(remaining, "")
        names.append(name)
    return [find_preset(name) for name in names or [DEFAULT_PRESET]], rest


def find_preset(name: str) -> Path:
    """A path as it stands, or a bare name in the folder of presets."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    preset = PRESETS / f"{name.removesuffix('.flags')}.flags"
    if path.name == name and preset.is_file():
        return preset
    known = preset_names()
    raise refuse("flagfile", name, f"{nearest(name.removesuffix('.flags'), known)}, or a file")


def _number(name: str, text: Any) -> int | None:
    """None for "auto"; what else is allowed is the config's to say."""
    if text in ("auto", None):
        return None
    if re.fullmatch(r"-?\d+", str(text)) is None:
        raise refuse(name, text, "must be a whole number, or auto")
    return _check_size(name, int(text))


def _check_size(name: str, value: int) -> int:
    """Rounds, clients and images are counted in int32."""
    if abs(value) >= 2**31:
        raise refuse(name, value, "must be less than 2147483648")
    return value


def _server_clients(text: str, sampled: int) -> int:
    """'3', or in clients of a round: 'm', '4m', 'm/2' (rounded down)."""
    match = re.fullmatch(r"(\d+)|(\d*)\*?m(?:/([1-9]\d*))?", str(text).strip())
    if match is None:
        raise refuse("server_clients", text, "must be a number, or like m, 4m or m/2")
    number, times, share = match.groups()
    clients = int(number) if number else int(times or 1) * sampled // int(share or 1)
    return _check_size("server_clients", clients)
