"""The quickstart's model with dense attention: the yardstick, and where sparse models start from.

Same text, tokens, sizes and steps as ``configs/quickstart.py``; the run is the ``init_from`` of the
recipes that continue or fit a trained dense model.

Expected on two CPU cores: about 3 minutes; 2.05 bits per byte on the held-out text with 1.3 million
parameters (quickstart: 2.04 with 2.0 million, K/V sets and compression maps among them).
"""

import dataclasses

from configs.quickstart import config as quickstart
from sparse_attn import Dense

config = dataclasses.replace(
    quickstart,
    run_dir="runs/quickstart-dense",
    model=dataclasses.replace(quickstart.model, attention=Dense()),
)
