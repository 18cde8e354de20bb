"""Models with batch normalisation and dropout: modes, running statistics, and what becomes of them.

The reference is a loop in NumPy: a dense layer, batch normalisation and a head, trained by hand.
"""

import functools
from typing import Any

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import noisefl
from noisefl import attacks, evaluate, keys, local, models, noise, running, schemes, server, theft
from noisefl.noise import Where
from noisefl.optimizers import SGD

SHAPE = fed.IMAGE
MOMENTUM, EPSILON, HIDDEN = 0.75, 1e-5, 5


class Linen(nn.Module):
    """A dense layer, batch normalisation, a head."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(HIDDEN, name="dense")(x.reshape(x.shape[0], -1))
        norm = nn.BatchNorm(not train, momentum=MOMENTUM, epsilon=EPSILON, name="norm")
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(norm(x)))
        return nn.Dense(fed.CLASSES, name="head")(x)


class Nnx(nnx.Module):
    """The same in nnx."""

    def __init__(self, *, rngs: nnx.Rngs, rate: float = 0.0):
        self.dense = nnx.Linear(64, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, momentum=MOMENTUM, epsilon=EPSILON, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, fed.CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.dense(x.reshape(x.shape[0], -1))))
        return self.head(self.dropout(x))


MODELS: dict[str, Any] = {"linen": Linen(), "nnx": Nnx}
FLAT = {
    "linen": {"mean": ("batch_stats", "norm", "mean"), "var": ("batch_stats", "norm", "var")},
    "nnx": {"mean": ("norm", "mean"), "var": ("norm", "var")},
}


def flat(params) -> dict[Any, Any]:
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(params).items()}


def named(params, kind) -> dict[str, np.ndarray]:
    """The parameters by short names, float64."""
    found = flat(params)
    return {
        **{name: found[path] for name, path in FLAT[kind].items()},
        "w": found["dense", "kernel"], "b": found["dense", "bias"],
        "scale": found["norm", "scale"], "shift": found["norm", "bias"],
        "v": found["head", "kernel"], "c": found["head", "bias"],
    }  # fmt: skip


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def forward(p, images, mean, var):
    x = images.reshape(len(images), -1) / 255
    z = x @ p["w"] + p["b"]
    n = (z - mean) / np.sqrt(var + EPSILON)
    h = np.maximum(n * p["scale"] + p["shift"], 0)
    return x, z, n, h, h @ p["v"] + p["c"]


def step(p, images, labels, filled, rate):
    """One step of descent on a batch, whose statistics are those of `filled`."""
    z = forward(p, filled, 0, 1)[1]
    mean, var, size = z.mean(0), z.var(0), len(filled)
    x, z, n, h, logits = forward(p, filled, mean, var)
    g = np.zeros_like(logits)  # what fills up has no loss
    hot = np.eye(fed.CLASSES)[labels]
    g[: len(images)] = (softmax(logits[: len(images)]) - hot) / len(images)
    gh = (g @ p["v"].T) * (h > 0)
    gn = gh * p["scale"]
    gz = (gn - gn.mean(0) - n * (gn * n).mean(0)) / np.sqrt(var + EPSILON)
    assert size == len(x)
    new = {
        "w": x.T @ gz, "b": gz.sum(0), "scale": (gh * n).sum(0), "shift": gh.sum(0),
        "v": h.T @ g, "c": g.sum(0),
    }  # fmt: skip
    moved = {name: p[name] - rate * new[name] for name in new}
    ours = {"mean": MOMENTUM * p["mean"] + (1 - MOMENTUM) * mean,
            "var": MOMENTUM * p["var"] + (1 - MOMENTUM) * var}  # fmt: skip
    return {**p, **moved, **ours}


def descent(p, data, samples, valid, rate):
    for chosen, there in zip(samples, valid, strict=True):
        images, labels = data.train_images[chosen], data.train_labels[chosen]
        some = np.flatnonzero(there)
        if len(some):
            filled = np.resize(some, len(chosen))
            p = step(p, images[some], labels[some], images[filled], rate)
    return p


DATA = fed.federation()
ARRAYS = jax.tree.map(np.asarray, DATA)


def close(ours, theirs, kind):
    for name, leaf in named(ours, kind).items():
        np.testing.assert_allclose(leaf, theirs[name], rtol=2e-4, atol=2e-5, err_msg=name)


def begun(kind):
    """Parameters with other statistics than 0 and 1, and biases that are not 0."""
    params = models.functions(MODELS[kind]).init(jax.random.key(0), SHAPE)
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda w: w + jnp.float32(rng.uniform(0.05, 0.2, w.shape)), params)


@pytest.mark.parametrize("kind", MODELS)
def test_modes(kind):
    made, params = models.functions(MODELS[kind]), begun(kind)
    images = DATA.train_images[:7]
    assert made.has_modes
    assert set(made.state(SHAPE)) == set(FLAT[kind].values())
    p, pixels = named(params, kind), np.asarray(images)
    logits = made.apply(params, evaluate.scale(images))
    np.testing.assert_allclose(logits, forward(p, pixels, p["mean"], p["var"])[-1], rtol=1e-4)
    logits, after = made.train(params, evaluate.scale(images), jax.random.key(0))
    z = forward(p, pixels, 0, 1)[1]
    np.testing.assert_allclose(
        logits, forward(p, pixels, z.mean(0), z.var(0))[-1], rtol=1e-3, atol=1e-4
    )
    for name, of_batch in (("mean", z.mean(0)), ("var", z.var(0))):
        wanted = MOMENTUM * p[name] + (1 - MOMENTUM) * of_batch
        np.testing.assert_allclose(after[FLAT[kind][name]], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_local_training_is_that_of_numpy(kind):
    """With a last batch that is not full, and steps without data."""
    params = begun(kind)
    samples = jnp.array([[3, 9, 11, 2], [5, 8, 1, 0], [0, 0, 0, 0]], jnp.int32)
    valid = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    own = local.Own(DATA.train_images, DATA.train_labels, jnp.arange(12), jnp.int32(12))
    rule, made = SGD(0.1).transformation(jnp.int32(1)), models.functions(MODELS[kind])

    @jax.jit
    def found(params):
        return local.descend(jax.random.key(0), made, rule, params, own, samples, valid)

    batches = np.asarray(samples), np.asarray(valid)
    close(found(params), descent(named(params, kind), ARRAYS, *batches, 0.1), kind)


def federated(kind="linen", scheme=None, **fields) -> noisefl.Experiment:
    return fed.TINY.replace(
        model=MODELS[kind], scheme=scheme or schemes.Warmup(warmup_rounds=9),
        local=local.Training(SGD(learning_rate=0.125), batch_size=4), **fields,
    )  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_statistics_are_averaged_with_the_parameters(kind):
    """One round of FedAvg, each client trained by hand."""
    experiment = federated(kind)
    key, state = keys.root(1), noisefl.init(keys.root(1), experiment, DATA)
    after, info = jax.jit(noisefl.step)(key, state, DATA, experiment)
    base, counts = named(state.base, kind), ARRAYS.counts[np.asarray(info.members.clients)]
    total = {name: np.zeros_like(leaf) for name, leaf in base.items()}
    for client, share in zip(info.members.clients, counts / counts.sum(), strict=True):
        own = keys.stream(keys.of_round(key, 1), "client", client)
        count, rows = ARRAYS.counts[client], ARRAYS.clients[client]
        positions, valid = experiment.local.batches(own, jnp.int32(count), rows.shape[0])
        trained = descent(base, ARRAYS, rows[np.asarray(positions)], np.asarray(valid), 0.125)
        total = {name: total[name] + share * trained[name] for name in total}
    close(after.base, total, kind)
    assert np.any(total["mean"] != base["mean"])


def test_the_servers_optimizer_does_not_move_them():
    """They are the clients' mean, whatever is done with the averaged update of the parameters."""
    plain, adam = (federated(server=s) for s in (server.SGD(), server.Optax()))
    found = []
    for experiment in (plain, adam):
        state = noisefl.init(keys.root(1), experiment, DATA)
        found.append(flat(jax.jit(noisefl.step)(keys.root(1), state, DATA, experiment)[0].base))
    for path in FLAT["linen"].values():
        np.testing.assert_allclose(found[0][path], found[1][path], rtol=1e-6)
    assert np.any(np.abs(found[0]["dense", "kernel"] - found[1]["dense", "kernel"]) > 1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_an_estimate_is_the_mean_over_images(kind):
    """Of ten batches of a hundred, with replacement, from 12 images: the standard error of the mean
    is a 31st of the deviation; five of them. Whatever the statistics were before."""
    made, params = models.functions(MODELS[kind]), begun(kind)
    rows = jnp.array([*range(12), 0, 0, 0])
    found = jax.jit(
        lambda p: running.estimated(
            jax.random.key(1), made, p, DATA.train_images, rows, jnp.int32(12)
        )
    )
    p, ours = named(params, kind), named(found(params), kind)
    z = forward(p, ARRAYS.train_images[:12], 0, 1)[1]
    assert np.all(np.abs(ours["mean"] - z.mean(0)) < 5 * z.std(0) / np.sqrt(1000))
    spread = np.std((z - z.mean(0)) ** 2, axis=0)
    assert np.all(np.abs(ours["var"] - 0.99 * z.var(0)) < 5 * spread / np.sqrt(1000))
    other = models.with_leaves(params, {path: jnp.full(HIDDEN, 7.0) for path in made.state(SHAPE)})
    for name, leaf in named(found(other), kind).items():
        np.testing.assert_allclose(leaf, ours[name], rtol=2e-4, atol=1e-5)
    plain = models.functions(fed.TinyCNN())
    base = plain.init(jax.random.key(0), SHAPE)
    assert running.estimated(jax.random.key(1), plain, base, DATA.train_images, rows, 12) is base


def test_a_base_with_estimated_statistics():
    """Parameters as without; statistics those of W on the server's images."""
    averaged, anew = (federated(running_statistics=s) for s in ("averaged", "estimated"))
    found = []
    for experiment in (averaged, anew):
        state = noisefl.init(keys.root(1), experiment, DATA)
        found.append(jax.jit(noisefl.step)(keys.root(1), state, DATA, experiment)[0].base)
    one, other = map(flat, found)
    state = set(FLAT["linen"].values())
    for path in one:
        same = np.allclose(one[path], other[path], rtol=1e-4, atol=1e-6)
        assert same == (path not in state), path
    p = named(found[1], "linen")
    z = forward(p, ARRAYS.validation_images, 0, 1)[1]
    assert np.all(np.abs(p["mean"] - z.mean(0)) < 5 * z.std(0) / np.sqrt(1000))
    with pytest.raises(ValueError, match=r"^running_statistics='local': must be one of averaged"):
        federated(running_statistics="local")


@pytest.mark.parametrize("kind", MODELS)
def test_dropout_is_random_in_training_alone(kind):
    model = Linen(rate=0.5) if kind == "linen" else nn_partial(rate=0.5)
    made, images = models.functions(model), evaluate.scale(DATA.train_images[:12])
    params = made.init(jax.random.key(0), SHAPE)
    train = jax.jit(lambda key: made.train(params, images, key)[0])
    logits = [np.asarray(train(jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.any(logits[0] != logits[2])
    still = models.functions(MODELS[kind]).train(params, images, jax.random.key(0))[0]
    many = np.mean([train(jax.random.key(seed)) for seed in range(400)], axis=0)
    # The head is linear in what is dropped: its mean is that without. 400 draws: 5 % of a logit's
    # deviation, which is at most the largest logit; four of them.
    assert np.max(np.abs(many - still)) < 0.2 * np.max(np.abs(still))
    own = local.Own(DATA.train_images, DATA.train_labels, jnp.arange(12), jnp.int32(12))
    samples, valid = jnp.arange(12).reshape(3, 4), jnp.ones((3, 4), bool)

    @jax.jit
    def trained(key):
        rule = SGD(0.1).transformation(jnp.int32(1))
        return local.descend(key, made, rule, params, own, samples, valid)

    one, again, other = (flat(trained(jax.random.key(seed))) for seed in (0, 0, 1))
    assert all(np.array_equal(one[path], again[path]) for path in one)
    assert np.any(one["head", "kernel"] != other["head", "kernel"])


def nn_partial(**fields):
    return functools.partial(Nnx, **fields)


def test_noise_goes_to_layers_and_never_to_statistics():
    made = models.functions(Linen())
    every = set(Where(noise_layers=".*").paths(made, SHAPE))
    assert every == set(flatten_dict(made.shapes(SHAPE))) - set(made.state(SHAPE))
    assert noise.layers("last").paths(made, SHAPE) == (("head", "bias"), ("head", "kernel"))


def test_a_round_under_every_scheme_keeps_variances_positive():
    """Those that take such a model; the release of noise refuses it, in one line."""
    for scheme in (
        schemes.Warmup(schemes.Noised(calibrator=fed.LOOP), 0),
        schemes.Warmup(schemes.FewWeights(entries=8), 0),
        schemes.Warmup(schemes.Withheld(), 0),
    ):
        experiment = federated(scheme=scheme)
        state = noisefl.init(keys.root(1), experiment, DATA)
        after, _ = jax.jit(noisefl.step)(keys.root(1), state, DATA, experiment)
        p = named(after.base, "linen")
        assert np.all(np.isfinite(p["w"]))
        assert np.all(p["var"] > 0)
    with pytest.raises(
        ValueError, match=r"^model='Linen': has running statistics, and noise would"
    ):
        noisefl.init(keys.root(1), federated(scheme=schemes.Warmup(schemes.Released())), DATA)


def test_thieves_train_as_clients_do():
    """A control from scratch learns; what it holds in the end are statistics of its own images."""
    experiment = federated().resolved()
    known = theft.public(experiment, SHAPE, None)
    own = local.Own(DATA.train_images, DATA.train_labels, jnp.arange(12), jnp.int32(12))
    made = experiment.functions
    scratch = attacks.Scratch(rate=0.1, steps=60, batch_size=8)
    trial = theft.Trial.of(known, made.init(jax.random.key(2), SHAPE), DATA, 0, 1)
    copies = jax.tree.map(lambda w: w[None, None], made.init(jax.random.key(1), SHAPE))
    one = jnp.ones((1, 1), bool)
    view = attacks.View(
        copies=copies, returned=copies, spread=jax.tree.map(lambda w: jnp.zeros((1, 1)), copies),
        rounds=jnp.zeros((1, 1), jnp.int32), present=one,
    )  # fmt: skip
    model = jax.jit(lambda: trial.made(scratch, jax.random.key(0), view, own))()
    right = evaluate.accuracy(made.apply, model, DATA.train_images[:12], DATA.train_labels[:12], 12)
    assert right > 0.9
    p = named(model, "linen")
    z = forward(p, ARRAYS.train_images[:12], 0, 1)[1]
    assert np.all(np.abs(p["mean"] - z.mean(0)) < 5 * z.std(0) / np.sqrt(1000))


# What is refused, before anything compiles


class Blind(nn.Module):
    """Normalises by batch and cannot be told the mode."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(False)(nn.Dense(3)(x.reshape(x.shape[0], -1)))


class Remembers(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("memory", "last", jnp.zeros, ())
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Counts(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.head = nnx.Linear(64, 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        return self.head(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Blind(), r"^model='Blind': normalises by batch, and its call must take one of train, "),
        (Remembers(), r"^model='Remembers': has state that is neither .*: memory$"),
        (Counts, r"^model='Counts': has state that is neither .*: Variable$"),
    ],
    ids=["blind", "remembers", "counts"],
)
def test_other_state_is_refused_in_one_line(model, said):
    with pytest.raises(ValueError, match=said):
        noisefl.init(keys.root(1), fed.TINY.replace(model=model), DATA)
