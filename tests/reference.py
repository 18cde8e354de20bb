"""One round of Noise-based Federated Averaging in plain NumPy: ALGORITHM.md, line by line.

Shares no code with `noisefl`. All randomness comes in through `Draws`, so the library's own draws
can be replayed here and the two states compared. Options carry the names of the library's fields.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from reference_nets import Net, Params, accuracy, as_float64, client_update, combine


@dataclasses.dataclass(frozen=True)
class Options:
    """One value of each open reading, and the numbers. The defaults are the literal readings.

    `net` is a list of layers, `noised` the (layer, parameter) pairs that carry ξ. `momentum` and
    `clip_norm` are numbers, None for off. Group sizes, local epochs, batch size and the number of
    server-side clients only shape the `Draws`.
    """

    net: Net
    noised: list[tuple[str, str]]
    noise_scale: str = "absolute"  # or "relative"
    calibrator: str = "additive"  # or "geometric", "fixed"
    bare_first: bool = False  # the first try is W itself: one model, N images, and no noise
    redraw: str = "fresh"  # or "rescale"
    skip_infeasible: bool = False
    until_cap: bool = False
    server_weights: str = "borrowed"  # or "uniform"
    cancellation: str = "pair"  # or "subtract", "reweight"
    keep_best: bool = False
    feeds_back: bool = False  # the base of the next round is G, not W
    server_learning_rate: float = 1.0
    learning_rate: float = 0.1
    learning_rate_decay: float = 1.0
    momentum: float | None = None
    clip_norm: float | None = None
    cap: float = 0.6
    cap_margin: float = 0.0
    strength: float = 0.0
    strength_step: float = 0.05
    strength_factor: float = 1.25
    strength_max: float = 5.0
    max_tries: int = 100
    warmup_rounds: int = 1


@dataclasses.dataclass(frozen=True)
class Data:
    """The clients' own samples, and the split on which accuracy is judged."""

    client_images: Sequence[np.ndarray]  # K arrays, uint8 [n_k, H, W, Cin]
    client_labels: Sequence[np.ndarray]  # K arrays, int [n_k]
    accuracy_images: np.ndarray  # uint8 [N, H, W, Cin]
    accuracy_labels: np.ndarray  # int [N]


@dataclasses.dataclass(frozen=True)
class Draws:
    """All randomness of one round."""

    cohort: Sequence[tuple[int, int]]  # M pairs: client, and +1 (group a) or −1 (group b)
    batches: Sequence[Sequence[np.ndarray]]  # M lists of S batches: indices into its own samples
    server_counts: Sequence[float]  # borrowed sample counts, one a server-side client
    noise: Callable[[int], Params]  # draw j, unit variance; only noised parameters are read


@dataclasses.dataclass(frozen=True)
class State:
    """What one round hands to the next."""

    round: int  # rounds completed
    owner: Params  # G
    base: Params  # W
    warm: bool  # no round so far ended with acc(G) > cap; read by until_cap only
    owner_accuracy: float  # acc(G) on the accuracy split


@dataclasses.dataclass(frozen=True)
class Report:
    """What one round tells about itself."""

    warming: bool  # t ≤ τ (or still until_cap): no noise
    shipped: bool  # False: the round was skipped, and no client received anything
    feasible: bool  # both copies reached cap − margin (true in warm-up)
    strength: float  # of the last try; 0 in warm-up
    relative_strength: float  # the same in units of the RMS of the noised parameters
    tries: int
    evaluations: int  # 2 a try, 1 of the bare base
    samples: int  # N an evaluation
    plus_accuracy: float  # of the copies of the last try, on the accuracy split
    minus_accuracy: float
    schedule: list[tuple[float, float, float]]  # (strength, acc of plus, acc of minus) of each try
    plus: Params  # the copies themselves
    minus: Params
    local_models: list[Params]  # M returned models, as trained; none in a skipped round


def initial_state(options: Options, data: Data, params) -> State:
    """`initialise w;  W = G = w`"""
    w = as_float64(params)
    first = accuracy(options.net, w, data.accuracy_images, data.accuracy_labels)
    return State(0, w, w, True, first)


def noised_parameters(
    net: Net, noise_layers: str = "first", noise_parameters: str = "kernel+bias"
) -> list[tuple[str, str]]:
    """The (layer, parameter) pairs that carry ξ.

    `noise_layers`: "first" (first convolution, else first dense layer), "last", "all", or a regular
    expression that matches a whole layer name or a whole "layer/parameter" path.
    """
    convs = [layer[1] for layer in net if layer[0] == "conv"]
    layers = [layer[1] for layer in net if layer[0] in ("conv", "dense")]
    by_word = {"first": (convs or layers)[:1], "last": layers[-1:], "all": layers}
    pairs = []
    for layer in layers:
        for parameter in noise_parameters.split("+"):
            if noise_layers in by_word:
                chosen = layer in by_word[noise_layers]
            else:
                paths = (layer, f"{layer}/{parameter}")
                chosen = any(re.fullmatch(noise_layers, path) for path in paths)
            if chosen:
                pairs.append((layer, parameter))
    return pairs


def rms(params: Params, pairs: Sequence[tuple[str, str]]) -> float:
    """Root mean square of all entries of the named parameters together."""
    values = np.concatenate([params[layer][name].ravel() for layer, name in pairs])
    return float(np.sqrt(np.mean(values**2)))


def scaled_noise(base: Params, unit: Params, strength: float, options: Options) -> Params:
    """ξ: σ · unit, or r · RMS(noised parameters of that layer in W) · unit; zero elsewhere."""
    noise = combine(np.zeros_like, base)
    for layer, name in options.noised:
        of_layer = [pair for pair in options.noised if pair[0] == layer]
        scale = rms(base, of_layer) if options.noise_scale == "relative" else 1.0
        noise[layer][name] = strength * scale * np.asarray(unit[layer][name], np.float64)
    return noise


def strength_of_try(j: int, options: Options) -> float:
    """`raise σ`: the strength of try j = 0, 1, …, never above σ_max ("fixed" has only try 0)."""
    raised = {
        "additive": options.strength + j * options.strength_step,
        "geometric": options.strength * options.strength_factor**j,
        "fixed": options.strength,
    }
    return min(raised[options.calibrator], options.strength_max)


def average(models: Sequence[Params], counts: Sequence[float]) -> Params:
    """Σ n_k w_k / Σ n_k"""
    total = sum(counts)
    mean = combine(np.zeros_like, models[0])
    for model, count in zip(models, counts, strict=True):
        mean = combine(lambda a, w, p=count / total: a + p * w, mean, model)
    return mean


def reference_round(
    state: State, draws: Draws, data: Data, options: Options
) -> tuple[State, Report]:
    """ALGORITHM.md, "One round"; each quoted comment below is a line of it."""

    def acc(model: Params) -> float:
        return accuracy(options.net, model, data.accuracy_images, data.accuracy_labels)

    t = state.round + 1
    base = state.base
    warming = t <= options.warmup_rounds or (options.until_cap and state.warm)

    # "while t > τ and (acc(W+ξ) > cap or acc(W−ξ) > cap): remove the previous noise; raise σ; …"
    strength, feasible, plus, minus, schedule = 0.0, True, base, base, []
    bare = 0
    if options.bare_first and not warming:
        schedule.append((0.0, acc(base), acc(base)))
        feasible, bare = acc(base) <= options.cap - options.cap_margin, 1
    while not warming and not (bare and feasible):
        j = len(schedule) - bare
        strength = strength_of_try(j, options)
        unit = draws.noise(0 if options.redraw == "rescale" else j)
        noise = scaled_noise(base, unit, strength, options)
        plus, minus = combine(np.add, base, noise), combine(np.subtract, base, noise)
        schedule.append((strength, acc(plus), acc(minus)))
        feasible = max(schedule[-1][1:]) <= options.cap - options.cap_margin
        # at σ_max a fresh draw is another chance, the same draw is not
        same_again = options.redraw == "rescale" and strength >= options.strength_max
        hopeless = options.calibrator == "fixed" or same_again
        if feasible or hopeless or len(schedule) >= options.max_tries:
            break
    plus_accuracy, minus_accuracy = schedule[-1][1:] if schedule else (acc(plus), acc(minus))
    shipped = feasible or not options.skip_infeasible

    # "w_k ← ClientUpdate(k, W+ξ) for k in a_t; w_k ← ClientUpdate(k, W−ξ) for k in b_t"
    learning_rate = options.learning_rate * options.learning_rate_decay ** (t - 1)
    local_models = []
    for (client, sign), batches in zip(draws.cohort, draws.batches, strict=True):
        if shipped:
            start = plus if sign > 0 else minus
            images, labels = data.client_images[client], data.client_labels[client]
            settings = (learning_rate, options.momentum, options.clip_norm)
            local = client_update(options.net, start, batches, images, labels, *settings)
            local_models.append(local)

    owner, new_base = state.owner, state.base
    if shipped:
        # no noise, nothing to cancel: the warm-up weighs by n_k alone
        cancellation = "pair" if warming else options.cancellation
        rule = dataclasses.replace(options, cancellation=cancellation)
        owner, new_base = aggregate(state, draws, data, rule, local_models, plus, minus)
        if warming:  # "if t ≤ τ: G ← W"
            owner = new_base
        elif options.keep_best and acc(owner) < state.owner_accuracy:
            owner = state.owner
        if options.feeds_back:
            new_base = owner

    owner_accuracy = acc(owner)
    warm = state.warm and not owner_accuracy > options.cap
    relative = options.noise_scale == "relative" or warming
    report = Report(
        warming=warming,
        shipped=shipped,
        feasible=feasible,
        strength=strength,
        relative_strength=strength if relative else strength / rms(base, options.noised),
        tries=len(schedule),
        evaluations=2 * len(schedule) - bare,
        samples=len(data.accuracy_labels) * (2 * len(schedule) - bare),
        plus_accuracy=plus_accuracy,
        minus_accuracy=minus_accuracy,
        schedule=schedule,
        plus=plus,
        minus=minus,
        local_models=local_models,
    )
    return State(t, owner, new_base, warm, owner_accuracy), report


def aggregate(
    state: State,
    draws: Draws,
    data: Data,
    options: Options,
    local_models: Sequence[Params],
    plus: Params,
    minus: Params,
) -> tuple[Params, Params]:
    """`G ← Σ_{a ⊔ b ⊔ s} (n_k / n) w_k`, w_k = G for k in s_t, and `W ← Σ_{a ⊔ b} (n_k / n) w_k`"""
    signs = [sign for _, sign in draws.cohort]
    counts = [float(len(data.client_labels[client])) for client, _ in draws.cohort]
    returned = list(local_models)
    if options.cancellation == "subtract":  # w_k ← W + (w_k − start_k)
        for i, sign in enumerate(signs):
            start = plus if sign > 0 else minus
            returned[i] = combine(lambda b, w, s: b + (w - s), state.base, returned[i], start)
    if options.cancellation == "reweight":  # each group is half of n_a + n_b
        group = {s: sum(n for n, z in zip(counts, signs, strict=True) if z == s) for s in (1, -1)}
        both = group[1] + group[-1]
        counts = [n * both / (2 * group[s]) for n, s in zip(counts, signs, strict=True)]

    server_counts = [float(n) for n in draws.server_counts]
    if options.server_weights == "uniform":
        mean_count = float(np.mean([len(labels) for labels in data.client_labels]))
        server_counts = [mean_count for _ in server_counts]
    held = [state.owner for _ in server_counts]
    mean, rate = average(returned, counts), options.server_learning_rate
    base = combine(lambda w, m: w + rate * (m - w), state.base, mean)  # the mean itself at rate 1
    return average([base, *held], [sum(counts), *server_counts]), base
