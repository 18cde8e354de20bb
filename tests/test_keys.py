"""`keys`: streams that repeat, and never meet."""

import ast
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import noisefl
from noisefl import keys

PACKAGE = Path(noisefl.__file__).parent


def data(key) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def purposes() -> list[tuple[str, ast.expr]]:
    """(file, second argument) of every call `keys.stream(…)` of the package."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("stream"):
                purpose = {k.arg: k.value for k in node.keywords}.get("purpose")
                found.append((file.name, purpose or node.args[1]))
    return found


def test_streams_differ_by_seed_purpose_and_index():
    streams = [
        data(keys.stream(keys.root(seed), purpose, index))
        for seed in (0, 1, 2**32 - 1)
        for purpose in ("groups", "server", "client")
        for index in (None, 0, 1, 2, 99, 2**31 - 1)
    ]
    assert len(set(streams)) == len(streams) == 54


def test_streams_repeat_and_nested_ones_do_not_meet():
    """Round t of client k is not round k of client t."""
    root = keys.root(7)
    assert jnp.issubdtype(root.dtype, jax.dtypes.prng_key)
    traced = jax.jit(lambda k, i: keys.stream(k, "client", i))(root, 3)
    assert data(traced) == data(keys.stream(root, "client", 3))
    pairs = [(t, k) for t in range(8) for k in range(8)]
    nested = {data(keys.stream(keys.of_round(root, t), "client", k)) for t, k in pairs}
    assert len(nested) == 64
    assert data(keys.of_round(root, 2)) == data(
        keys.stream(keys.stream(root, "rounds"), "round", 2)
    )


def test_streams_are_unrelated():
    """Numbers of 4000 neighbouring indices: any correlation beyond chance at 5 sigma (6e-7)."""
    root = keys.root(0)
    draws = jax.vmap(lambda i: jax.random.normal(keys.stream(root, "client", i)))(np.arange(4000))
    draws = np.asarray(draws, np.float64)
    other = jax.vmap(lambda i: jax.random.normal(keys.stream(root, "round", i)))(np.arange(4000))
    for a, b in ((draws[:-1], draws[1:]), (draws, np.asarray(other, np.float64))):
        assert abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(a)) < 5


def test_no_two_purposes_of_the_package_collide():
    found = purposes()
    assert {"groups", "server", "client", "calibration", "round", "epoch", "try"} <= {
        node.value for _, node in found if isinstance(node, ast.Constant)
    }
    for file, node in found:
        assert isinstance(node, ast.Constant), f"{file}: purpose {ast.unparse(node)} is no literal"
        assert isinstance(node.value, str), file
    names = {node.value for _, node in found if isinstance(node, ast.Constant)}
    assert len({zlib.crc32(str(name).encode()) for name in names}) == len(names)


def test_only_this_module_makes_and_folds_keys():
    """`fold_in` by hand could meet a stream. `key(0)` serves shapes, under `eval_shape`, alone."""
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        shapes_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "jax.eval_shape"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and file.name != "keys.py"
                and id(node) not in shapes_only
            ):
                by_hand = re.fullmatch(
                    r"jax\.random\.(key|PRNGKey|fold_in)", ast.unparse(node.func)
                )
                assert by_hand is None, f"{file.name}:{node.lineno}"


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_that_would_repeat_another_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed}: must be 0 to 4294967295"):
        keys.root(seed)


@pytest.mark.parametrize("seed", [1.5, True, "1", None, np.array([1])])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ValueError, match=r"^seed=.*: must be 0 to 4294967295$"):
        keys.root(seed)
    assert keys.root(np.uint32(1)) == keys.root(1)  # pyright: ignore[reportArgumentType]
