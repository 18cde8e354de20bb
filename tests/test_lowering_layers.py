"""`models.lowering` of pooling, dense layers and whole models, by NumPy in float64; bad values.

As in test_lowering.py, a sum of n products is off by at most n · u · Σ |term|, u = 2⁻²⁴.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference_nets as nets
from flax import linen as nn

from noisefl import models
from noisefl.models import LOWERINGS, MODELS, Lowering, functions, max_pool, winograd

U = 2.0**-24


def run(function, *inputs) -> Any:
    return jax.tree.map(np.asarray, jax.jit(function)(*inputs))


def uniform(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# Pooling


def numpy_pool(x, g):
    """Maxima of 2 × 2 blocks, and g shared equally among those that attain them."""
    out, back = np.zeros(g.shape), np.zeros(x.shape)
    for b, row, column, channel in np.ndindex(*g.shape):
        block = np.s_[b, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2, channel]
        out[b, row, column, channel] = x[block].max()
        hit = x[block] == x[block].max()
        back[block] = hit * float(g[b, row, column, channel]) / hit.sum()
    return out, back


@pytest.mark.parametrize(
    ("shape", "ties"),
    [((2, 4, 6, 3), False), ((2, 5, 7, 1), True), ((1, 3, 2, 4), False), ((2, 2, 3, 2), True)],
)
def test_max_pooling(shape, ties):
    rng, lanes = np.random.default_rng(7), (3, *shape)
    # Two values, so that every number of ties occurs.
    x = (rng.integers(0, 2, lanes) if ties else rng.normal(size=lanes)).astype(np.float32)
    g = uniform(8, 3, shape[0], shape[1] // 2, shape[2] // 2, shape[3])
    wanted = [numpy_pool(*lane) for lane in zip(x, g, strict=True)]
    assert ties == any(np.count_nonzero(back) > g[0].size for _, back in wanted)
    outs = {}
    for how in ("compare", "mask", "reduce", "auto"):

        def pooled(x, g, how=how) -> Any:
            out, pullback = jax.vjp(lambda x: max_pool(x, Lowering(pool=how)), x)
            return out, pullback(g)[0]

        def both(x, g, pooled=pooled) -> Any:
            return jax.vmap(pooled)(x, g), pooled(x[0], g[0])

        mapped, single = run(both, x, g)
        outs[how] = np.asarray(mapped[0])
        lanes = [single, *zip(*mapped, strict=True)]
        for ours, theirs in zip(lanes, [wanted[0], *wanted], strict=True):
            np.testing.assert_array_equal(ours[0], theirs[0])
            # By a division, or by a product with a reciprocal: at most two roundings.
            np.testing.assert_allclose(ours[1], theirs[1], rtol=2 * U, atol=0)
    np.testing.assert_array_equal(outs["compare"], outs["reduce"])


# Dense layers


def dense(gradient: str, precision: str):
    """(x, params, g) → output, its gradients by x, by kernel and by bias."""
    layer: Any = functions(nn.Dense(7), Lowering(dense=gradient, precision=precision, target="cpu"))

    def all_of_them(x, kernel, g) -> Any:
        params = {"kernel": kernel, "bias": jnp.zeros(7)}
        out, pullback = jax.vjp(lambda x, p: layer.apply(p, x), x, params)
        by_x, by_params = pullback(g)
        return out, by_x, by_params["kernel"], by_params["bias"]

    return all_of_them


def numpy_dense(x, kernel, g):
    x, kernel, g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    return x @ kernel, g @ kernel.T, x.T @ g, g.sum(0)


def check_dense(found, x, kernel, g, inputs=np.asarray):
    """`inputs`: what the precision makes of the factors of a product."""
    terms = [x.shape[1], g.shape[1], x.shape[0], x.shape[0]]
    wanted = numpy_dense(*map(inputs, (x, kernel, g)))
    wanted = (*wanted[:3], np.asarray(g, np.float64).sum(0))  # the bias sees no product
    sizes = numpy_dense(*map(np.abs, (x, kernel, g)))
    for ours, theirs, n, size in zip(found, wanted, terms, sizes, strict=True):
        assert ours.dtype == jnp.float32
        off = np.abs(np.asarray(ours, np.float64) - theirs)
        assert np.all(off <= U * n * size), np.max(off / (U * n * size))


@pytest.mark.parametrize(
    ("gradient", "rows"),
    [("matmul", 1), ("matmul", 20), ("outer", 1), ("outer", 5), ("auto", 16), ("auto", 20)],
)
def test_dense_gradients(gradient, rows):
    """One kernel; then, under vmap, many kernels on the same rows, and pairs."""
    xs, gs, kernels = uniform(1, 3, rows, 11), uniform(2, 3, rows, 7), uniform(3, 3, 11, 7)
    one = dense(gradient, "float32")

    def all_of_them(xs, kernels, gs) -> Any:
        shared = jax.vmap(one, (None, 0, None))(xs[0], kernels, gs[0])
        return one(xs[0], kernels[0], gs[0]), shared, jax.vmap(one)(xs, kernels, gs)

    single, shared, pairs = run(all_of_them, xs, kernels, gs)
    check_dense(single, xs[0], kernels[0], gs[0])
    for lane in range(3):
        check_dense([leaf[lane] for leaf in shared], xs[0], kernels[lane], gs[0])
        check_dense([leaf[lane] for leaf in pairs], xs[lane], kernels[lane], gs[lane])


@pytest.mark.parametrize("gradient", ["matmul", "outer", "auto"])
def test_dense_in_bfloat16_rounds_inputs_and_nothing_else(gradient):
    """Of every product, those of the kernel's gradient too (`product`)."""
    x, kernel, g = uniform(1, 5, 11), uniform(2, 11, 7), uniform(3, 5, 7)
    found = run(dense(gradient, "bfloat16"), x, kernel, g)
    check_dense(found, x, kernel, g, lambda a: a.astype(ml_dtypes.bfloat16))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere, default is not float32")
@pytest.mark.parametrize("gradient", ["matmul", "outer"])
def test_dense_default_precision_is_float32_on_a_cpu(gradient):
    inputs = uniform(1, 5, 11), uniform(2, 11, 7), uniform(3, 5, 7)
    default, full = (run(dense(gradient, how), *inputs) for how in ("default", "float32"))
    for ours, theirs in zip(default, full, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# Values


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [
        ("conv", "winogard", "winograd"),
        ("conv", "patch", "patches"),
        ("pool", "compares", "compare"),
        ("dense", "mathmul", "matmul"),
        ("precision", "float23", "float32"),
        ("precision", "bfloat", "bfloat16"),
        ("conv", "", None),
        ("pool", None, None),
        ("dense", 3, None),
        ("precision", True, None),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field, value, meant):
    with pytest.raises(ValueError, match=f"^{field}=") as caught:
        Lowering(**{field: value})
    hint = f" (did you mean {meant}?)" if meant else ""
    allowed = ", ".join(LOWERINGS[field])
    assert str(caught.value) == f"{field}={value!r}: must be one of {allowed}{hint}"


def test_every_listed_value_is_taken_but_winograd_in_bfloat16():
    for field, values in LOWERINGS.items():
        for value in values:
            assert getattr(Lowering(**{field: value}), field) == value
    for conv in set(LOWERINGS["conv"]) - {"winograd"}:
        assert Lowering(conv=conv, precision="bfloat16").conv == conv
    with pytest.raises(ValueError, match=r"^conv='winograd': needs float32"):
        Lowering(conv="winograd", precision="bfloat16")


# Whole models

NETS: dict[str, nets.Net] = {
    **nets.NETS,
    "two_conv": [
        *[("conv", "conv1", "VALID"), ("relu",), ("conv", "conv2", "VALID"), ("relu",), ("pool",)],
        *[("flatten",), ("dense", "dense1"), ("relu",), ("dense", "dense2")],
    ],
}
SMALL = (12, 12, 1)  # the smallest on which LeNet-5 still has something to convolve
AUTO = Lowering("auto", "auto", "auto", "float32", "cpu")
WAYS = [  # of each layer alone all are tested above, and in test_lowering.py
    ("lenet5", Lowering("patches", "compare", "matmul", "float32")),
    ("mcmahan", Lowering("lax", "reduce", "outer", "float32")),
    ("two_conv", Lowering("winograd", "compare", "outer", "float32")),
    ("mlp", Lowering("patches", "compare", "outer", "float32")),
]


def spread(size: int) -> float:
    """How many times its rounding error Winograd adds to a convolution, for random numbers.

    In one dimension Σ_p Aᵀ[i, p]² |G[p]|² |Bᵀ[p]|² is the variance of what is summed to one output,
    r that of the plain sum. Two dimensions square the ratio of variances.
    """
    a, g, b = (matrix**2 for matrix in winograd.matrices(size))
    return float(np.max(a @ (g.sum(1) * b.sum(1))) / size)


def room(params: nets.Params) -> float:
    """Relative error, in the Euclidean norm, of what passes all layers up and down again.

    Roundings of either sign add up like a random walk: a layer of n terms, and the 38 steps of
    Winograd's transforms, leaves a relative √(n + 38) · u. Four standard deviations.
    """
    total = 0.0
    for leaves in params.values():
        kernel = leaves["kernel"]
        factor = spread(kernel.shape[0]) if kernel.ndim == 4 else 1.0
        # The gradient of a convolution's kernel sums over up to 2 · 12 · 12 places.
        terms = max(np.prod(kernel.shape[:-1]), kernel.shape[-1], 2 * 12**2)
        total += 2 * factor * np.sqrt(terms + 38) * U
    return 4 * float(total)


def test_every_chain_of_layers_is_compared():
    """Other models are compared with what XLA makes of them, in test_program.py."""
    assert {name for name, _ in WAYS} == set(NETS) <= set(MODELS)


def random_model(name: str) -> nets.Params:
    model = models.by_name(name, 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SMALL)))["params"]
    rng = np.random.default_rng(11)

    def draw(leaf) -> np.ndarray:  # float32 numbers: the library's copies are the same
        scale = np.prod(leaf.shape[:-1]) ** -0.5
        return rng.normal(0, scale if len(leaf.shape) > 1 else 0.1, leaf.shape).astype(np.float32)

    return nets.as_float64(jax.tree.map(draw, shapes))


@pytest.mark.parametrize(("name", "other"), WAYS, ids=[name for name, _ in WAYS])
def test_a_model_is_that_of_numpy_under_any_lowering(name, other):
    params = random_model(name)
    rng = np.random.default_rng(12)
    images = rng.integers(0, 256, (2, *SMALL)).astype(np.uint8)
    labels = np.array([3, 7])
    logits, _ = nets.forward(NETS[name], params, images)
    _, gradient = nets.loss_and_gradient(NETS[name], params, images, labels)
    tolerance = room(params)
    assert tolerance < 0.01  # or it would hide a fault

    for way in (other, AUTO):
        model = functions(models.by_name(name, 10), way)

        def both(params, images, model=model):
            def loss(params):
                out = model.apply(params, images / 255)
                log_p = jax.nn.log_softmax(out)
                return -jnp.mean(log_p[jnp.arange(2), labels]), out

            gradient, out = jax.grad(loss, has_aux=True)(params)
            return out, gradient, model.apply(params, images / 255)

        *found, alone = run(both, jax.tree.map(np.float32, params), images.astype(np.float32))

        def close(ours, theirs, way=way):
            off = np.linalg.norm(ours - theirs)
            assert off < tolerance * np.linalg.norm(theirs), (way, off)

        jax.tree.map(close, found, [logits, gradient])
        close(alone, logits)  # a pass that is not differentiated may be lowered otherwise
