"""The blocks that a trained model selects on its held-out text."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from bench_picks import union_ratio
from flax import nnx
from jaxtyping import Array, Int

from models.transformer import abstract, merge, split
from sparse_attn import NSA
from train.checkpoint import load_decoder
from train.config import TOKENIZER_FOLDER
from train.data import evaluation_documents
from train.tokenizer import load_tokenizer


@functools.lru_cache(maxsize=2)
def checkpoint_picks(
    run_dir: str, config: NSA, length: int, kv_heads: int
) -> Int[np.ndarray, "1 T K P"]:
    """Selections of one layer over ``length`` tokens of held-out text, read as one document.

    The trained model selects as many and as large blocks as ``config`` does; its weights, its
    compression blocks and its window stay. Of its layers the one with the median union is taken;
    kv heads are repeated or left out to make ``kv_heads``.

    Raises:
      ValueError: if the model is no NSA model or the text is too short.
    """
    decoder, run, _ = load_decoder(run_dir)
    trained = run.model.attention
    if not isinstance(trained, NSA):
        raise ValueError(f"{run_dir} was trained with {type(trained).__name__}, not with NSA")
    attention = dataclasses.replace(
        trained,
        selection_block=config.selection_block,
        selected_blocks=config.selected_blocks,
        initial_blocks=config.initial_blocks,
        recent_blocks=config.recent_blocks,
    )
    graphdef, _, _ = abstract(dataclasses.replace(run.model, attention=attention))
    _, params, state = split(decoder)
    tokenizer = load_tokenizer(Path(run_dir) / TOKENIZER_FOLDER)
    documents = evaluation_documents(run.data, tokenizer)
    text = np.concatenate([document.tokens for document in documents])
    if len(text) < length:
        raise ValueError(f"the held-out text of {run_dir} has {len(text)} tokens, not {length}")

    @jax.jit
    def select(params: nnx.State, state: nnx.State, tokens: Array) -> list[Array]:
        output = merge(graphdef, params, state).hidden(tokens, inspect=True)
        return [found.indices for found in output.selections if found is not None]

    layers = [
        np.asarray(found) for found in select(params, state, jnp.asarray(text[None, :length]))
    ]
    layers.sort(key=union_ratio)
    chosen = layers[len(layers) // 2]
    return chosen[:, :, np.arange(kv_heads) % chosen.shape[2]]
