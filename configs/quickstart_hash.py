"""HashAttention fitted to the frozen quickstart model: codes learn what dense attention looks at.

Train ``configs/quickstart_dense.py`` first. Here its language model stays as it is, bit for bit,
and the maps behind 32-bit codes learn in every layer at once to find the 32 most attended keys. The
evaluation then attends 4 first, 28 recent and 96 chosen keys of at most 1024.

Expected on a CPU core: about 2 minutes of training (0.8 s of CPU time a step, 24 s to compile) and
one of evaluation; 2.051 bits per byte with 23 % of the causal pairs, the dense model 2.049.
"""

import dataclasses

from configs.quickstart_dense import config as dense
from sparse_attn import HashAttention
from train.config import OptimizerConfig

config = dataclasses.replace(
    dense,
    run_dir="runs/quickstart-hash",
    init_from=dense.run_dir,
    objective="selector",
    steps=120,
    model=dataclasses.replace(
        dense.model,
        attention=HashAttention(budget=96, sinks=4, recent=28, anneal_steps=120),
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=10, weight_decay=0.0),
)
