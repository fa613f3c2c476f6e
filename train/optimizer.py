"""AdamW with a schedule, clipping, and weight decay on matrices only."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax

from train.config import OptimizerConfig

# Parameters that are never decayed, by name: norms, biases, tables of embeddings and positions.
_NO_DECAY = re.compile(r"(norm/scale|bias|(^|/)(embedding|position|b_in|b_out))$")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of every step in [0, ``steps``).

    Linear from 0 over ``warmup_steps``, then as ``config.schedule`` says, down to
    ``final_fraction * learning_rate`` at ``steps``.
    """
    top, last = config.learning_rate, config.final_fraction * config.learning_rate
    warmup = min(config.warmup_steps, steps)
    # The first step already moves: a rate of exactly 0 would waste it.
    rise = optax.linear_schedule(top / (warmup + 1), top, warmup)
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        parts = [rise, optax.cosine_decay_schedule(top, rest, alpha=config.final_fraction)]
        return optax.join_schedules(parts, [warmup])
    if config.schedule == "wsd":
        decay = min(max(round(config.decay_fraction * steps), 1), rest)
        parts = [rise, optax.constant_schedule(top), optax.linear_schedule(top, last, decay)]
        return optax.join_schedules(parts, [warmup, steps - decay])
    return optax.join_schedules([rise, optax.constant_schedule(top)], [warmup])


def decay_mask(params: Any) -> Any:
    """True for the leaves that are decayed: matrices that are no norm, bias or table.

    Layers may be stacked along a leading axis, so the name decides, not the rank alone.
    """

    def decayed(path: Any, leaf: Any) -> bool:
        return leaf.ndim >= 2 and not _NO_DECAY.search(parameter_name(path))

    return jax.tree_util.tree_map_with_path(decayed, params)


def parameter_name(path: Any) -> str:
    """A key path as ``"layers/attention/query/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on the schedule: clip the global norm, update the means, decay matrices, step."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )
