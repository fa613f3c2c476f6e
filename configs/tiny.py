"""A model of a few thousand parameters on bytes: seconds, for tests and for looking around.

Ten steps, best on a folder of texts (``--data.source FOLDER``), show that everything runs.

Expected on any CPU: less than a minute, most of it compiling; nothing is learnt.
"""

from models.transformer import ModelConfig
from sparse_attn import NSA
from train.config import CheckpointConfig, LoggingConfig, OptimizerConfig, RunConfig
from train.tokenizer import TokenizerConfig

config = RunConfig(
    run_dir="runs/tiny",
    steps=10,
    batch_size=2,
    sequence_length=64,
    model=ModelConfig(
        vocab_size=259,
        layers=2,
        model_width=16,
        query_heads=2,
        kv_heads=1,
        head_width=8,
        mlp_width=32,
        attention=NSA(
            compression_block=4,
            compression_stride=2,
            selection_block=8,
            selected_blocks=4,
            window=8,
        ),
    ),
    tokenizer=TokenizerConfig(kind="bytes"),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    checkpoint=CheckpointConfig(every=4),
    logging=LoggingConfig(inspect_every=5),
)
