"""Training-free baselines and oracles on the heads of a dense model; see docs/policies.md."""

from sparse_attn.policies.double_sparsity import (
    DoubleSparsity,
    calibrate_channels,
    calibrate_ranges,
)
from sparse_attn.policies.h2o import H2O
from sparse_attn.policies.module import (
    Policy,
    PolicyAttention,
    PolicyCache,
    policy_attention,
    register_policy,
)
from sparse_attn.policies.oracle import OracleTopK, OracleTopP
from sparse_attn.policies.quest import Quest
from sparse_attn.policies.random_keys import RandomKeys
from sparse_attn.policies.snapkv import SnapKV
from sparse_attn.policies.streaming import Duo, StreamingLLM
from sparse_attn.policies.token_select import TokenSelect

__all__ = [
    "H2O",
    "DoubleSparsity",
    "Duo",
    "OracleTopK",
    "OracleTopP",
    "Policy",
    "PolicyAttention",
    "PolicyCache",
    "Quest",
    "RandomKeys",
    "SnapKV",
    "StreamingLLM",
    "TokenSelect",
    "calibrate_channels",
    "calibrate_ranges",
    "policy_attention",
    "register_policy",
]
