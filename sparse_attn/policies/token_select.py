"""TokenSelect (arXiv 2411.02886): one token list a layer, by a soft vote of the heads."""

from __future__ import annotations

import dataclasses

from sparse_attn.policies.module import register_policy
from sparse_attn.policies.scored import ExactScores, ScoredPolicy, Share


@register_policy("token_select")
@dataclasses.dataclass(frozen=True)
class TokenSelect(ExactScores, ScoredPolicy):
    """score[s] = sum over heads of softmax_s(q_h . k_s / sqrt(H)); the best ``budget`` tokens.

    All heads share the list (``share="layer"``); ``"group"`` votes within a group only. The paper
    also reuses the last selection while consecutive queries stay similar (its selection cache):
    that saves time, not tokens, and makes a row depend on the call it came in, so it is left out.
    """

    share: Share = "layer"

    @staticmethod
    def tiny() -> tuple[TokenSelect, ...]:
        """A variant for the property suite."""
        return (TokenSelect(budget=5, sinks=2, recent=4),)
