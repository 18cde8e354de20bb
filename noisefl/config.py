"""What a run is: `Config` (static: shapes and choices) and `Hyper` (traced numbers).

Every row of the specification's table of open readings (ALGORITHM.md, "Readings that stay open")
is one field here. The literal reading is the default of each.
"""

import dataclasses
import difflib
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

NEVER = 2**31 - 1  # a warm-up of this many rounds never ends: plain FedAvg

CHOICES: dict[str, tuple[str, ...]] = {
    "group_sizes": ("half", "full"),
    "batch_order": ("once", "every_epoch"),
    "noise_parameters": ("kernel+bias", "kernel"),
    "noise_scale": ("absolute", "relative"),
    "noise_distribution": ("gaussian", "uniform", "laplace"),
    "calibrator": (
        *("additive", "geometric", "fixed", "bisection", "parallel"),
        *("sequential", "predictive", "unverified", "snr"),
    ),
    "redraw": ("fresh", "rescale"),
    "on_infeasible": ("ship", "skip"),
    "warmup": ("rounds", "until_cap"),
    "server_weights": ("borrowed", "uniform"),
    "next_base": ("base", "owner"),
    "cancellation": ("pair", "subtract", "reweight"),
    "accuracy_on": ("validation", "test"),
    "gather": ("auto", "step", "client"),
}


def refuse(name: str, value: Any, allowed: str) -> ValueError:
    """The one form of every complaint about input: the name, the value, what is allowed."""
    return ValueError(f"{name}={value!r}: {allowed}")


def nearest(value: str, choices: tuple[str, ...] | list[str]) -> str:
    """`"one of a, b, c"`, with the closest of them named when `value` looks like a typo of it."""
    close = difflib.get_close_matches(value, choices, n=1)
    return f"must be one of {', '.join(choices)}" + (
        f" (did you mean {close[0]}?)" if close else ""
    )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclasses.dataclass(frozen=True)
class Config:
    """Static options: a new value is a new compiled program.

    Attributes:
      image_shape: (height, width, channels) of one image.
      num_clients: K, the population.
      client_fraction: C; m = max(C·K, 1) clients are sampled a round (ALGORITHM.md, "One round").
      group_sizes: "half": m clients in all, the odd one in group a; "full": m in each group.
      local_epochs: E.
      batch_size: B.
      batch_order: "once": a client's data are split into batches once a round, as ClientUpdate of
        the source says; "every_epoch": split anew in every local epoch.
      momentum: local SGD carries a momentum buffer (`Hyper.momentum`); off by default.
      clipping: local gradients are clipped to the global norm `Hyper.clip_norm`; off by default.
      noise_layers: which layers carry ξ: "first" (the first convolution; in a model without one,
        the first dense layer), "last", "all" (that own a kernel), or a regular expression that must
        match a whole layer path or parameter path, e.g. "conv2" or "dense.*/kernel".
      noise_parameters: "kernel+bias" or "kernel" of those layers.
      noise_scale: "absolute": ξ ~ N(0, σ²); "relative": ξ ~ N(0, (r·RMS)²), RMS that of the
        noised parameters of each layer. `Hyper.strength` and its kin are then r, not σ.
      noise_distribution: "gaussian" (the source); "uniform" or "laplace" of the same variance.
      calibrator: the loop that raises σ: "additive" (the source) or "geometric"; or another rule
        of `calibrate`, where each says what it guarantees.
      redraw: on re-entry of that loop, "fresh" draws ξ anew (the source), "rescale" keeps one draw.
      on_infeasible: a round that did not reach its cap "ship"s its last, strongest try all the
        same, or "skip"s: nobody receives a model, and the round changes neither owner nor base.
      warmup: "rounds": noise is off in the first `Hyper.warmup_rounds` (τ); "until_cap": noise is
        off until the owner's accuracy has once exceeded the cap (τ is then a lower bound).
      server_clients: number of server-side clients a round; None is m // 2.
      server_weights: a server-side client counts as many samples as one client drawn at random
        ("borrowed") or as the mean client of the population ("uniform").
      next_base: what the next round starts from: the "base" W, or the "owner" G.
      cancellation: noise before averaging: "pair": left in, cancels through ±; "subtract": taken
        out of each returned model; "reweight": left in, both groups weigh ½ of the clients' part
        (in rounds with noise; warm-up and FedAvg weigh by n_k alone).
      keep_best: the owner is replaced only by a candidate whose accuracy is no worse.
      accuracy_on: the split on which the cap, `keep_best` and `warmup="until_cap"` are judged:
        "validation" (disjoint from test), or "test" as the source probably did.
      clients_at_once: how many clients train side by side (vmap); 1 maps them one by one, 0 is
        all, None the best of the backend (`strategy`). Changes speed and memory, and results only
        in the last bits; so do gather and eval_batch.
      gather: a client's images are fetched batch by batch, each "step", or all at once, a
        "client"; "auto" is the best of the backend.
      local_test_size: test images on which each client's own model is scored after local
        training (the first ones in test order); 0 is all of them.
      eval_batch: images a forward pass in evaluation; None is the best of the backend.
    """

    image_shape: tuple[int, int, int] = (28, 28, 1)
    num_clients: int = 100
    client_fraction: float = 0.1
    group_sizes: str = "half"
    local_epochs: int = 1
    batch_size: int = 10
    batch_order: str = "once"
    momentum: bool = False
    clipping: bool = False
    noise_layers: str = "first"
    noise_parameters: str = "kernel+bias"
    noise_scale: str = "absolute"
    noise_distribution: str = "gaussian"
    calibrator: str = "additive"
    redraw: str = "fresh"
    on_infeasible: str = "ship"
    warmup: str = "rounds"
    server_clients: int | None = None
    server_weights: str = "borrowed"
    next_base: str = "base"
    cancellation: str = "pair"
    keep_best: bool = False
    accuracy_on: str = "validation"
    clients_at_once: int | None = None
    gather: str = "auto"
    local_test_size: int = 1000
    eval_batch: int | None = None

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise refuse(name, getattr(self, name), nearest(str(getattr(self, name)), choices))
        automatic = ("clients_at_once", "eval_batch", "server_clients")
        for name in ("num_clients", "local_epochs", "batch_size", "eval_batch"):
            value = getattr(self, name)
            if not (_whole(value, least=1) or (name in automatic and value is None)):
                raise refuse(name, value, "must be a whole number, at least 1")
        for name in ("clients_at_once", "local_test_size", "server_clients"):
            value = getattr(self, name)
            if not (_whole(value, least=0) or (name in automatic and value is None)):
                raise refuse(name, value, "must be a whole number, not negative")
        if len(self.image_shape) != 3 or not all(_whole(n, least=1) for n in self.image_shape):
            raise refuse("image_shape", self.image_shape, "must be (height, width, channels)")
        if self.redraw == "rescale" and self.calibrator not in ("additive", "geometric"):
            raise refuse("redraw", self.redraw, "needs a loop: calibrator additive or geometric")
        if self.on_infeasible == "skip" and self.calibrator in ("unverified", "snr"):
            allowed = f"would skip every round: calibrator={self.calibrator!r} vouches for none"
            raise refuse("on_infeasible", self.on_infeasible, allowed)
        if not 0 < self.client_fraction <= 1:
            raise refuse("client_fraction", self.client_fraction, "must be in (0, 1]")
        if self.sampled < 2:
            raise refuse(
                "client_fraction",
                self.client_fraction,
                f"samples {self.sampled} of num_clients={self.num_clients} a round; "
                "the two groups need at least 2",
            )
        if self.cohort > self.num_clients:
            raise refuse(
                "group_sizes",
                self.group_sizes,
                f"needs {self.cohort} distinct clients a round of num_clients={self.num_clients}",
            )

    @property
    def sampled(self) -> int:
        """m = max(C·K, 1)."""
        return max(round(self.client_fraction * self.num_clients), 1)

    @property
    def groups(self) -> tuple[int, int]:
        """Sizes of the groups a (receives W + ξ) and b (receives W − ξ)."""
        m = self.sampled
        return (m, m) if self.group_sizes == "full" else (m - m // 2, m // 2)

    @property
    def cohort(self) -> int:
        """M, the clients that train in a round: both groups."""
        return sum(self.groups)

    @property
    def num_server_clients(self) -> int:
        return self.sampled // 2 if self.server_clients is None else self.server_clients


@struct.dataclass
class Hyper:
    """Traced numbers: a new value compiles nothing. Each may also carry a lane axis under vmap.

    Attributes:
      learning_rate: η of local SGD.
      learning_rate_decay: η of round t is η · decay^(t − 1).
      momentum: of local SGD; read only with `Config.momentum`.
      clip_norm: largest global norm of a local gradient; read only with `Config.clipping`.
      cap: largest accuracy a distributed copy may have, a fraction of 1.
      cap_margin: the calibrator aims at `cap − cap_margin`; `feasible` speaks of that aim.
      error_rate: δ, chance a round that a pair ships as feasible although one copy's accuracy on
        new images, of classes as frequent as in the judging split, exceeds the aim; read by
        "sequential" and "predictive".
      strength: σ0, the strength of the loop's first try, and the weakest of all but "additive";
        the strength itself with "fixed" and "unverified"; with "snr" the logits' ratio of noise.
      strength_step: what "additive" adds a try.
      strength_factor: what "geometric" and "parallel" multiply by a try.
      strength_max: σ_max; there, fresh draws go on until `max_tries`, one rescaled draw ends.
      max_tries: bound on the tries of a round, the first included.
      warmup_rounds: τ; the rounds t ≤ τ run without noise. `NEVER` makes the run plain FedAvg.
    Strengths are in units of the parameters ("absolute") or of their RMS ("relative").
    """

    learning_rate: Any = 0.1
    learning_rate_decay: Any = 1.0
    momentum: Any = 0.9
    clip_norm: Any = 1.0
    cap: Any = 0.6
    cap_margin: Any = 0.0
    error_rate: Any = 0.01
    strength: Any = 0.0
    strength_step: Any = 0.05
    strength_factor: Any = 1.25
    strength_max: Any = 5.0
    max_tries: Any = 100
    warmup_rounds: Any = 1


COUNTS = ("max_tries", "warmup_rounds")

_BOUNDS: dict[str, tuple[float, float, str]] = {
    "learning_rate": (0.0, math.inf, "must be positive"),
    "learning_rate_decay": (0.0, 1.0, "must be in (0, 1]"),
    "momentum": (0.0, 1.0, "must be in [0, 1)"),
    "clip_norm": (0.0, math.inf, "must be positive"),
    "cap": (0.0, 1.0, "must be in (0, 1)"),
    "cap_margin": (0.0, 1.0, "must be at least 0 and less than the cap"),
    "error_rate": (0.0, 1.0, "must be in (0, 1)"),
    "strength": (0.0, math.inf, "must be at least 0 and at most strength_max"),
    "strength_step": (0.0, math.inf, "must be positive"),
    "strength_factor": (1.0, math.inf, "must be greater than 1"),
    "strength_max": (0.0, math.inf, "must be positive and finite"),
    "max_tries": (1, NEVER, "must be at least 1"),
    "warmup_rounds": (0, NEVER, "must not be negative"),
}
_CLOSED_BELOW = ("momentum", "cap_margin", "strength", "max_tries", "warmup_rounds")
_CLOSED_ABOVE = ("learning_rate_decay", "max_tries", "warmup_rounds")


def check_hyper(hyper: Hyper, config: Config) -> Hyper:
    """Checks concrete hyperparameters, scalars or lanes; returns them as float32 or int32 arrays.

    Uniform dtypes keep a later value from compiling anew: a Python float and a NumPy scalar would
    otherwise be two signatures.

    Raises:
      ValueError: one line that names the field, its value and what is allowed.
    """
    for name, (low, high, allowed) in _BOUNDS.items():
        given = np.asarray(getattr(hyper, name), np.float64)
        if name in COUNTS and np.any(given != np.floor(given)):
            raise refuse(name, getattr(hyper, name), "must be a whole number")
        # Judged as the round will see it: 1e-50 is 0 in float32, and 1e39 infinite.
        with np.errstate(over="ignore"):
            value = given if name in COUNTS else given.astype(np.float32)
        above = value >= low if name in _CLOSED_BELOW else value > low
        below = value <= high if name in _CLOSED_ABOVE else value < high
        if not np.all(above & below):
            raise refuse(name, getattr(hyper, name), allowed)
    strength, cap = np.asarray(hyper.strength), np.asarray(hyper.cap)
    if np.any(strength > np.asarray(hyper.strength_max)):
        raise refuse("strength", hyper.strength, _BOUNDS["strength"][2])
    if np.any(np.asarray(hyper.cap_margin) >= cap):
        raise refuse("cap_margin", hyper.cap_margin, _BOUNDS["cap_margin"][2])
    if config.calibrator not in ("additive", "fixed", "unverified") and np.any(strength <= 0):
        needs = f"must be positive with calibrator={config.calibrator!r}"
        raise refuse("strength", hyper.strength, needs)
    return as_arrays(hyper)


def as_arrays(hyper: Hyper) -> Hyper:
    """`hyper` with every leaf a float32 (counts: int32) array."""
    leaves = {f.name: getattr(hyper, f.name) for f in dataclasses.fields(Hyper)}
    return Hyper(
        **{
            name: jnp.asarray(leaf, jnp.int32 if name in COUNTS else jnp.float32)
            for name, leaf in leaves.items()
        }
    )


def fedavg(hyper: Hyper) -> Hyper:
    """The same run with the noise off: the warm-up never ends, so G = W in every round (FedAvg)."""
    return dataclasses.replace(hyper, warmup_rounds=hyper.warmup_rounds * 0 + NEVER)
