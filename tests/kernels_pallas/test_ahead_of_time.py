"""The proof ladder itself: a good kernel passes every rung, a bad one is caught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from kernel_proof import relative_error, strictly_interpreted

from kernels_pallas.ahead_of_time import TPU_CHIPS, compile_for_tpu, lower_for_gpu, lower_for_tpu
from kernels_pallas.interpreting import interpreter

ROWS = 128


def doubled_on_tpu(x, *, offset=0, wait=True):
    """Twice x [n * ROWS, 128], by manual copies of ROWS rows at a time."""

    def kernel(x_ref, out_ref, buffer, semaphore):
        first = pl.multiple_of(pl.program_id(0) * ROWS, ROWS) + offset
        copy = pltpu.make_async_copy(x_ref.at[pl.ds(first, ROWS)], buffer, semaphore)
        copy.start()
        if wait:
            copy.wait()
        out_ref[...] = 2 * buffer[...]
        if not wait:
            copy.wait()

    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // ROWS,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((ROWS, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((ROWS, 128), x.dtype), pltpu.SemaphoreType.DMA],
        interpret=interpreter("tpu"),
    )(x)


def doubled_on_gpu(x):
    """Twice x [128, 128], through shared memory."""

    def kernel(x_ref, out_ref, buffer, barrier):
        plgpu.copy_gmem_to_smem(x_ref, buffer, barrier)
        plgpu.barrier_wait(barrier)
        buffer[...] = 2 * buffer[...]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_ref)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        interpret=interpreter("gpu"),
    )(x)


def numbers(rows):
    return jnp.arange(rows * 128, dtype=jnp.float32).reshape(rows, 128)


def test_interpreted_tpu_kernel():
    with strictly_interpreted("tpu"):
        assert relative_error(doubled_on_tpu(numbers(2 * ROWS)), 2 * numbers(2 * ROWS)) == 0


def test_interpreted_gpu_kernel():
    with strictly_interpreted("gpu"):
        assert relative_error(doubled_on_gpu(numbers(128)), 2 * numbers(128)) == 0


def test_reading_before_the_copy_has_arrived_is_a_race():
    with pytest.raises(Exception, match=r"(?i)race"), strictly_interpreted("tpu"):
        doubled_on_tpu(numbers(ROWS), wait=False)


def test_reading_out_of_bounds_raises():
    with pytest.raises(Exception, match="Out-of-bounds"), strictly_interpreted("tpu"):
        jax.block_until_ready(doubled_on_tpu(numbers(ROWS), offset=8))


def test_forgetting_to_interpret_fails():
    with pytest.raises(AssertionError, match="no tpu kernel"), strictly_interpreted("tpu"):
        pass


@pytest.mark.parametrize("chip", TPU_CHIPS)
def test_compiles_for_tpu(chip):
    compiled = compile_for_tpu(doubled_on_tpu, numbers(4 * ROWS), chip=chip)
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == 4 * ROWS * 128 * 4
    assert memory.temp_size_in_bytes == 0
    assert "tpu_custom_call" in lower_for_tpu(doubled_on_tpu, numbers(4 * ROWS), chip=chip)


def test_lowers_for_gpu():
    assert "mosaic_gpu" in lower_for_gpu(doubled_on_gpu, numbers(128))


def test_a_kernel_that_does_not_fit_the_chip_is_rejected():
    with pytest.raises(Exception, match=r"(?i)memory|exceed"):
        lower_for_gpu(doubled_on_gpu, jax.ShapeDtypeStruct((512, 256), np.float32))


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="v99"):
        compile_for_tpu(doubled_on_tpu, numbers(ROWS), chip="v99")
    with pytest.raises(ValueError, match="v99"):
        lower_for_tpu(doubled_on_tpu, numbers(ROWS), chip="v99")
    with pytest.raises(ValueError, match="npu"):
        interpreter("npu")
