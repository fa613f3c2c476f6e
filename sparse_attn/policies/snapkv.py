"""SnapKV (arXiv 2404.14469): the last queries of a prompt choose which of its keys to keep."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.cache import read_ring, write_ring, write_rows
from sparse_attn.documents import Rows
from sparse_attn.policies.module import Policy, State, register_policy, transposed
from sparse_attn.policies.rules import Queries, forced_keys, log_probabilities, logits, visible_keys
from sparse_attn.top_keys import heaviest, listed, members
from sparse_attn.types import HeadShape

RESOLUTION = 2.0**-10
"""Pooled masses are compared to this many nats: what differs by less than 0.1 % ties."""


@register_policy("snapkv")
@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
    """Observation windows choose keys for the rows after them.

    At every e = ``every``, 2 ``every``, ... (positions inside the document) the ``observation``
    queries before e weigh the keys older than themselves: their softmax probabilities, summed over
    the window and the G heads of a group, pooled over ``pool_width`` neighbouring keys; the
    ``budget`` heaviest are kept (masses are compared to 0.1 %, the most recent of equal ones wins).
    Rows e <= t < e + ``every`` attend the sinks, those keys, and everything from e -
    ``observation`` on. Rows before the first e attend everything.

    Published SnapKV has one e, the end of the prompt. With ``every`` = the prompt's length this is
    it, for as many further tokens. With a short ``every`` the window is renewed all the time, needs
    no word for where a prompt ends, and is causal: prefill equals decode. After a dense prompt
    (``attend="dense"``) decoding sees the prompt compressed by its last whole window, which may end
    up to ``every`` - 1 tokens before the prompt does. No key is dropped from the cache.

    Attributes:
      recent: unused, must stay 0: the observation window and what followed it are attended.
      budget: keys that a window keeps.
      observation: queries of a window.
      every: tokens between the ends of windows; documents are aligned to it.
      pool: how the weights of neighbouring keys are pooled.
      pool_width: neighbouring keys that are pooled; odd.

    Raises:
      ValueError: on sizes below 1, an even pooling width, or a window longer than ``every``.
    """

    recent: int = 0
    budget: int = 1024
    observation: int = 32
    every: int = 32
    pool: Literal["mean", "max"] = "mean"
    pool_width: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent != 0:
            raise ValueError(
                f"recent={self.recent}: SnapKV rows see the {self.observation} tokens of their "
                "observation window and all later ones; set observation and every instead"
            )
        for name in ("budget", "observation", "every", "pool_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.observation > self.every:
            raise ValueError(
                f"observation={self.observation} queries do not fit between windows that end "
                f"every={self.every} tokens; lower it or raise every"
            )
        if self.pool_width % 2 == 0:
            raise ValueError(f"pool_width={self.pool_width} must be odd, to centre on a key")
        if self.pool not in ("mean", "max"):
            raise ValueError(f'pool={self.pool!r} must be "mean" or "max"')

    @property
    def alignment(self) -> int:
        """Documents start where windows end."""
        return self.every

    @property
    def forgets(self) -> bool:
        """A new window's list replaces an old one's."""
        return True

    def lists(self, shape: HeadShape) -> int:
        """One list per kv head."""
        return shape.kv_heads

    def capacity(self, keys: int) -> int:
        """P: sinks, kept keys, the observation window and what follows it."""
        return min(keys, self.sinks + self.budget + self.observation + self.every)

    def attended(self, seen: int) -> float:
        """All of the first ``every``, then sinks, kept keys and everything from the window on."""
        if seen <= self.every:
            return seen
        since = (seen - 1) % self.every + 1
        return min(seen, self.sinks + self.budget + self.observation + since)

    def init_state(
        self, shape: HeadShape, batch: int, capacity: int, dtype: Any, rollback: int
    ) -> State:
        """The last queries, and the lists of the last windows."""
        slots = rollback // self.every + 2
        kept = min(self.budget, capacity)
        queries = (batch, self.observation + rollback, shape.query_heads, shape.head_width)
        return {
            "queries": jnp.zeros(queries, dtype),
            "kept": jnp.full((batch, slots, shape.kv_heads, kept), -1, jnp.int32),
        }

    def observe(
        self,
        state: State,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        rows: Rows,
        length: Int[Array, " B"],
        shape: HeadShape,
    ) -> tuple[State, Any]:
        """Let every window that the new tokens complete choose its keys."""
        B, T = q.shape[:2]
        S, W, slots = k.shape[1], self.observation, state["kept"].shape[1]
        keys = transposed(k)
        size = state["queries"].shape[1]
        old = read_ring(state["queries"], length).astype(q.dtype)
        known = jnp.concatenate([old, q], axis=1)  # position p at p - length + size
        starts = jnp.concatenate([jnp.zeros((B, size), jnp.int32), rows.start], axis=1)
        current = length // self.every
        offsets = jnp.arange(-W, 0, dtype=jnp.int32)[None, :]

        def choose(number: Int[Array, ""]) -> Int[Array, "B K P"]:
            index = (current + 1 + number)[:, None] * self.every + offsets
            at = jnp.clip(index - length[:, None] + size, 0, known.shape[1] - 1)
            start = jnp.take_along_axis(starts, at, axis=1)
            window = Queries(jnp.take_along_axis(known, at[..., None, None], axis=1), index, start)
            return self.keep(window, keys, S, shape, state["kept"].shape[3])

        windows = jnp.arange(T // self.every + 1, dtype=jnp.int32)
        new = jnp.moveaxis(jax.lax.map(choose, windows), 0, 1)
        numbers = current[:, None] + 1 + windows[None, :]
        last = jnp.maximum((length + rows.appended) // self.every, current)[:, None]
        write = (numbers <= last) & (numbers > last - slots)
        before = jnp.take_along_axis(state["kept"], (current % slots)[:, None, None, None], axis=1)
        table = checkpoint_name(jnp.concatenate([before, new], axis=1), "selection")
        return {
            "queries": write_ring(state["queries"], q, length, rows),
            "kept": write_rows(state["kept"], new, numbers % slots, write),
        }, {"table": table, "current": current}

    def keep(
        self,
        window: Queries,
        keys: Float[Array, "B K H S"],
        S: int,
        shape: HeadShape,
        slots: int,
    ) -> Int[Array, "B K P"]:
        """The heaviest keys before a window of queries, as ascending lists."""
        B, W, N, H = window.q.shape
        K = shape.kv_heads
        visible = visible_keys(window, S)
        log_p = log_probabilities(logits(window.q, keys, H**-0.5), visible)
        mass = jax.nn.logsumexp(log_p.reshape(B, W, K, N // K, S), axis=(1, 3))
        s = jnp.arange(S, dtype=jnp.int32)[None, :]
        start, first = window.start[:, -1:], window.index[:, :1]
        older = ((s >= start) & (s < first))[:, None, :]
        reach = self.pool_width // 2
        mass = jnp.where(older, mass, -jnp.inf)
        padded = jnp.pad(mass, ((0, 0), (0, 0), (reach, reach)), constant_values=-jnp.inf)
        near = jnp.stack([padded[..., i : i + S] for i in range(self.pool_width)])
        # The mean's constant divisor ranks nothing.
        pooled = jnp.max(near, axis=0) if self.pool == "max" else jax.nn.logsumexp(near, axis=0)
        # Neighbours of one dominant key differ by rounding only: that is a tie, and has its rule.
        pooled = jnp.round(pooled / RESOLUTION) * RESOLUTION
        eligible = older & (s >= start + self.sinks)[:, None, :]
        eligible = jnp.broadcast_to(eligible, pooled.shape)
        needed = jnp.full(pooled.shape[:-1], slots, jnp.int32)
        return listed(heaviest(pooled, eligible.astype(jnp.int32), needed), slots)

    def member(self, queries: Queries, view: Any, keys: int) -> Bool[Array, "B c K S"]:
        """Sinks, what the last window kept, the window itself and all that followed."""
        number = queries.index // self.every
        entry = jnp.clip(number - view["current"][:, None], 0, view["table"].shape[1] - 1)
        lists = jnp.take_along_axis(view["table"], entry[..., None, None], axis=1)
        visible = visible_keys(queries, keys)
        s = jnp.arange(keys, dtype=jnp.int32)[None, None, None, :]
        since = s >= (number * self.every - self.observation)[..., None, None]
        alone = (number == queries.start // self.every)[..., None, None]
        sinks = forced_keys(queries, keys, self.sinks, 0)
        return visible & (members(lists, keys) | since | alone | sinks)

    def covering(self, length: int) -> SnapKV:
        """The variant that equals dense attention up to ``length`` tokens: it keeps every key."""
        return dataclasses.replace(self, budget=length)

    def selector_bytes(self, shape: HeadShape, length: Any, element_bits: int = 16) -> Any:
        """Every key once in ``every`` rows."""
        return shape.kv_heads * shape.head_width * element_bits / 8 * length / self.every

    def selector_flops(self, shape: HeadShape, length: Any) -> Any:
        """The logits of ``observation`` queries once in ``every`` rows."""
        products = 2 * shape.query_heads * shape.head_width * length
        return products * self.observation / self.every

    @staticmethod
    def tiny() -> tuple[SnapKV, ...]:
        """A variant for the property suite."""
        return (SnapKV(sinks=2, budget=4, observation=3, every=4, pool_width=3),)
