"""Accelerators that XLA compiles for on a machine that has none."""

import importlib.util
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# What XLA must know of an NVIDIA H100 SXM (a GpuTargetConfigProto): NVIDIA's data sheet, and what
# XLA itself ships for this card.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """One accelerator, and the rates by which a round on it is bounded.

    Attributes:
      title: the device.
      strategy: what `Strategy.target` calls it.
      module: XLA's compiler for it, which the extra of the target's name installs.
      flops: peak of dense products at JAX's default precision, operations a second.
      bandwidth: of its memory, bytes a second.
      launch: seconds that a kernel costs beside its work.
      options: for the compiler, which cannot time anything here.
    """

    title: str
    strategy: str
    module: str
    flops: float
    bandwidth: float
    launch: float
    options: dict[str, Any]


TARGETS = {
    # 495 TFLOP/s in TensorFloat-32 and 3.35 TB/s (NVIDIA H100 SXM data sheet, without sparsity); a
    # launch inside a loop of XLA's is taken to cost 2.5 µs.
    "h100": Target(
        title="NVIDIA H100 80GB",
        strategy="gpu",
        module="jax_plugins.xla_cuda12",
        flops=495e12,
        bandwidth=3.35e12,
        launch=2.5e-6,
        options={"xla_gpu_autotune_level": 0},
    ),
    # 197 TFLOP/s in bfloat16 and 819 GB/s (Google Cloud, TPU v5e). A program is one launch; what an
    # operation costs to begin is small beside that: 0.2 µs is a guess.
    "v5e": Target(
        title="TPU v5e",
        strategy="tpu",
        module="libtpu",
        flops=197e12,
        bandwidth=819e9,
        launch=2e-7,
        options={},
    ),
}


def installed(name: str) -> bool:
    """Whether XLA's compiler for a target is there."""
    module = TARGETS[name].module
    package = importlib.util.find_spec(module.partition(".")[0])
    return package is not None and importlib.util.find_spec(module) is not None


def device(name: str) -> Any:
    """The device of a target, to compile for. Nothing is run in this process but on its CPU.

    Raises:
      ImportError: XLA's compiler for it is not installed.
    """
    if not installed(name):
        allowed = f"needs {TARGETS[name].module}: pip install 'noisefl[{name}]'"
        raise ImportError(f"target={name!r}: {allowed}")
    jax.config.update("jax_platforms", "cpu")
    jax.devices()  # finds the compilers
    if name == "h100":
        found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    else:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud to be asked
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return found.devices[0]
