"""Which machines the Mosaic GPU kernels refuse."""

import types

import jax
import pytest

from kernels_pallas import gpu


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a host with this backend, compute capability and CUDA version."""

    def pretend(backend, capability="9.0", cuda=13000):
        device = types.SimpleNamespace(device_kind="Test GPU", compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(gpu, "_cuda_version", lambda: cuda)

    return pretend


@pytest.mark.parametrize("cuda", [12060, 12079, 12091, 13000, None])
def test_hopper_is_served(machine, cuda):
    machine("gpu", cuda=cuda)
    gpu.check_device()


def test_a_cpu_host_may_lower_and_interpret(machine):
    machine("cpu", capability=None, cuda=12080)
    gpu.check_device()


@pytest.mark.parametrize(
    ("backend", "capability", "cuda", "message"),
    [
        ("tpu", "9.0", 13000, "do not run on 'tpu'"),
        ("gpu", "8.0", 13000, "Test GPU has compute capability 8.0"),
        ("gpu", "10.0", 13000, "Test GPU has compute capability 10.0"),
        ("gpu", "9.0", 12080, r"CUDA 12\.8\.0 miscompiles"),
        ("gpu", "9.0", 12090, r"CUDA 12\.9\.0 miscompiles"),
    ],
)
def test_others_are_refused(machine, backend, capability, cuda, message):
    machine(backend, capability, cuda)
    with pytest.raises(NotImplementedError, match=message):
        gpu.check_device()
