"""The notebooks: shortened they run and are right, and what is saved comes from a whole run."""

import ast
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import load_script

from models import Decoder, ModelConfig, export
from sparse_attn import Dense

ROOT = Path(__file__).parent.parent
