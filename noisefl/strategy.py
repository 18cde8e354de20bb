"""What "auto" means for the options of a config that change only speed: by backend, as measured.

BUILD_NOTES.md, "Speed", has the figures. Those of accelerators are reasoned, not measured.
"""

import jax

from noisefl.config import Config


def clients_at_once(config: Config) -> int:
    """Clients side by side under vmap, at most the cohort.

    Two CPU cores are busy with one client's products, and its model stays in cache. On an
    accelerator one client's products are far too small; a hundred bound the memory.
    """
    if config.clients_at_once is not None:
        return min(config.clients_at_once or config.cohort, config.cohort)
    return 1 if _on_cpu() else min(config.cohort, 100)


def eval_batch(config: Config) -> int:
    """Images a forward pass: on a CPU so few that the activations stay in cache."""
    if config.eval_batch is not None:
        return config.eval_batch
    return 50 if _on_cpu() else 1000


def gather(config: Config) -> str:
    """ "step" or "client"; a client's images, as bytes, are few, and one gather is cheaper."""
    return "client" if config.gather == "auto" else config.gather


def lanes_side_by_side(lanes: int) -> int:
    """Lanes of a sweep side by side on one device; on a CPU one keeps a core busy, as a client."""
    return 1 if _on_cpu() else lanes


def lanes_a_device(total: int) -> int:
    """Lanes of one program on one device before the memory is looked at. On a CPU lanes go in turn:
    enough of them that devices seldom wait for each other, few enough to be seen to advance."""
    return min(total, 8 if _on_cpu() else 256)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
