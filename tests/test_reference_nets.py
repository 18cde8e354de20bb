"""The reference's layers, networks and ClientUpdate: hand-worked numbers and finite differences."""

import numpy as np
import pytest
import reference_nets as nets
from reference_cases import LINEAR, largest_gap, random_params

# Layers.


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_conv_is_its_definition(padding):
    rng = np.random.default_rng(0)
    x, kernel, bias = (
        rng.normal(size=(2, 5, 4, 3)),
        rng.normal(size=(3, 3, 3, 2)),
        rng.normal(size=2),
    )
    y = nets.conv(x, kernel, bias, padding)
    shift = 1 if padding == "SAME" else 0
    assert y.shape == ((2, 5, 4, 2) if padding == "SAME" else (2, 3, 2, 2))
    for n, r, c, o in np.ndindex(y.shape):
        total = bias[o]
        for i, j, q in np.ndindex(3, 3, 3):
            row, column = r + i - shift, c + j - shift
            if 0 <= row < 5 and 0 <= column < 4:
                total += x[n, row, column, q] * kernel[i, j, q, o]
        assert y[n, r, c, o] == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("k", [2, 3])
def test_conv_backward_is_the_finite_difference(padding, k):
    rng = np.random.default_rng(1)
    x, kernel, bias = (
        rng.normal(size=(2, 4, 5, 2)),
        rng.normal(size=(k, k, 2, 3)),
        rng.normal(size=3),
    )
    dy = rng.normal(size=nets.conv(x, kernel, bias, padding).shape)
    gradients = nets.conv_backward(x, kernel, padding, dy)
    values = (x, kernel, bias)
    for value, gradient in zip(values, gradients, strict=True):
        assert gradient.shape == value.shape
        for at in np.ndindex(value.shape):  # conv is linear in each: an exact difference
            change = np.zeros(value.shape)
            change[at] = 1.0
            moved_x, moved_kernel, moved_bias = (v + change if v is value else v for v in values)
            moved = nets.conv(moved_x, moved_kernel, moved_bias, padding)
            difference = np.sum(dy * (moved - nets.conv(x, kernel, bias, padding)))
            assert gradient[at] == pytest.approx(difference, abs=1e-10)


def test_pool_takes_the_maximum_and_its_first_tie_gets_the_gradient():
    x = np.array([[1.0, 2, 7, 7, 9], [3, 0, 7, 7, 9], [9, 9, 9, 9, 9]]).reshape(1, 3, 5, 1)
    np.testing.assert_array_equal(nets.pool(x)[0, :, :, 0], [[3, 7]])
    dx = nets.pool_backward(x, np.array([[5.0, 6.0]]).reshape(1, 1, 2, 1))
    np.testing.assert_array_equal(
        dx[0, :, :, 0], [[0, 0, 6, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    )


def test_cross_entropy_of_known_logits():
    logits = np.log(np.array([[1.0, 3.0], [4.0, 1.0]])) + 1000  # p = ¼, ¾ and ⅘, ⅕
    loss, dlogits = nets.cross_entropy(logits, np.array([1, 1]))
    assert loss == pytest.approx(-(np.log(0.75) + np.log(0.2)) / 2)
    np.testing.assert_allclose(dlogits, [[0.125, -0.125], [0.4, -0.4]], atol=1e-12)


# Networks.

CASES = {
    "lenet5": ((14, 13, 2), 3, (3, 4, 6, 5, 3)),
    "mcmahan": ((8, 8, 1), 5, (3, 4, 6, 3)),
    "mlp": ((8, 4, 2), 0, (7, 6, 3)),
}


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_gradient_is_the_finite_difference(name, blank):
    """Also on images with an empty border, where whole pooling windows tie."""
    shape, kernel, widths = CASES[name]
    net, rng = nets.NETS[name], np.random.default_rng(2)
    params = random_params(net, shape, kernel, widths, rng)
    images = rng.integers(0, 256, (4, *shape)).astype(np.uint8)
    if blank:
        images[:, :3] = images[:, -3:] = images[:, :, :1] = 0
    labels = np.array([0, 1, 2, 1])
    _, gradient = nets.loss_and_gradient(net, params, images, labels)
    assert {layer: set(g) for layer, g in gradient.items()} == {
        layer: {"kernel", "bias"} for layer in params
    }
    step = 1e-6
    for layer in params:
        for parameter, value in params[layer].items():
            assert np.abs(gradient[layer][parameter]).max() > 1e-4  # it is not a dead layer
            for flat in rng.choice(value.size, min(value.size, 25), replace=False):
                at = np.unravel_index(flat, value.shape)
                kept, losses = value[at], []
                for moved in (kept + step, kept - step):
                    value[at] = moved
                    losses.append(nets.loss_and_gradient(net, params, images, labels)[0])
                value[at] = kept
                difference = (losses[0] - losses[1]) / (2 * step)
                assert gradient[layer][parameter][at] == pytest.approx(difference, abs=2e-8)


def test_accuracy_counts_over_chunks():
    params = {"dense1": {"kernel": np.eye(2), "bias": np.zeros(2)}}
    images = np.zeros((1203, 1, 2, 1), np.uint8)
    images[:, 0, 1] = 255  # every image says class 1
    labels = np.ones(1203, int)
    labels[[0, 600, 1202]] = 0
    assert nets.accuracy(LINEAR, params, images, labels) == 1200 / 1203


# ClientUpdate.


def linear_client(rng):
    params = {"dense1": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}}
    images = rng.integers(0, 256, (7, 2, 2, 1)).astype(np.uint8)
    return params, images, rng.integers(0, 3, 7)


def linear_gradient(params, images, labels):
    """Of the mean cross-entropy of a linear model, written out sample by sample."""
    kernel, bias = np.zeros((4, 3)), np.zeros(3)
    for image, label in zip(images, labels, strict=True):
        x = image.ravel() / 255
        p = np.exp(x @ params["dense1"]["kernel"] + params["dense1"]["bias"])
        residual = p / p.sum() - np.eye(3)[label]
        kernel += np.outer(x, residual) / len(labels)
        bias += residual / len(labels)
    return kernel, bias


def test_client_update_is_sgd_with_momentum_over_ragged_batches():
    params, images, labels = linear_client(np.random.default_rng(3))
    batches = [np.array([6, 0, 3]), np.array([1, 2, 5]), np.array([4])]
    out = nets.client_update(LINEAR, params, batches, images, labels, 0.5, momentum=0.9)
    w = {"dense1": dict(params["dense1"])}
    v_kernel, v_bias = 0.0, 0.0
    for batch in batches:
        g_kernel, g_bias = linear_gradient(w, images[batch], labels[batch])
        v_kernel, v_bias = 0.9 * v_kernel + g_kernel, 0.9 * v_bias + g_bias
        w["dense1"]["kernel"] = w["dense1"]["kernel"] - 0.5 * v_kernel
        w["dense1"]["bias"] = w["dense1"]["bias"] - 0.5 * v_bias
    assert largest_gap(out, w) < 1e-12
    plain = nets.client_update(LINEAR, params, batches, images, labels, 0.5)
    assert largest_gap(out, plain) > 1e-3
    zero = nets.client_update(LINEAR, params, batches, images, labels, 0.5, momentum=0.0)
    assert largest_gap(plain, zero) == 0
    assert nets.client_update(LINEAR, params, [], images, labels, 0.5) is params


def test_clipping_bounds_the_global_norm_and_only_when_it_is_exceeded():
    params, images, labels = linear_client(np.random.default_rng(4))
    batches = [np.arange(7)]
    norm = np.sqrt(sum(np.sum(g**2) for g in linear_gradient(params, images, labels)))
    free = nets.client_update(LINEAR, params, batches, images, labels, 1.0)
    loose = nets.client_update(LINEAR, params, batches, images, labels, 1.0, None, 1.01 * norm)
    tight = nets.client_update(LINEAR, params, batches, images, labels, 1.0, None, 0.25 * norm)
    assert largest_gap(free, loose) == 0
    quarter = nets.combine(lambda w, f: w + 0.25 * (f - w), params, free)
    assert largest_gap(tight, quarter) < 1e-12
