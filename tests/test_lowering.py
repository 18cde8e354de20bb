"""`models.lowering`: every way to convolve is the same convolution, by NumPy loops in float64.

Tolerances are bounds: a sum in which every term is rounded at most k times on its way is off by at
most k · u · Σ |term|, where u = 2⁻²⁴ is float32's largest relative error of one rounding.
"""

import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DEFAULT

from noisefl.models import Lowering, convolve, winograd
from noisefl.models.convolution import ANY, PLAIN

U = 2.0**-24
CONVS = ["patches", "winograd", "lax", "auto"]


def run(function, *inputs, options: Any = None) -> Any:
    return jax.tree.map(np.asarray, jax.jit(function, compiler_options=options)(*inputs))


def uniform(seed: int, *shape: int) -> np.ndarray:
    """float32 in [-1, 1]: the bounds below take 1 for the largest."""
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """To bfloat16."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def naive(images, kernel, g, padding):
    """Convolution, and the gradients of Σ g · output by images and kernel: a loop over places."""
    images, kernel, g = (np.asarray(x, np.float64) for x in (images, kernel, g))
    size = kernel.shape[0]
    low, high = ((size - 1) // 2, size // 2) if padding == "SAME" else (0, 0)
    padded = np.pad(images, ((0, 0), (low, high), (low, high), (0, 0)))
    out, by_padded, by_kernel = np.zeros(g.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for b, row, column in np.ndindex(*g.shape[:3]):
        window = np.s_[b, row : row + size, column : column + size]
        out[b, row, column] = np.tensordot(padded[window], kernel, 3)
        by_kernel += np.multiply.outer(padded[window], g[b, row, column])
        by_padded[window] += kernel @ g[b, row, column]
    height, width = images.shape[1:3]
    return out, by_padded[:, low : low + height, low : low + width], by_kernel


# (size, padding, height, width, channels, features): outputs that Winograd's tiles of 7 − size do
# not divide in one direction or both, one that they do, and one of a single place.
CASES = [
    (2, "SAME", 6, 8, 1, 3),
    (2, "VALID", 7, 9, 16, 32),
    (3, "SAME", 7, 6, 3, 16),
    (3, "VALID", 8, 10, 32, 16),
    (4, "SAME", 7, 8, 16, 1),
    (4, "VALID", 9, 6, 1, 32),
    (5, "SAME", 7, 5, 16, 16),
    (5, "VALID", 8, 7, 3, 3),
    (5, "VALID", 5, 5, 32, 3),
]
Case = tuple[int, str, int, int, int, int]


def arrays(case: Case, lane: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [2, …], kernel, and the gradient that comes from above."""
    size, padding, height, width, channels, features = case
    cut = 0 if padding == "SAME" else size - 1
    return (
        uniform(3 * lane, 2, height, width, channels),
        uniform(3 * lane + 1, size, size, channels, features),
        uniform(3 * lane + 2, 2, height - cut, width - cut, features),
    )


@functools.cache
def expected(case: Case, images: int = 0, kernel: int = 0, size: bool = False):
    """`naive` of the images of one lane and the kernel of another; with `size`, Σ |term|."""
    (x, _, g), (_, k, _) = arrays(case, images), arrays(case, kernel)
    if size:
        x, k, g = np.abs(x), np.abs(k), np.abs(g)
    return naive(x, k, g, case[1])


def plain_bounds(case: Case, images: int = 0, kernel: int = 0) -> list[np.ndarray]:
    """Of output, image gradient and kernel gradient: n terms, each a product and n − 1 sums."""
    places = np.prod(arrays(case)[2].shape[:3])
    terms = [case[0] ** 2 * case[4], case[0] ** 2 * case[5], places]
    sizes = expected(case, images, kernel, size=True)
    return [U * n * size for n, size in zip(terms, sizes, strict=True)]


def winograd_bounds(case: Case) -> list[float]:
    """In one dimension output i is Σ over p, j, q of Aᵀ[i, p] G[p, j] Bᵀ[p, q] g[j] d[q].

    The sum of the sizes of these weights, over all but the index of the result, is how large a
    rounded intermediate can be; two dimensions square it. The gradients are its two transposes.
    """
    size = case[0]
    a, g, b = (np.abs(matrix) for matrix in winograd.matrices(size))
    weights = np.einsum("ip,pj,pq->ijq", a, g, b)
    out, by_image, by_kernel = (weights.sum(axes).max() for axes in [(1, 2), (0, 1), (0, 2)])
    step = 7 - size
    tiles = [-(-n // step) for n in arrays(case)[2].shape[1:3]]
    overlap = -(-6 // step)  # tiles that see one pixel, in one direction
    sums = [case[4], case[5] * overlap**2, 2 * tiles[0] * tiles[1]]
    # Each of three transforms is a product and at most five sums, in two directions; the fractions
    # in G are rounded themselves, twice over; and then there is the sum of products.
    roundings = [2 * 3 * 6 + 2 + n for n in sums]
    mass = [m**2 * n for m, n in zip((out, by_image, by_kernel), sums, strict=True)]
    return [float(U * k * m) for k, m in zip(roundings, mass, strict=True)]


def bounds(conv: str, case: Case, images: int = 0, kernel: int = 0) -> list[Any]:
    """Those of "auto" are Winograd's, which it may choose."""
    if conv in ("patches", "lax"):
        return plain_bounds(case, images, kernel)
    return winograd_bounds(case)


def around(size: int, padding: str) -> Any:
    """The zeros of a padding, above and below, left and right."""
    return ((((size - 1) // 2, size // 2),) if padding == "SAME" else ((0, 0),)) * 2


def forward_and_back(conv: str, padding: str, precision: str = "float32"):
    """(images, kernel, g) → the output of a pass alone, that of one to be differentiated, and the
    gradients; "auto" may lower the two passes in two ways."""
    how = Lowering(conv=conv, precision=precision, target="cpu")

    def both(images, kernel, g):
        zeros = around(len(kernel), padding)
        out, pullback = jax.vjp(lambda i, k: convolve(i, k, zeros, how), images, kernel)
        return convolve(images, kernel, zeros, how), out, *pullback(g)

    return both


def within(ours, theirs, tolerance):
    """No element further off than its tolerance; NaN is."""
    off = np.abs(np.asarray(ours, np.float64) - theirs)
    assert off.shape == theirs.shape
    assert np.all(off <= tolerance), f"{np.max(off / tolerance)} times the tolerance"


def close(found, wanted, tolerances):
    """`found` by forward_and_back, `wanted` by naive."""
    alone, trained, *gradients = found
    pairs = zip(
        (alone, trained, *gradients),
        (wanted[0], *wanted),
        (tolerances[0], *tolerances),
        strict=True,
    )
    for ours, theirs, tolerance in pairs:
        assert ours.dtype == jnp.float32
        within(ours, theirs, tolerance)


@pytest.mark.parametrize(
    ("conv", "case"),
    [(conv, case) for case in CASES for conv in CONVS if conv != "auto"]
    + [("auto", CASES[n]) for n in (0, 1, 5, 6)],  # each pair of lowerings that it chooses
    ids=str,
)
def test_convolution_and_its_gradients(conv, case):
    found = run(forward_and_back(conv, case[1]), *arrays(case))
    close(found, expected(case), bounds(conv, case))


@pytest.mark.slow
@pytest.mark.parametrize("conv", CONVS)
def test_convolution_as_xla_compiles_by_default(conv):
    """One of Winograd's then takes 8 s; the others here are compiled quickly (conftest.py)."""
    case = CASES[3]
    found = run(forward_and_back(conv, case[1]), *arrays(case), options=DEFAULT)
    close(found, expected(case), bounds(conv, case))


# Few channels, for which there is a path of its own; a pass alone that "auto" lowers otherwise.
@pytest.mark.parametrize(
    ("conv", "case"),
    [("patches", CASES[0]), ("patches", CASES[3]), ("lax", CASES[3]), ("lax", CASES[6]),
     ("winograd", CASES[6]), ("auto", CASES[1])],
    ids=str,
)  # fmt: skip
def test_convolution_under_vmap(conv, case):
    """Of many kernels on the same images, of one on many, and of pairs; each lane by NumPy. Last
    the other way round: vmap inside grad, as a mean over models would have it."""
    lanes = [arrays(case, lane) for lane in range(3)]
    images, kernels, gs = (np.stack(part) for part in zip(*lanes, strict=True))
    one, both = arrays(case), forward_and_back(conv, case[1])
    how = Lowering(conv=conv, precision="float32", target="cpu")
    zeros = around(*case[:2])

    def loss(images, kernels):
        out = jax.vmap(lambda i, k: convolve(i, k, zeros, how))(images, kernels)
        return jnp.sum(out * gs)

    def all_of_them(images, kernels, gs):
        return (
            jax.vmap(both, (None, 0, None))(one[0], kernels, one[2]),
            jax.vmap(both, (0, None, 0))(images, one[1], gs),
            jax.vmap(both)(images, kernels, gs),
            jax.grad(loss, (0, 1))(images, kernels),
        )

    *mapped, gradients = run(all_of_them, images, kernels, gs)
    for maps, found in zip([(0, 1), (1, 0), (1, 1)], mapped, strict=True):
        for lane in range(3):
            of = maps[0] * lane, maps[1] * lane  # g is that of the images
            close([leaf[lane] for leaf in found], expected(case, *of), bounds(conv, case, *of))
    for lane in range(3):
        wanted, room = (x[1:] for x in (expected(case, lane, lane), bounds(conv, case, lane, lane)))
        for ours, theirs, tolerance in zip(gradients, wanted, room, strict=True):
            within(ours[lane], theirs, tolerance)


@pytest.mark.parametrize(
    ("conv", "size"), [("winograd", 1), ("winograd", 6), ("lax", 1), ("patches", 6), ("auto", 6)]
)
def test_sizes_that_winograd_does_not_have(conv, size):
    case = (size, "SAME", 7, 6, 16, 16)
    found = run(forward_and_back(conv, "SAME"), *arrays(case))
    close(found, expected(case), plain_bounds(case))


@pytest.mark.parametrize("case", [*CASES[1:4:2], CASES[5], *CASES[7:]], ids=str)
def test_winograd_in_float64_is_exact(case):
    """A wrong weight or tile cannot hide in the room that float32 needs."""
    with jax.enable_x64(True):

        def both(images, kernel, g):
            out, pullback = jax.vjp(winograd.convolve, images, kernel)
            return out, *pullback(g)

        found = run(both, *(x.astype(np.float64) for x in arrays(case)))
        assert found[0].dtype == jnp.float64
    for ours, theirs, tolerance in zip(found, expected(case), winograd_bounds(case), strict=True):
        within(ours, theirs, tolerance * 2.0**-29)  # u is 2⁻⁵³


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_minimal_filtering(size):
    """Σ_p Aᵀ[i, p] G[p, j] Bᵀ[p, q] is 1 where q = i + j, else 0: y[i] = Σ_j g[j] d[i + j].

    In fractions, so exactly: float64 must hold the nearest to each.
    """

    def fractions(matrix: np.ndarray) -> np.ndarray:
        exact = [Fraction(float(x)).limit_denominator(120) for x in matrix.flat]
        assert [float(x) for x in exact] == list(matrix.flat)
        return np.array(exact, object).reshape(matrix.shape)

    a, g, b = (fractions(matrix) for matrix in winograd.matrices(size))
    assert (a.shape, g.shape, b.shape) == ((7 - size, 6), (6, size), (6, 6))
    for i, j, q in np.ndindex(7 - size, size, 6):
        assert sum(a[i, p] * g[p, j] * b[p, q] for p in range(6)) == (q == i + j)


@pytest.mark.parametrize(
    ("conv", "case"),
    [("patches", CASES[0]), ("patches", CASES[3]), ("lax", CASES[6]), ("auto", CASES[1])],
    ids=str,
)
def test_bfloat16_rounds_inputs_and_nothing_else(conv, case):
    """Products of two bfloat16 are exact in float32, and so the sums alone are off."""
    found = run(forward_and_back(conv, case[1], "bfloat16"), *arrays(case))
    images, kernel, g = map(rounded, arrays(case))
    wanted = naive(images, kernel, g, case[1])
    close(found, wanted, plain_bounds(case))
    # float32 would not pass: what the inputs lose is above the tolerance.
    for theirs, exact, tolerance in zip(wanted, expected(case), plain_bounds(case), strict=True):
        assert np.any(np.abs(theirs - exact) > 3 * tolerance)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere, default is not float32")
@pytest.mark.parametrize("conv", ["patches", "winograd", "lax"])
def test_default_precision_is_float32_on_a_cpu(conv):
    case = CASES[3]
    default, full = (
        run(forward_and_back(conv, case[1], name), *arrays(case)) for name in ("default", "float32")
    )
    for ours, theirs in zip(default, full, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def pooled(out, g):
    """Maxima of 2 × 2 blocks of `out`, and g where they are."""
    top, back = np.zeros(g.shape), np.zeros(out.shape)
    for b, row, column, channel in np.ndindex(*g.shape):
        block = np.s_[b, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2, channel]
        top[b, row, column, channel] = out[block].max()
        back[block] = np.where(out[block] == out[block].max(), g[b, row, column, channel], 0)
    return top, back


@pytest.mark.parametrize("conv", ["patches", "winograd", "lax"])
@pytest.mark.parametrize("case", [*CASES[:8], (1, "VALID", 5, 4, 3, 2)], ids=str)
def test_a_pooled_convolution(conv, case):
    """Odd rows and columns are dropped. Which of four is the largest, no rounding here changes."""
    size, padding, *_ = case
    images, kernel, above = arrays(case)
    g = above[:, : above.shape[1] // 2, : above.shape[2] // 2]
    top, back = pooled(expected(case)[0], g)
    wanted = top, *naive(images, kernel, back, padding)[1:]
    how = Lowering(conv=conv, precision="float32", target="cpu")

    def both(images, kernel, g):
        out, pullback = jax.vjp(
            lambda i, k: convolve(i, k, around(size, padding), how, pool=True), images, kernel
        )
        return out, *pullback(g)

    many = run(jax.vmap(both), *(np.stack([x, x[::-1]]) for x in (images, kernel, g)))
    room = winograd_bounds(case) if conv == "winograd" and size > 1 else plain_bounds(case)
    single = run(both, images, kernel, g)
    for ours, side_by_side, theirs, tolerance in zip(single, many, wanted, room, strict=True):
        within(ours, theirs, np.max(tolerance))
        within(side_by_side[0], theirs, np.max(tolerance))


@pytest.mark.parametrize("way", ["patches", "strips"])
@pytest.mark.parametrize(("size", "height", "width", "features"), [(5, 9, 7, 6), (2, 3, 5, 1)])
def test_every_cut_of_one_channel_is_the_same(way, size, height, width, features):
    """Whichever of them a target takes: 5 × 5 sums of products at most 1, in any order."""
    images, kernel = uniform(1, 2, height, width, 1), uniform(2, size, size, 1, features)
    g = uniform(3, 2, height - size + 1, width - size + 1, features)

    def both(images, kernel, g):
        out, pullback = jax.vjp(lambda i, k: {**ANY, **PLAIN}[way](i, k, "float32"), images, kernel)
        return out, *pullback(g)

    for ours, wanted in zip(
        run(both, images, kernel, g), naive(images, kernel, g, "VALID"), strict=True
    ):
        terms = max(size * size, features * size * size, g.size // features)
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=terms**2 * U)
