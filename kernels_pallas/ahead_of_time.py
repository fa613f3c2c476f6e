"""Lowering and compilation for chips that are not here.

    compiled = compile_for_tpu(function, *shapes, chip="v6e")
    compiled.memory_analysis().temp_size_in_bytes

``shapes`` are arrays or ``jax.ShapeDtypeStruct``. libtpu compiles without a TPU; for GPUs the
lowering to Mosaic is as far as a machine without CUDA can go.

Where jax can import libtpu it tries to start a TPU in every process. A machine without one better
keeps it apart, where only this module finds it::

    pip install --target "$VIRTUAL_ENV/ahead_of_time" libtpu
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

__all__ = ["TPU_CHIPS", "compile_for_tpu", "lower_for_gpu", "lower_for_tpu", "tpu_topology"]

TPU_CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""Generation -> the topology it is compiled for; one chip of it is used."""

# libtpu asks the metadata service of a cloud machine for these unless told.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def compile_for_tpu(function: Callable[..., Any], *shapes: Any, chip: str = "v5e") -> Any:
    """Compile for one core of a TPU generation: a ``jax.stages.Compiled``, which cannot be run.

    Raises:
      ValueError: for an unknown generation.
      RuntimeError: if libtpu is neither importable, nor named by TPU_LIBRARY_PATH, nor kept apart.
    """
    if chip not in TPU_CHIPS:
        raise ValueError(f"{chip=} is unknown; use one of {sorted(TPU_CHIPS)}")
    device: Any = tpu_topology(TPU_CHIPS[chip]).devices[0]
    mesh = jax.sharding.Mesh([device], ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    # Manual copies are lowered for the kind of the surrounding mesh's device.
    kind = AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        return jax.jit(function).lower(*placed).compile()


def tpu_topology(name: str) -> Any:
    """Chips that are not here, as ``jax.experimental.topologies`` describes them: a compile target
    such as "v5e:2x2" or "v5p:4x4x4".

    Raises:
      RuntimeError: if libtpu is neither importable, nor named by TPU_LIBRARY_PATH, nor kept apart,
        or knows no such topology.
    """
    for variable, value in _ENVIRONMENT.items():
        # Where jax found no metadata service at import, it left its warning as the value.
        if os.environ.get(variable, "WARNING").startswith("WARNING"):
            os.environ[variable] = value
    apart = Path(sys.prefix, "ahead_of_time", "libtpu", "libtpu.so")
    if apart.exists() and importlib.util.find_spec("libtpu") is None:
        os.environ.setdefault("TPU_LIBRARY_PATH", str(apart))
    try:
        return topologies.get_topology_desc(name, platform="tpu")
    except Exception as error:
        raise RuntimeError(
            f"libtpu is not available ({error}); install it with "
            f"'pip install --target {apart.parent.parent} libtpu'"
        ) from error


def lower_for_tpu(function: Callable[..., Any], *shapes: Any, chip: str = "v5e") -> str:
    """The StableHLO that Mosaic TPU's lowering of ``function`` ends in; raises what it rejects."""
    if chip not in TPU_CHIPS:
        raise ValueError(f"{chip=} is unknown; use one of {sorted(TPU_CHIPS)}")
    kinds = {"v5e": ("TPU v5 lite", 1), "v5p": ("TPU v5", 2), "v6e": ("TPU v6 lite", 1)}
    kind, cores = kinds[chip]
    return _export(
        function, shapes, "tpu", AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
    )


def lower_for_gpu(function: Callable[..., Any], *shapes: Any) -> str:
    """The StableHLO that Mosaic GPU's lowering for an H100 ends in; raises what it rejects."""
    return _export(function, shapes, "cuda", _H100)


def _export(
    function: Callable[..., Any], shapes: Any, platform: str, device: AbstractDevice
) -> str:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(jax.jit(function), platforms=[platform])(*shapes)
    return exported.mlir_module()
