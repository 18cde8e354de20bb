"""Networks, gradients and ClientUpdate in plain NumPy: what the library is compared with.

Shares no code with `noisefl`. Everything is float64 and written with the plainest loops that are
still quick enough for a test. A network is a list of layers, each a tuple of words:

    ("conv", name, "SAME" or "VALID")   cross-correlation, stride 1, kernel [k, k, Cin, O], bias [O]
    ("relu",)
    ("pool",)                           2x2 maximum, stride 2; an odd last row or column is dropped
    ("flatten",)                        NHWC order: height slowest, channel fastest
    ("dense", name)                     kernel [in, out], bias [out]

Widths and kernel sizes are read off the parameters, `{layer: {"kernel": ..., "bias": ...}}`.
"""

from collections.abc import Callable, Sequence

import numpy as np

Params = dict[str, dict[str, np.ndarray]]
Layer = tuple[str, ...]
Net = list[Layer]

NETS: dict[str, Net] = {
    "lenet5": [
        *[("conv", "conv1", "SAME"), ("relu",), ("pool",)],
        *[("conv", "conv2", "VALID"), ("relu",), ("pool",)],
        *[("flatten",), ("dense", "dense1"), ("relu",), ("dense", "dense2"), ("relu",)],
        ("dense", "dense3"),
    ],
    "mcmahan": [
        *[("conv", "conv1", "SAME"), ("relu",), ("pool",)],
        *[("conv", "conv2", "SAME"), ("relu",), ("pool",)],
        *[("flatten",), ("dense", "dense1"), ("relu",), ("dense", "dense2")],
    ],
    "mlp": [
        *[("flatten",), ("dense", "dense1"), ("relu",), ("dense", "dense2"), ("relu",)],
        ("dense", "dense3"),
    ],
}


def combine(function: Callable, *models: Params) -> Params:
    """The model whose every parameter is `function` of that parameter of each of `models`."""
    first = models[0]
    return {
        layer: {name: function(*[model[layer][name] for model in models]) for name in first[layer]}
        for layer in first
    }


def as_float64(params) -> Params:
    """A float64 copy of a nested mapping of arrays of any kind."""
    return {
        layer: {name: np.array(value, np.float64) for name, value in params[layer].items()}
        for layer in params
    }


# One layer at a time: y = f(x) and, given dL/dy, the gradients.


def pad_same(x: np.ndarray, k: int, padding: str) -> np.ndarray:
    """Zeros around the image so that a k x k kernel keeps its size; for even k, one more below."""
    low, high = ((k - 1) // 2, k // 2) if padding == "SAME" else (0, 0)
    return np.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))


def conv(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, padding: str) -> np.ndarray:
    """y[n, r, c, o] = bias[o] + Σ_{i, j, q} x[n, r + i, c + j, q] kernel[i, j, q, o], x padded."""
    k = kernel.shape[0]
    x = pad_same(x, k, padding)
    height, width = x.shape[1] - k + 1, x.shape[2] - k + 1
    if height < 1 or width < 1:
        raise ValueError(f"image {x.shape[1:3]}: smaller than the kernel of size {k}")
    y = np.zeros((len(x), height, width, kernel.shape[3])) + bias
    for i in range(k):
        for j in range(k):
            y += x[:, i : i + height, j : j + width] @ kernel[i, j]
    return y


def conv_backward(x: np.ndarray, kernel: np.ndarray, padding: str, dy: np.ndarray):
    """(dx, dkernel, dbias) of `conv`."""
    k = kernel.shape[0]
    low = (k - 1) // 2 if padding == "SAME" else 0
    padded = pad_same(x, k, padding)
    height, width = dy.shape[1:3]
    dpadded, dkernel = np.zeros(padded.shape), np.zeros(kernel.shape)
    for i in range(k):
        for j in range(k):
            seen = padded[:, i : i + height, j : j + width]
            dkernel[i, j] = np.tensordot(seen, dy, axes=([0, 1, 2], [0, 1, 2]))
            dpadded[:, i : i + height, j : j + width] += dy @ kernel[i, j].T
    dx = dpadded[:, low : low + x.shape[1], low : low + x.shape[2]]
    return dx, dkernel, dy.sum((0, 1, 2))


CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def pool(x: np.ndarray) -> np.ndarray:
    """Maximum of each 2x2 window."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return np.max([x[:, i:height:2, j:width:2] for i, j in CORNERS], axis=0)


def pool_backward(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """dx of `pool`: all of a window's gradient goes to its first maximum, in row order.

    An even split gives the same gradient of the parameters wherever a tie comes from equal image
    patches, such as an empty background, or from units that ReLU switches off.
    """
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    largest = pool(x)
    dx, given = np.zeros(x.shape), np.zeros(dy.shape, bool)
    for i, j in CORNERS:
        here = (x[:, i:height:2, j:width:2] == largest) & ~given
        dx[:, i:height:2, j:width:2] = dy * here
        given |= here
    return dx


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Softmax cross-entropy, the mean over the rows, and its gradient by the logits [N, C]."""
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    dlogits = np.exp(log_p)
    dlogits[rows, labels] -= 1
    return -log_p[rows, labels].mean(), dlogits / len(labels)


# A whole network.


def forward(net: Net, params: Params, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [N, C] of uint8 images [N, H, W, Cin] (divided by 255), and each layer's input."""
    x, inputs = images.astype(np.float64) / 255, []
    for kind, *words in net:
        inputs.append(x)
        if kind == "conv":
            x = conv(x, params[words[0]]["kernel"], params[words[0]]["bias"], words[1])
        elif kind == "relu":
            x = np.maximum(x, 0)
        elif kind == "pool":
            x = pool(x)
        elif kind == "flatten":
            x = x.reshape(len(x), -1)
        elif kind == "dense":
            x = x @ params[words[0]]["kernel"] + params[words[0]]["bias"]
        else:
            raise ValueError(f"layer {kind!r}: must be conv, relu, pool, flatten or dense")
    return x, inputs


def loss_and_gradient(
    net: Net, params: Params, images: np.ndarray, labels: np.ndarray
) -> tuple[float, Params]:
    """Mean loss over the batch and its gradient, shaped like `params`."""
    logits, inputs = forward(net, params, images)
    loss, dy = cross_entropy(logits, labels)
    gradient: Params = {}
    for (kind, *words), x in zip(reversed(net), reversed(inputs), strict=True):
        if kind == "conv":
            kernel = params[words[0]]["kernel"]
            dy, dkernel, dbias = conv_backward(x, kernel, words[1], dy)
            gradient[words[0]] = {"kernel": dkernel, "bias": dbias}
        elif kind == "relu":
            dy = dy * (x > 0)
        elif kind == "pool":
            dy = pool_backward(x, dy)
        elif kind == "flatten":
            dy = dy.reshape(x.shape)
        else:
            gradient[words[0]] = {"kernel": x.T @ dy, "bias": dy.sum(0)}
            dy = dy @ params[words[0]]["kernel"].T
    return loss, gradient


def accuracy(net: Net, params: Params, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit (the first of equals) is their label."""
    right = 0
    for at in range(0, len(labels), 500):
        logits, _ = forward(net, params, images[at : at + 500])
        right += int((logits.argmax(1) == labels[at : at + 500]).sum())
    return right / len(labels)


def client_update(
    net: Net,
    params: Params,
    batches: Sequence[np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    learning_rate: float,
    momentum: float | None = None,
    clip_norm: float | None = None,
) -> Params:
    """ClientUpdate(k, w) of ALGORITHM.md: one SGD step a batch, from `params` on.

    `batches` are index arrays into this client's `images` [n_k, H, W, Cin] and `labels` [n_k], all
    epochs in order; a ragged last batch is simply shorter. A step clips g to `clip_norm` (its norm
    over all parameters), then v ← μ v + g, then w ← w − η v; v starts at zero.
    """
    velocity = combine(np.zeros_like, params)
    for batch in batches:
        _, gradient = loss_and_gradient(net, params, images[batch], labels[batch])
        if clip_norm is not None:
            squares = [np.sum(g**2) for layer in gradient.values() for g in layer.values()]
            scale = min(1.0, clip_norm / max(np.sqrt(sum(squares)), 1e-300))
            gradient = combine(lambda g, s=scale: s * g, gradient)
        mu = 0.0 if momentum is None else momentum
        velocity = combine(lambda v, g, mu=mu: mu * v + g, velocity, gradient)
        params = combine(lambda w, v: w - learning_rate * v, params, velocity)
    return params
