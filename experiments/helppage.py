"""The help page of the driver: what each flag means, with its unit, in groups."""

import textwrap
from typing import Any

from noisefl.config import CHOICES
from noisefl.data import SCHEMES
from noisefl.models import LOWERINGS, MODELS

HELP_FLAGS = ("help", "helpshort", "helpfull")
WIDTH = 100
COLUMN = 34

_CHOICES = {**CHOICES, **LOWERINGS, "partition": SCHEMES, "model": tuple(MODELS)}

GROUPS: dict[str, dict[str, str]] = {
    "Data": {
        "dataset": "mnist (embedded), a TFDS name, a folder of idx files, or an .npz file",
        "data_dir": "folder of TFDS data or of original .gz files; none: ~/tensorflow_datasets",
        "validation_size": "training images that the server keeps for validation [images]",
        "partition": "how training images are dealt out to the clients",
        "shards_per_client": "of shards: label-sorted pieces a client gets [shards]",
        "dirichlet_alpha": "of dirichlet: small is few labels a client, large is near IID",
        "size_sigma": "of lognormal: standard deviation of log client size",
    },
    "Federation": {
        "rounds": "rounds of each run [rounds]",
        "num_clients": "K, the population [clients]",
        "client_fraction": "C; m = C·K clients are sampled a round [share of K]",
        "group_sizes": "m/2 clients a group, or m in each",
        "seed": "of partition, initial model and every draw; both runs share it",
    },
    "Model and local training": {
        "model": "network",
        "local_epochs": "E [passes over a client's data a round]",
        "batch_size": "B [images]",
        "batch_order": "a client's data are batched once a round, or anew every epoch",
        "learning_rate": "η of local SGD [step per unit of gradient]",
        "learning_rate_decay": "η of round t is η·decay^(t−1) [factor a round]",
        "momentum": "of local SGD; 0: plain SGD",
        "clip_norm": "largest global norm of a local gradient; 0: no clipping",
    },
    "Noise": {
        "cap": "largest accuracy a shared copy may have [share of 1]",
        "cap_margin": "calibration aims at cap − margin [share of 1]",
        "accuracy_on": "split on which the cap is judged",
        "noise_layers": "first (convolution), last, all, or a regular expression over paths",
        "noise_parameters": "of those layers",
        "noise_scale": "strengths are σ, or r = σ/RMS of each layer's parameters",
        "noise_distribution": "of ξ, of equal variance",
        "warmup": "noise starts after warmup_rounds, or once the owner exceeded the cap",
        "warmup_rounds": "τ, first rounds without noise [rounds]",
    },
    "Calibration": {
        "calibrator": "rule that sets the strength",
        "error_rate": "δ of sequential and predictive: chance a round over the cap [share of 1]",
        "redraw": "each try draws ξ anew, or one draw is rescaled",
        "strength": "of the first try, σ0 [σ, or r]",
        "strength_step": "additive: added a try [σ, or r]",
        "strength_factor": "geometric, parallel: multiplied a try",
        "strength_max": "σ_max: fresh draws go on there until max_tries [σ, or r]",
        "max_tries": "bound on a round's tries [tries]",
        "on_infeasible": "a round above its cap ships its strongest try, or is skipped",
    },
    "Server": {
        "server_clients": "server-side clients a round: a number, or m, 4m, m/2 [clients]",
        "server_weights": "they count as a random client's samples, or as the mean client's",
        "next_base": "what the next round starts from: base W, or owner G",
        "cancellation": "noise is left in, subtracted, or the groups reweighted to ½ and ½",
        "keep_best": "the owner is replaced only if it validates no worse",
    },
    "Speed (auto: the measured best of the backend)": {
        "clients_at_once": "clients trained side by side; 0: all of a round [clients]",
        "eval_batch": "images in one forward pass of an evaluation [images]",
        "gather": "a client's images are fetched each step, or at once",
        "conv": "lowering of convolutions",
        "pool": "gradient of max pooling",
        "dense": "gradient of dense kernels",
        "precision": "of matrix products; default is JAX's for the backend",
    },
    "Run and output": {
        "out": "folder for config, metrics, summary and figure; none: results/<preset>",
        "resume": "go on with the run in --out",
        "rounds_per_chunk": "rounds in one call of the device; more is faster on a GPU [rounds]",
        "checkpoint_every": "rounds between checkpoints, at ends of chunks [rounds]",
        "local_test_size": "test images for clients' own models; 0: all [images]",
        "compilation_cache": "folder of compiled programs, auto: in the user's cache, or off",
    },
}

HELP = {name: text for group in GROUPS.values() for name, text in group.items()}


def page(
    defaults: dict[str, Any], presets: list[str], default_preset: str, preset_flags: list[str]
) -> str:
    """The page, at most `WIDTH` columns wide.

    Args:
      defaults: the default of each flag.
      presets: names of the presets.
      default_preset: the one that is read when none is named.
      preset_flags: its flags.
    """
    lines = [
        "python -m experiments.run [--flagfile=PRESET] [--FLAG=VALUE …]",
        "Trains FedAvg and Noise-based Federated Averaging on one seed; records and draws them.",
    ]
    for group, helps in GROUPS.items():
        lines += ["", group]
        for name, text in helps.items():
            lines += _entry(name, text, defaults[name])
    lines += ["", f"Presets (a name or a file; flags override it): {', '.join(presets)}"]
    lines += textwrap.wrap(
        f"Without --flagfile, {default_preset} is read: {' '.join(preset_flags)}",
        WIDTH,
        break_on_hyphens=False,
        subsequent_indent="  ",
    )
    return "\n".join(lines)


def _entry(name: str, text: str, default: Any) -> list[str]:
    flag = f"  --[no]{name}" if isinstance(default, bool) else f"  --{name}={_shown(default)}"
    if name in _CHOICES:
        text += f": {' | '.join(_CHOICES[name])}"
    if isinstance(default, bool):
        text += f" (default {'on' if default else 'off'})"
    first, *rest = textwrap.wrap(text, WIDTH - COLUMN)
    return [f"{flag:<{COLUMN - 1}} {first}", *(" " * COLUMN + line for line in rest)]


def _shown(default: Any) -> str:
    return "" if default is None else str(default)
