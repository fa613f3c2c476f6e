"""What the Mosaic GPU kernels share: whom they serve, registers, products and rings (Hopper).

A kernel is a grid of independent programs of ``warpgroups`` computing warpgroups and one more that
copies from global to shared memory (TMA) into a ring of slots. A computing warpgroup owns 64 rows:
``wgmma`` multiplies matrices of 64 rows from shared memory into registers.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.interpreting import interpreter

__all__ = [
    "COLUMN",
    "LOG2E",
    "MATRIX",
    "NOTHING",
    "ROW",
    "ROWS",
    "SHARED_BYTES",
    "across_columns",
    "across_rows",
    "add_product",
    "check_device",
    "check_dtypes",
    "chip_kind",
    "integer",
    "padded_width",
    "product",
    "row_numbers",
    "run_kernel",
    "shared_matrix",
    "staging",
    "stream",
    "take_registers",
    "transposed",
    "write",
    "zeros",
]

ROWS = 64
"""Rows of a warpgroup's matrices; also the lanes that swizzled 16-bit matrices come in."""

SHARED_BYTES = 227 * 1024
"""Shared memory that a program may use on Hopper."""

LOG2E = math.log2(math.e)

NOTHING = -1e30
"""The running maximum of a row that has seen nothing: finite, so that exp2(-inf - NOTHING) = 0."""

MATRIX = plgpu.Layout.WGMMA
ROW = MATRIX.reduce(1)
"""Layout of one number a row of a matrix."""
COLUMN = MATRIX.reduce(0)
"""Layout of one number a column of a matrix."""

_TRANSFORMS = (
    plgpu.TilingTransform((8, 64)),  # type: ignore[abstract]
    plgpu.SwizzleTransform(128),  # type: ignore[abstract]
)
_WIDEST = 256


def check_device() -> None:
    """Refuse GPUs and CUDA versions that cannot run these kernels.

    On a host whose default backend is a CPU nothing is refused: kernels are interpreted or lowered
    for a chip that is not here.

    Raises:
      NotImplementedError: on a TPU, on a GPU that is not of compute capability 9 (``wgmma`` exists
        on Hopper alone), and with CUDA 12.8.0 to 12.9.0, whose ptxas miscompiles masks.
    """
    platform = jax.default_backend()
    if platform == "cpu":
        return
    if platform not in ("gpu", "cuda"):
        raise NotImplementedError(f"Mosaic GPU kernels do not run on {platform!r}; use 'xla'")
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.split(".")[0] != "9":
        raise NotImplementedError(
            f"{device.device_kind} has compute capability {capability}; these kernels are for "
            "Hopper (9.0): use implementation='xla'"
        )
    version = _cuda_version()
    if version is not None and 12080 <= version < 12091:
        raise NotImplementedError(
            f"CUDA {version // 1000}.{version % 1000 // 10}.{version % 10} miscompiles masks; "
            "install CUDA 12.9.1 or later, or use implementation='xla'"
        )


def chip_kind() -> str:
    """Kind of the GPU that is traced for, "" if there is none: as :func:`tpu.chip_kind`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() in ("gpu", "cuda") else ""


def _cuda_version() -> int | None:
    """The CUDA runtime's version as 1000 * major + 10 * minor + patch, None if unknown."""
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return None
    return None if cuda_versions is None else int(cuda_versions.cuda_runtime_get_version())


def check_dtypes(op: str, **arrays: jax.Array) -> None:
    """Refuse all but one common 16-bit floating dtype: ``wgmma`` has no float32 path.

    Raises:
      NotImplementedError: naming the dtypes and the way out.
    """
    found = {name: str(array.dtype) for name, array in arrays.items()}
    if len(set(found.values())) > 1 or not set(found.values()) <= {"bfloat16", "float16"}:
        raise NotImplementedError(
            f"{op}: {found}; the tensor cores multiply bfloat16 or float16, the same for all: "
            "cast, or use implementation='xla'"
        )


def padded_width(op: str, width: int) -> int:
    """A head width rounded up to what the kernels take: a multiple of 64.

    Raises:
      NotImplementedError: if it is above 256.
    """
    if width > _WIDEST:
        raise NotImplementedError(f"{op}: head width {width} is above {_WIDEST}; use 'xla'")
    return -(-width // ROWS) * ROWS


def integer(x: Any) -> jax.Array:
    """An int32 scalar, whatever the default integer is."""
    return jnp.asarray(x, jnp.int32)


def run_kernel(
    body: Callable[[types.SimpleNamespace], None],
    *,
    name: str,
    programs: int,
    warpgroups: int,
    operands: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
) -> tuple[jax.Array, ...]:
    """Run ``body(refs)`` in every program and warpgroup; returns the outputs in order.

    ``refs`` has the references of operands, outputs and scratch as attributes, and ``program`` and
    ``warpgroup``, the numbers of the caller; the last warpgroup (number ``warpgroups``) copies.
    """
    names = [*operands, *outputs]

    def kernel(*positional, **scoped):
        refs = types.SimpleNamespace(**dict(zip(names, positional, strict=True)), **scoped)
        refs.program = lax.axis_index("program")
        refs.warpgroup = lax.axis_index("warpgroup")
        body(refs)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        scratch_types=dict(scratch),
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpreter("gpu"),
    )(*operands.values())


def take_registers(warpgroups: int, *, computes: bool) -> None:
    """Move registers from the copying warpgroup to the computing ones.

    A lone computing warpgroup has the most a thread can hold from the start.
    """
    if warpgroups == 2 and computes:
        plgpu.set_max_registers(232, action="increase")
    elif warpgroups == 2:
        plgpu.set_max_registers(40, action="decrease")


def shared_matrix(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory for 16-bit matrices [.., rows, width] in the layout ``wgmma`` reads."""
    return plgpu.SMEM(tuple(shape), dtype, transforms=_TRANSFORMS)


def staging(warpgroups: int, columns: int, dtype: Any) -> Any:
    """Scratch that :func:`add_product` wants under interpretation, else None."""
    return shared_matrix((warpgroups, ROWS, columns), dtype) if interpreter("gpu") else None


def product(left: Any, right: Any, shape: tuple[int, int]) -> jax.Array:
    """left @ right of references to shared memory, float32 ``shape``."""

    def multiply(total):
        plgpu.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def add_product(total: jax.Array, left: jax.Array, right: Any, stage: Any) -> jax.Array:
    """total + left @ right with ``left`` (16 bits) in registers, ``right`` in shared memory.

    The interpreter knows no ``wgmma`` with a left side in registers, nor ``run_state``: there, and
    only there, ``left`` goes through ``stage``, the caller's part of :func:`staging`.
    """
    if stage is None:
        return pl.run_state(lambda sums: plgpu.wgmma(sums, left, right))(plgpu.ACC.init(total))
    stage[...] = left
    plgpu.commit_smem()
    return total + product(stage, right, (total.shape[0], total.shape[1]))


def transposed(ref: Any) -> Any:
    """A matrix in shared memory as the right side of a product over its columns."""
    return ref.transpose((1, 0))


def zeros(shape: tuple[int, ...], value: float = 0.0) -> jax.Array:
    """A float32 matrix of one value in registers, or a column of numbers a row."""
    layout = MATRIX if len(shape) == 2 else ROW
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def across_columns(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number a row (layout ROW) as a matrix."""
    return lax.broadcast_in_dim(x, shape, [0])


def across_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number a column (layout COLUMN) as a matrix."""
    return lax.broadcast_in_dim(x, shape, [1])


def row_numbers(layout: Any) -> jax.Array:
    """0 .. 63 in layout ROW or COLUMN."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout)


def write(values: jax.Array, shared: Any, target: Any) -> None:
    """Store to global memory by way of ``shared``, memory of the same shape and dtype."""
    shared[...] = values.astype(target.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, target)
    plgpu.wait_smem_to_gmem(0)


def stream(
    count: jax.Array,
    steps: int,
    load: Callable[[jax.Array, jax.Array], Sequence[Callable[[], None]]],
    consumed: Sequence[Any],
) -> None:
    """What the copying warpgroup does: fill slot ``c % steps`` for every c below ``count``.

    ``load(c, slot)`` gives functions that start copies into the slot; ``consumed`` holds for each
    of them the barriers [steps] at which the computing warpgroups say that they are done with the
    slot. Every such barrier has been awaited when this returns.
    """

    def fill(c, _):
        slot = lax.rem(c, integer(steps))
        for copy, barrier in zip(load(c, slot), consumed, strict=True):
            pl.when(c >= steps)(functools.partial(plgpu.barrier_wait, barrier.at[slot]))
            copy()

    def drain(c, _):
        for barrier in consumed:
            plgpu.barrier_wait(barrier.at[lax.rem(c, integer(steps))])

    lax.fori_loop(integer(0), count, fill, None)
    lax.fori_loop(lax.max(count - steps, integer(0)), count, drain, None)
