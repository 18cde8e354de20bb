"""What a result may depend on besides the options: versions, devices, git revision."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from noisefl import mesh

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def provenance(on: Mesh) -> dict[str, Any]:
    """JSON values by name, for `config.json`."""
    device, lanes, clients = on.devices.flat[0], on.shape[mesh.LANES], on.shape[mesh.CLIENTS]
    return {
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": device.platform,
        "device": f"{device.device_kind}, {lanes} x {clients} of lanes x clients",
        "git_revision": git_revision(),
    }


def git_revision(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of a source tree, "-dirty" appended if it was changed; None outside of git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
