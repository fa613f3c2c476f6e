"""A small language model with Native Sparse Attention on public-domain text, in minutes on a CPU."""

from models.transformer import ModelConfig
from sparse_attn import NSA
from train.config import CheckpointConfig, LoggingConfig, OptimizerConfig, RunConfig
from train.evaluation.config import EvaluationConfig
from train.tokenizer import TokenizerConfig

config = RunConfig(
    run_dir="runs/quickstart",
    steps=250,
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
    optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=30, schedule="cosine"),
    checkpoint=CheckpointConfig(every=100),
    logging=LoggingConfig(every=1, inspect_every=50),
    evaluation=EvaluationConfig(window=1024),
)
