"""Compares mechanisms on sequences split over simulated devices with the same on one device.

A process has its number of devices from its start, so :func:`compare` runs this file in one of its
own: ``python tests/parallel_cases.py CASES``, a JSON list of :class:`Case` fields, prints a line of
JSON a case.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEVICES = 8
TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison, in float64 unless said, of two sequences that pack documents and padding.

    ``config``: name of a tiny variant (``attention_cases.configs``), with ``changes`` to its
    fields. ``data``, ``sequence``, ``tensor``: sizes of the mesh. ``decode``: prefill and steps
    with a split cache instead of a training pass.
    """

    config: str
    changes: tuple[tuple[str, object], ...] = ()
    data: int = 1
    sequence: int = 8
    tensor: int = 1
    strategy: str = "auto"
    order: str = "natural"
    attend: str = "sparse"
    decode: bool = False
    dtype: str = "float64"


def compare(cases):
    """What :func:`_train` or :func:`_decode` found for every case, from a process of its own."""
    flags = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
    flags += f" --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([dataclasses.asdict(case) for case in cases])],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def main():
    """Run the cases of the command line."""
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for fields in json.loads(sys.argv[1]):
        fields["changes"] = tuple(tuple(change) for change in fields["changes"])
        case = Case(**fields)
        print(json.dumps(_decode(case) if case.decode else _train(case)), flush=True)


def _parts(case):
    import attention_cases
    import jax
    from jax.sharding import AxisType

    from sparse_attn.parallel import SequenceParallel

    config = dataclasses.replace(dict(attention_cases.configs())[case.config], **dict(case.changes))
    shape = attention_cases.SHAPES["G2"]
    sizes = (case.data, 1, case.sequence, case.tensor)
    axes = ("data", "fsdp", "sequence", "tensor")
    count = case.data * case.sequence * case.tensor
    mesh = jax.make_mesh(sizes, axes, (AxisType.Auto,) * 4, devices=jax.devices()[:count])
    return config, shape, SequenceParallel(mesh, case.strategy, case.order)


def _segments():
    """Documents that cross edges of devices, padding at the end and in between."""
    import numpy as np

    ids = np.ones((2, TOKENS), np.int32)
    ids[0, 24:], ids[0, 56:] = 2, 0
    ids[1, 13:16], ids[1, 16:48], ids[1, 48:] = 0, 2, 3
    return ids


@functools.lru_cache(maxsize=1)
def _on_one_device(config, shape, attend, dtype):
    import attention_cases

    from sparse_attn.shards import WHOLE

    def call(module, heads, ids):
        assert heads.shards is WHOLE
        return module(heads, segment_ids=ids, attend=attend, inspect=attend == "sparse")

    module = attention_cases.mechanism(config, shape, dtype=dtype)
    parts = attention_cases.arrays(shape, config.kv_branches, 2, TOKENS, dtype=dtype)
    return module, parts, _gradients(module, call)(parts, *_weights(shape, dtype))


def _weights(shape, dtype):
    import jax.numpy as jnp
    import numpy as np

    ids = _segments()
    drawn = np.random.default_rng(3).standard_normal(
        (2, TOKENS, shape.query_heads, shape.value_width)
    )
    return jnp.asarray(drawn * (ids > 0)[..., None, None], dtype), jnp.asarray(ids)


def _gradients(module, call):
    """``run(parts, weights, ids)``: gradients by inputs and parameters, and what was computed."""
    import attention_cases
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def total(parts, params, weights, ids):
        merged = nnx.merge(graphdef, params, rest)
        out, _, aux = call(merged, attention_cases.as_heads(*parts), ids)
        indices = None if aux.selection is None else aux.selection.indices
        return jnp.sum(out * weights) + aux.loss, (out, aux.loss, aux.statistics, indices)

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    return lambda parts, weights, ids: run(parts, params, weights, ids)


def _train(case):
    import jax
    import numpy as np

    from sparse_attn.parallel import call, zigzag_order

    config, shape, parallel = _parts(case)
    module, parts, one = _on_one_device(config, shape, case.attend, case.dtype)
    order = np.arange(TOKENS)
    if case.order == "zigzag":
        order = zigzag_order(TOKENS, case.sequence)

    def split(module, heads, ids):
        return call(
            module,
            heads,
            parallel=parallel,
            segment_ids=ids,
            attend=case.attend,
            inspect=case.attend == "sparse" and case.data == 1,
        )

    def ordered(array, order):
        return np.asarray(array)[:, :, order] if array.ndim == 5 else np.asarray(array)[:, order]

    weights, ids = _weights(shape, case.dtype)
    (by_parts, by_params), (out, loss, statistics, indices) = _gradients(module, split)(
        tuple(ordered(part, order) for part in parts), ordered(weights, order), ordered(ids, order)
    )
    back = np.argsort(order)
    (parts_one, params_one), (out_one, loss_one, statistics_one, indices_one) = one
    by_parts, out = tuple(ordered(part, back) for part in by_parts), ordered(out, back)
    same = None
    if indices is not None:
        same = bool((ordered(indices, back) == np.asarray(indices_one)).all())
    return {
        "output": _error(out, out_one),
        "gradients": _error(by_parts, parts_one),
        "parameters": _error(jax.tree.leaves(by_params), jax.tree.leaves(params_one)),
        "loss": _error(loss, loss_one),
        "statistics": _error(statistics, statistics_one),
        "selects_the_same": same,
        "loss_value": float(loss),
    }


def _decode(case):
    import attention_cases
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sparse_attn.parallel import call, split_cache

    config, shape, parallel = _parts(case)
    module = attention_cases.mechanism(config, shape)
    parts = attention_cases.arrays(shape, config.kv_branches, 2, 44)
    caches = [module.init_cache(2, TOKENS, jnp.float64) for _ in range(2)]
    caches[1] = split_cache(module, caches[1], parallel)
    keys = next(iter(type(caches[1]).token_axes))
    held = getattr(caches[1], keys).addressable_shards[0].data.size
    share = getattr(caches[1], keys).size / held

    def one(parts, cache, ids):
        return module(attention_cases.as_heads(*parts), cache, segment_ids=ids)[:2]

    def split(parts, cache, ids):
        heads = attention_cases.as_heads(*parts)
        return call(module, heads, cache, parallel=parallel, segment_ids=ids)[:2]

    steps = [jax.jit(one), jax.jit(split)]
    worst, at = 0.0, 0
    # A prefill that ends in the second device's part, then ragged steps over further edges.
    for size in (20, 4, 4, 4, 4, 4, 4):
        ids = np.ones((2, size), np.int32)
        ids[1, 3:] = size == 20
        piece = attention_cases.cut(parts, at, at + size)
        outs = []
        for i, step in enumerate(steps):
            out, caches[i] = step(piece, caches[i], ids)
            outs.append(out)
        worst, at = max(worst, _error(*outs)), at + size
    return {"output": worst, "cache": _error(*caches), "parts": share}


def _error(one, other):
    """Largest absolute difference over the largest number (at least 1)."""
    import jax
    import numpy as np

    errors = [0.0]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (a.shape, b.shape)
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        errors.append(float(np.max(np.abs(a - b), initial=0)) / scale)
    return max(errors)


if __name__ == "__main__":
    main()
