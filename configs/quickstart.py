"""Native Sparse Attention on public-domain English, from nothing to a table in minutes on a CPU.

A decoder of 2.0 million parameters, every layer sparse, reads 0.74 million tokens of State of the
Union addresses up to 1959 and is scored on those after 1970, through its own cache.

Expected on two CPU cores: about 2.5 minutes of training (0.8 s a step) and half a minute of
evaluation; 2.04 bits per byte on the held-out text, where an order-2 byte model needs 2.95; 27 % of
the causal token pairs attended. A query sees 8 blocks of 16 tokens and a window of 64, which is
192 of at most 1024 tokens, and the compressed sequence.
"""

from models.transformer import ModelConfig
from sparse_attn import NSA
from train.config import CheckpointConfig, LoggingConfig, OptimizerConfig, RunConfig
from train.evaluation.config import EvaluationConfig
from train.tokenizer import TokenizerConfig

config = RunConfig(
    run_dir="runs/quickstart",
    steps=180,
    batch_size=4,
    sequence_length=1024,
    model=ModelConfig(
        vocab_size=4096,
        layers=4,
        model_width=128,
        query_heads=4,
        kv_heads=2,
        head_width=32,
        mlp_width=352,
        attention=NSA(
            compression_block=16,
            compression_stride=8,
            selection_block=16,
            selected_blocks=8,
            window=64,
        ),
    ),
    tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=4096),
    optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=20, schedule="cosine"),
    checkpoint=CheckpointConfig(every=60),
    logging=LoggingConfig(every=1, inspect_every=60),
    evaluation=EvaluationConfig(window=1024),
)
