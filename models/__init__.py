"""Decoder-only language models around the attention mechanisms."""

from models.config import ModelConfig
from models.loading import Loaded, export, load, load_config
from models.rope import RopeConfig
from models.transformer import Decoder, DecoderOutput, abstract, count_parameters, merge, split

__all__ = [
    "Decoder",
    "DecoderOutput",
    "Loaded",
    "ModelConfig",
    "RopeConfig",
    "abstract",
    "count_parameters",
    "export",
    "load",
    "load_config",
    "merge",
    "split",
]
