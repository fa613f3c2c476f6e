"""Shared test settings: CPU, strict ranks, no silent dtype or warning."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The warpgroups of an interpreted GPU kernel wait for each other on the threads of XLA's pool: with
# fewer threads than warpgroups (one a core by default) they wait forever.
os.environ.setdefault("PJRT_NPROC", "8")
# Lets libtpu, which reads these when it is loaded, compile without a TPU; every worker loads it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Almost all test time is compilation of tiny programs; what they compute does not depend on this.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Examples share one compilation, which the first of them waits for.
hypothesis.settings.register_profile(
    "shared",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


@pytest.fixture
def x64():
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield
