"""One mesh, and rules from parameter names to places on it.

The mesh always exists, also on one device, and always has the axes ``data``, ``fsdp``,
``sequence`` and ``tensor``. Everything a step touches gets its place from here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_attn.parallel import SequenceParallel, zigzag_order
from sparse_attn.shards import Order
from train.config import MeshConfig
from train.optimizer import parameter_name

AXES = ("data", "fsdp", "sequence", "tensor")

# (name pattern, places of the trailing axes); the first match wins, axes before them (stacked
# layers, kv branches) are not split. What "fsdp" splits is split over "sequence" as well: the
# devices of a sequence need every weight as much as those of a batch. Optimizer moments carry the
# parameter's name, so the same rules place them. "fsdp?" splits where the sizes divide, and leaves
# the axis whole where they do not: the maps of mechanisms are of any size (NSA's compression of
# blocks is a quarter of an 8B model's state on 64 chips if it is not split).
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|/)embedding$", ("tensor", "fsdp")),
    (r"(^|/)unembedding$", ("fsdp", "tensor")),
    (r"attention/[qkv]$", ("fsdp", "tensor", None)),
    (r"attention/[qkv]_bias$", ("tensor", None)),
    (r"attention/o$", ("tensor", None, "fsdp")),
    (r"mlp/(gate|up)$", ("fsdp", "tensor")),
    (r"mlp/down$", ("tensor", "fsdp")),
    (r"mechanism/.*w_(in|middle|out)$", ("fsdp?",)),
    (r"", ()),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over ``devices`` (default: all), with automatic partitioning.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    written = " * ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        if len(devices) % known:
            raise ValueError(
                f"mesh {written}: the fixed sizes multiply to {known}, which does not divide "
                f"{len(devices)} devices; change them so that it does (a CPU counts as several "
                "with XLA_FLAGS=--xla_force_host_platform_device_count=8)"
            )
        sizes[sizes.index(-1)] = len(devices) // known
    elif known != len(devices):
        raise ValueError(
            f"mesh {written} = {known} devices, but there are {len(devices)}; change a size, or "
            "set one to -1 to take the rest"
        )
    # Neighbours on the interconnect where that is possible, also if an axis of the mesh is no axis
    # of the pod's torus.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_divisible(
    mesh: Mesh,
    *,
    batch_size: int,
    microbatches: int,
    sequence_length: int,
    order: Order = "natural",
) -> None:
    """Refuse batches that the mesh cannot split evenly.

    Raises:
      ValueError: with the numbers that do not divide.
    """
    rows, parts = batch_size // microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ValueError(
            f"batch_size={batch_size} / microbatches={microbatches} = {rows} rows cannot be split "
            f"over data*fsdp={parts} devices; make it a multiple of {parts}"
        )
    stretches = mesh.shape["sequence"] * (2 if order == "zigzag" else 1)
    if sequence_length % stretches:
        raise ValueError(
            f"sequence_length={sequence_length} cannot be split over "
            f"mesh.sequence={mesh.shape['sequence']} devices in {order} order; make it a multiple "
            f"of {stretches}"
        )


def sequence_parallel(mesh: Mesh, config: MeshConfig) -> SequenceParallel | None:
    """How attention is split over ``mesh``: always by hand if there is more than one device, since
    compilers do not split kernels.
    """
    if mesh.size == 1:
        return None
    return SequenceParallel(mesh, strategy=config.strategy, order=config.order)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where arrays [B, T] of a batch live: rows over data and fsdp, tokens over sequence."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def tree_shardings(
    tree: Any, mesh: Mesh, rules: Sequence[tuple[str, tuple[str | None, ...]]] = RULES
) -> Any:
    """A sharding for every leaf of ``tree``, by the first rule whose pattern its name contains.

    Raises:
      ValueError: if an axis of a leaf cannot be split evenly, or no rule matches.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = parameter_name(path)
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        matching = [rule for rule in rules if re.search(rule[0], name)]
        if not matching:
            raise ValueError(f"no sharding rule matches {name!r}; end the rules with ('', ())")
        pattern, axes = matching[0]
        if len(axes) > leaf.ndim:
            raise ValueError(f"rule {pattern!r} places {len(axes)} axes, {name} has {leaf.shape}")
        first = leaf.ndim - len(axes)
        places = []
        for size, wanted in zip(leaf.shape[first:], axes, strict=True):
            axis = _mesh_axes(wanted and wanted.removesuffix("?"), mesh)
            parts = math.prod(mesh.shape[one] for one in axis)
            if size % parts and wanted and wanted.endswith("?"):
                axis = ()
            elif size % parts:
                raise ValueError(
                    f"{name} {leaf.shape}: an axis of {size} cannot be split over "
                    f"mesh.{'*'.join(axis)}={parts}; choose a size that divides it"
                )
            places.append(axis)
        spec = [None if not axis else axis[0] if len(axis) == 1 else axis for axis in places]
        return NamedSharding(mesh, PartitionSpec(*(None,) * first, *spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def _mesh_axes(axis: str | None, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that split what a rule places on ``axis``."""
    if axis is None:
        return ()
    return ("fsdp", "sequence") if axis == "fsdp" and mesh.shape["sequence"] > 1 else (axis,)


def abstract_with(shardings: Any, tree: Any) -> Any:
    """``tree`` as shapes and dtypes that carry ``shardings``, for compiling and restoring."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


@dataclasses.dataclass(frozen=True)
class Placed:
    """Parameters of one name, in all layers: ``count`` arrays of ``shape``, split by ``axes`` (mesh
    axis, several of them, or None for each), with ``bytes_per_device`` of all on every device.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    axes: tuple[str | tuple[str, ...] | None, ...]
    bytes_per_device: int


def describe_placement(params: Any) -> list[Placed]:
    """What went where, largest first; layer numbers are left out of the names.

    Args:
      params: shapes or arrays that carry named shardings.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = re.sub(r"(^|/)[0-9]+(-[0-9]+)?/", r"\1*/", parameter_name(path))
        spec = tuple(leaf.sharding.spec)
        axes = (*spec, *(None,) * (leaf.ndim - len(spec)))
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        groups.setdefault((name, tuple(leaf.shape), axes), []).append(size)
    placed = [
        Placed(name, len(sizes), shape, axes, sum(sizes))
        for (name, shape, axes), sizes in groups.items()
    ]
    return sorted(placed, key=lambda group: -group.bytes_per_device)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The mesh with the shardings of a training state and of its batches of ``rows`` rows, and how
    attention is split over it (None on one device).
    """

    mesh: Mesh
    state: Any
    batch: NamedSharding
    rows: int
    parallel: SequenceParallel | None = None

    @property
    def batch_parts(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @functools.cached_property
    def row_share(self) -> tuple[int, int]:
        """Which part of a batch's rows this process reads: (index, number of parts).

        Processes whose devices hold other tokens of the same rows read the same part.

        Raises:
          ValueError: if the devices of a process hold rows that are no such part.
        """
        rows = self.rows
        places = self.batch.devices_indices_map((rows, self.mesh.shape["sequence"]))
        spans: dict[int, tuple[int, int]] = {}
        for device, index in places.items():
            first, stop, _ = (index or (slice(None),))[0].indices(rows)
            process = cast(Any, device).process_index
            low, high = spans.get(process, (first, stop))
            spans[process] = min(low, first), max(high, stop)
        first, stop = spans[jax.process_index()]
        if rows % (stop - first) or first % (stop - first):
            raise ValueError(
                f"the devices of process {jax.process_index()} hold rows {first} to {stop - 1} of "
                f"{rows}, which is no equal share; choose mesh sizes so that whole processes "
                "divide data*fsdp, or the other way round"
            )
        return first // (stop - first), rows // (stop - first)

    def put_batch(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Host arrays [B, T] onto the devices, in the order that ``parallel`` asks for; among
        several processes each has its :meth:`row_share` of B rows.
        """
        if self.parallel is not None and self.parallel.order == "zigzag":
            tokens = next(iter(batch.values())).shape[1]
            order = zigzag_order(tokens, self.parallel.count)
            batch = {name: array[:, order] for name, array in batch.items()}
        if jax.process_count() == 1:
            return jax.device_put(batch, dict.fromkeys(batch, self.batch))

        share, parts = self.row_share
        first = share * (self.rows // parts)

        def place(mine: Any) -> jax.Array:
            def part(index: Any) -> Any:
                start, stop, _ = index[0].indices(self.rows)
                return mine[start - first : stop - first, index[1]]

            return jax.make_array_from_callback((self.rows, mine.shape[1]), self.batch, part)

        return {name: place(mine) for name, mine in batch.items()}
