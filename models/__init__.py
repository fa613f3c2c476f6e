"""Decoder-only language models around the attention mechanisms."""

from models.config import ModelConfig
from models.rope import RopeConfig
from models.transformer import Decoder, DecoderOutput, abstract, count_parameters, merge, split

__all__ = [
    "Decoder",
    "DecoderOutput",
    "ModelConfig",
    "RopeConfig",
    "abstract",
    "count_parameters",
    "merge",
    "split",
]
