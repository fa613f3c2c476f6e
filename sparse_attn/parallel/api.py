"""One call of a mechanism under ``shard_map``: what is split how, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sparse_attn.cache import check_capacity
from sparse_attn.documents import check_segments
from sparse_attn.registry import MechanismConfig
from sparse_attn.shards import Order, Shards, Strategy
from sparse_attn.types import Attend, Aux, Heads, Selection


@dataclasses.dataclass(frozen=True)
class SequenceParallel:
    """How a sequence is split over a mesh. Hashable, so it can be static.

    Attributes:
      mesh: has the axes ``sequence_axis``, those of ``batch_axes`` and ``tensor_axis``, if it is
        named; axes of other names must have size 1.
      strategy: one of the config's ``sequence_strategies``, or "replicate", which serves every
        mechanism; "auto" is the first of them that serves ``order``.
      order: "zigzag" if the tokens lie in :func:`sparse_attn.shards.zigzag_order`.
      sequence_axis: mesh axis that splits the tokens.
      batch_axes: mesh axes that split the batch.
      tensor_axis: a mesh axis that the compiler splits by itself (heads of the projections).

    Raises:
      ValueError: if the mesh lacks an axis, or has another one of size above 1.
    """

    mesh: Mesh | AbstractMesh
    strategy: Strategy | Literal["auto"] = "auto"
    order: Order = "natural"
    sequence_axis: str = "sequence"
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    tensor_axis: str = "tensor"

    def __post_init__(self) -> None:
        sizes = dict(self.mesh.shape)
        missing = [axis for axis in (self.sequence_axis, *self.batch_axes) if axis not in sizes]
        known = (self.sequence_axis, *self.batch_axes, self.tensor_axis)
        other = [axis for axis, size in sizes.items() if axis not in known and size > 1]
        if missing or other:
            raise ValueError(
                f"mesh {sizes} lacks the axes {missing} or splits by the unknown axes {other}; "
                "name them in sequence_axis, batch_axes and tensor_axis"
            )

    @property
    def count(self) -> int:
        """P, the devices that share a sequence."""
        return int(self.mesh.shape[self.sequence_axis])

    @property
    def batch_parts(self) -> int:
        """Parts of the batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @property
    def manual_axes(self) -> frozenset[str]:
        """Mesh axes that calls are mapped over; a tensor axis above 1 is left to the compiler."""
        sizes = dict(self.mesh.shape)
        return frozenset(a for a in sizes if a != self.tensor_axis or sizes[a] == 1)

    def constrain(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """``x`` with its rows and tokens where attention takes them from, so that the compiler
        brings weights to tokens and not tokens to weights. A batch that does not split stays whole.
        """
        rows = self.batch_axes if x.shape[0] % self.batch_parts == 0 else ()
        spec = PartitionSpec(rows, self.sequence_axis)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def strategy_of(self, config: MechanismConfig) -> Strategy:
        """The strategy for a mechanism.

        Raises:
          NotImplementedError: if the mechanism, or this order of tokens, cannot do the strategy.
        """
        known: tuple[Strategy, ...] = (*config.sequence_strategies, "replicate")
        serving = [s for s in known if self.order == "natural" or s not in ("halo", "ulysses")]
        if self.strategy == "auto":
            return serving[0]
        if self.strategy not in serving:
            raise NotImplementedError(
                f"strategy={self.strategy!r} with order={self.order!r} does not serve "
                f"{type(config).__name__}; choose one of {serving}"
            )
        return self.strategy

    def check(self, config: MechanismConfig, tokens: int) -> Strategy:
        """The strategy for sequences of ``tokens``.

        Raises:
          ValueError: if they cannot be split evenly.
          NotImplementedError: as :meth:`strategy_of`.
        """
        strategy = self.strategy_of(config)
        _check_tokens(tokens, config, self.count, self.order, strategy)
        return strategy


def call(
    mechanism: Any,
    heads: Heads,
    cache: Any = None,
    *,
    parallel: SequenceParallel,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    attend: Attend = "sparse",
    inspect: bool = False,
) -> tuple[Float[Array, "B T N Hv"], Any, Aux]:
    """``mechanism(heads, cache, ...)`` with the sequence split over devices: the same results.

    Without a cache the tokens are split, B over the batch axes and T over the sequence axis. With
    a cache the tokens are whole on every device of a sequence, and the cache is split (see
    :func:`split_cache`): each device attends the keys it holds, and outputs are merged by lse. All
    arrays are global ones, inside or outside of ``jit``. Differentiable without a cache.

    Raises:
      ValueError: if tokens, cache slots or the batch cannot be split evenly, or as the mechanism.
      NotImplementedError: if the mechanism cannot do what is asked for; the message says what can.
    """
    config, count = mechanism.config, parallel.count
    batch, tokens = heads.q.shape[:2]
    if segment_ids is not None and parallel.order == "natural":
        check_segments(segment_ids, config.alignment, cached=cache is not None)
    # What inspection reports are means over the batch, which every device then computes.
    rows = () if inspect else parallel.batch_axes
    parts = 1 if inspect else parallel.batch_parts
    if batch % parts:
        raise ValueError(
            f"a batch of {batch} cannot be split over {'*'.join(rows)}={parts} devices; "
            f"use a multiple of {parts}"
        )
    shards = Shards(parallel.sequence_axis, count, cache is not None, rows, order=parallel.order)
    specs = None
    if cache is None:
        shards = dataclasses.replace(shards, strategy=parallel.check(config, tokens))
    else:
        _check_cache(mechanism, cache, shards, attend, inspect)
        valid = jnp.ones((batch, tokens), bool) if segment_ids is None else segment_ids > 0
        check_capacity(cache.length, jnp.sum(valid, axis=1), cache.capacity)
        specs = cache_specs(cache, parallel, rows)
    if count == parallel.batch_parts == 1:
        # Nothing is split by hand, and XLA refuses sums over mapped axes of one device each.
        return mechanism(
            heads,
            cache,
            positions=positions,
            segment_ids=segment_ids,
            attend=attend,
            inspect=inspect,
        )

    graphdef, state = nnx.split(mechanism)
    by_row = PartitionSpec(rows, None if cache is not None else parallel.sequence_axis)
    by_branch = PartitionSpec(None, *by_row)
    block_sizes: list[int] = []

    def mapped(state: Any, arrays: tuple[Array, ...], cache: Any, *of_rows: Any) -> Any:
        module = nnx.merge(graphdef, state)
        positions, segment_ids = of_rows
        options = {"attend": attend, "inspect": inspect}
        q, k, v, x = arrays
        if shards.strategy == "replicate" and shards.split:
            out, cache, aux = _replicated(
                module, Heads(q, k, v, x, heads.rope, shards), positions, segment_ids, options
            )
        else:
            out, cache, aux = module(
                Heads(q, k, v, x, heads.rope, shards),
                cache,
                positions=positions,
                segment_ids=segment_ids,
                **options,
            )
        chosen = None
        if aux.selection is not None:
            block_sizes.append(aux.selection.block_size)
            chosen = aux.selection.indices
        return out, cache, (aux.loss, aux.metrics, aux.statistics), chosen

    whole = PartitionSpec()
    out, cache, sums, chosen = jax.shard_map(
        mapped,
        mesh=parallel.mesh,
        in_specs=(whole, (by_row, by_branch, by_branch, by_row), specs, by_row, by_row),
        out_specs=(by_row, specs, whole, by_row),
        axis_names=parallel.manual_axes,
        check_vma=False,
    )(
        nnx.to_pure_dict(state),
        (heads.q, heads.k, heads.v, heads.x),
        cache,
        positions,
        segment_ids,
    )
    selection = None if chosen is None else Selection(chosen, block_sizes[-1])
    loss, metrics, statistics = sums
    return out, cache, Aux(loss, metrics, statistics, selection)


def _replicated(
    module: Any,
    heads: Heads,
    positions: Array | None,
    segment_ids: Array | None,
    options: dict[str, Any],
) -> tuple[Array, None, Aux]:
    """Every device computes the whole sequence and keeps its own rows: serves every mechanism."""
    shards = heads.shards
    positions, segment_ids = (
        None if a is None else shards.gather(a) for a in (positions, segment_ids)
    )
    whole = Heads(
        q=shards.gather(heads.q),
        k=shards.gather(heads.k, axis=2),
        v=shards.gather(heads.v, axis=2),
        x=shards.gather(heads.x),
        rope=heads.rope,
        shards=Shards(batch_axes=shards.batch_axes),
    )
    out, _, aux = module(
        whole,
        positions=positions,
        segment_ids=segment_ids,
        **options,
    )
    if aux.selection is not None:
        indices = shards.mine(aux.selection.indices)
        aux = dataclasses.replace(
            aux, selection=dataclasses.replace(aux.selection, indices=indices)
        )
    return shards.mine(out), None, aux


def cache_specs(cache: Any, parallel: SequenceParallel, rows: tuple[str, ...] | None = None) -> Any:
    """Where every array of a cache lies: its keys and values split, all else whole.

    Raises:
      NotImplementedError: if the cache does not say which of its axes count tokens.
    """
    axes = getattr(type(cache), "token_axes", None)
    if axes is None:
        raise NotImplementedError(
            f"{type(cache).__name__} does not say how it is split (token_axes); decode without "
            "SequenceParallel, or use dense, nsa, infllm_v2, moba, seer, dsa or hash"
        )
    rows = parallel.batch_axes if rows is None else rows

    def spec(name: str) -> PartitionSpec:
        between = (None,) * (axes[name] - 1) if name in axes else ()
        split = (parallel.sequence_axis,) if name in axes else ()
        return PartitionSpec(rows, *between, *split)

    arrays = [f.name for f in dataclasses.fields(cache) if not f.metadata.get("static")]
    return dataclasses.replace(cache, **{name: spec(name) for name in arrays})


def split_cache(mechanism: Any, cache: Any, parallel: SequenceParallel) -> Any:
    """``cache`` with its keys and values split over the sequence axis.

    What selectors keep (compressed entries, codes, rings) stays whole on every device.

    Raises:
      ValueError: if its slots cannot be split evenly.
      NotImplementedError: if the mechanism cannot decode from a split cache.
    """
    shards = Shards(parallel.sequence_axis, parallel.count, of_cache=True)
    _check_cache(mechanism, cache, shards, "sparse", inspect=False)
    specs = cache_specs(cache, parallel)
    return jax.tree.map(
        lambda array, spec: jax.device_put(array, NamedSharding(parallel.mesh, spec)), cache, specs
    )


def _check_tokens(
    tokens: int, config: MechanismConfig, count: int, order: Order, strategy: Strategy
) -> None:
    unit = count * (2 if order == "zigzag" else 1)
    if tokens % unit:
        raise ValueError(
            f"{tokens} tokens cannot be split over {count} devices in {order} order; "
            f"use a multiple of {unit}"
        )
    mine, block = tokens // unit, config.alignment
    if unit > 1 and strategy != "replicate" and mine % block:
        raise ValueError(
            f"{tokens} tokens over {count} devices in {order} order are stretches of "
            f"{mine}, not a multiple of the {block} tokens that {type(config).__name__} aligns to; "
            f'use a multiple of {unit * block} tokens, or strategy="replicate"'
        )


def _check_cache(mechanism: Any, cache: Any, shards: Shards, attend: str, inspect: bool) -> None:
    axes = getattr(type(cache), "token_axes", None)
    if axes is None:
        raise NotImplementedError(
            f"{type(cache).__name__} of {type(mechanism.config).__name__} cannot be split over "
            "devices; decode without SequenceParallel, or with a mechanism that can: dense, nsa, "
            "infllm_v2, moba, seer, dsa, hash"
        )
    if inspect or attend == "fit":
        raise NotImplementedError(
            f"{attend=}, {inspect=} need whole keys; call the mechanism without SequenceParallel"
        )
    for name, axis in axes.items():
        size = getattr(cache, name).shape[axis]
        if size % shards.count:
            raise ValueError(
                f"{name} of {type(cache).__name__} has {size} slots, which cannot be split over "
                f"{shards.count} devices; make the cache with a capacity that is a multiple"
            )
