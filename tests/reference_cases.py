"""Parameters for the tests of the reference, and how far two sets of them are apart."""

import numpy as np
import reference_nets as nets

LINEAR: nets.Net = [("flatten",), ("dense", "dense1")]


def random_params(net, image_shape, kernel, widths, rng):
    """Parameters of `net` for images [H, W, Cin]; `widths` are the channels of its layers."""
    (height, width, channels), widths = image_shape, iter(widths)
    features, params = 0, {}
    for kind, *words in net:
        if kind == "conv":
            o = next(widths)
            shape = (kernel, kernel, channels, o)
            shrink = kernel - 1 if words[1] == "VALID" else 0
            height, width, channels = height - shrink, width - shrink, o
        elif kind == "pool":
            height, width = height // 2, width // 2
            continue
        elif kind == "flatten":
            features = height * width * channels
            continue
        elif kind == "dense":
            o = next(widths)
            shape, features = (features, o), o
        else:
            continue
        bound = 1 / np.sqrt(np.prod(shape[:-1]))
        kernel_value = rng.normal(0, 1.5 * bound, shape)
        params[words[0]] = {"kernel": kernel_value, "bias": rng.normal(0, 0.2, shape[-1])}
    return params


def largest_gap(a, b):
    return max(np.abs(a[layer][name] - b[layer][name]).max() for layer in a for name in a[layer])
