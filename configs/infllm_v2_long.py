"""Short to long: a dense model goes on at four times the length with InfLLM-V2, no new parameter.

Train ``configs/quickstart_dense.py`` (T=1024) first. This run starts from its weights and reads
rows of 4096 tokens in which pieces of four length bins hold equal shares of the tokens: up to 1/8,
3/8, 3/4 and the whole of the length, the paper's mixture (0-4k, 4-12k, 12-24k, 24-32k of 32k).
Sizes are the paper's divided by 4 (blocks) and 8 (lengths); rows below 1024 tokens stay dense.

Expected on two CPU cores: about 3 minutes of training (2 s of CPU time a step, 24 s to compile) and
one of evaluation; 1.985 bits per byte at 4096 tokens with 20 % of the causal pairs, as much as the
same weights reach with dense attention (python -m train.evaluate --policy dense).
"""

import dataclasses

from configs.quickstart_dense import config as dense
from sparse_attn import InfLLMV2
from train.config import CheckpointConfig, OptimizerConfig

config = dataclasses.replace(
    dense,
    run_dir="runs/infllm-v2-long",
    init_from=dense.run_dir,
    steps=60,
    batch_size=1,
    sequence_length=4096,
    model=dataclasses.replace(
        dense.model,
        attention=InfLLMV2(
            compression_block=8,
            compression_stride=4,
            coarse_block=32,
            coarse_stride=16,
            selection_block=16,
            selected_blocks=24,
            window=128,
            dense_len=1024,
        ),
    ),
    data=dataclasses.replace(dense.data, length_bins=(512, 1536, 3072, 4096)),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10, schedule="cosine"),
    checkpoint=CheckpointConfig(every=20),
    evaluation=dataclasses.replace(dense.evaluation, windows=4, window=4096),
)
