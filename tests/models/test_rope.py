"""Rope against formulas written out pair by pair in numpy, and its defining property."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.rope import RopeConfig, make_rope

H = 16
THETA = 10000.0


def base(i, d=H, theta=THETA):
    return theta ** (-2 * i / d)


def expected_frequency(config, i, d=H):
    """f_i, one pair at a time, from the papers."""
    f = base(i, d)
    if config.scaling == "none":
        return f
    if config.scaling == "linear":
        return f / config.factor
    if config.scaling == "ntk":
        return base(i, d, THETA * config.factor ** (d / (d - 2)))
    if config.scaling == "longrope":
        return f / config.pair_factors[i]
    turns = config.original_context * f / (2 * math.pi)
    if config.scaling == "llama3":
        if turns > config.high_frequency_factor:
            return f
        if turns < config.low_frequency_factor:
            return f / config.factor
        share = (turns - config.low_frequency_factor) / (
            config.high_frequency_factor - config.low_frequency_factor
        )
        return share * f + (1 - share) * f / config.factor
    low = d * math.log(config.original_context / (config.beta_fast * 2 * math.pi))
    low = math.floor(low / (2 * math.log(THETA)))
    high = d * math.log(config.original_context / (config.beta_slow * 2 * math.pi))
    high = math.ceil(high / (2 * math.log(THETA)))
    low, high = max(low, 0), min(high, d - 1)
    interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
    return (1 - interpolated) * f + interpolated * f / config.factor


def expected_rotation(config, array, positions, d=H):
    """Turn each pair as a complex number."""
    out = np.array(array, np.float64)
    length = {
        "yarn": 0.1 * math.log(config.factor) + 1,
        "longrope": math.sqrt(1 + math.log(config.factor) / math.log(config.original_context or 2)),
    }.get(config.scaling, 1.0)
    for i in range(d // 2):
        a, b = (i, i + d // 2) if config.layout == "half" else (2 * i, 2 * i + 1)
        angle = positions[:, :, None] * expected_frequency(config, i, d)
        turned = (array[..., a] + 1j * array[..., b]) * np.exp(1j * angle) * length
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


VARIANTS = [
    RopeConfig(),
    RopeConfig(layout="interleaved"),
    RopeConfig(scaling="linear", factor=4.0),
    RopeConfig(scaling="ntk", factor=8.0),
    RopeConfig(scaling="yarn", factor=16.0, original_context=256),
    RopeConfig(scaling="yarn", factor=2.0, original_context=4096, layout="interleaved"),
    RopeConfig(scaling="llama3", factor=8.0, original_context=512),
    RopeConfig(
        scaling="longrope",
        factor=4.0,
        original_context=512,
        pair_factors=(1.0, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 9.0),
    ),
]


def sample(seed=0, tokens=5, heads=3, width=H):
    rng = np.random.default_rng(seed)
    array = rng.standard_normal((2, tokens, heads, width))
    positions = rng.integers(0, 1000, (2, tokens))
    return array, positions


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.scaling}-{c.layout}-{c.factor}")
def test_rotation_equals_the_formula_of_each_variant(x64, config):
    array, positions = sample()
    turned = make_rope(config, H)(jnp.asarray(array), jnp.asarray(positions))
    assert turned.dtype == jnp.float64
    np.testing.assert_allclose(
        turned, expected_rotation(config, array, positions), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.scaling}-{c.layout}-{c.factor}")
def test_products_depend_on_the_distance_alone(x64, config):
    array, positions = sample(1)
    q, k = jnp.asarray(array[:, :, :1]), jnp.asarray(array[:, :, 1:2])
    rope = make_rope(config, H)
    positions = jnp.asarray(positions)
    near = jnp.sum(rope(q, positions + 3) * rope(k, positions), axis=-1)
    far = jnp.sum(rope(q, positions + 4003) * rope(k, positions + 4000), axis=-1)
    other = jnp.sum(rope(q, positions + 4) * rope(k, positions), axis=-1)
    np.testing.assert_allclose(near, far, rtol=1e-9, atol=1e-9)
    assert np.abs(near - other).max() > 1e-2


def test_scaled_variants_keep_fast_pairs_and_slow_down_slow_ones():
    for config in (variant for variant in VARIANTS if variant.scaling in ("yarn", "llama3")):
        assert math.isclose(expected_frequency(config, 0), 1.0)
        assert math.isclose(expected_frequency(config, 7), base(7) / config.factor)


def test_partial_rotation_leaves_the_rest_alone(x64):
    array, positions = sample(2)
    half = RopeConfig(rotary_fraction=0.5)
    turned = make_rope(half, H)(jnp.asarray(array), jnp.asarray(positions))
    np.testing.assert_allclose(
        turned[..., :8], expected_rotation(half, array[..., :8], positions, d=8), rtol=1e-12
    )
    np.testing.assert_array_equal(turned[..., 8:], array[..., 8:])


def test_dims_overrides_fraction_and_width(x64):
    array, positions = sample(3, width=24)
    config = RopeConfig()
    turned = make_rope(config, H)(jnp.asarray(array), jnp.asarray(positions), dims=8)
    np.testing.assert_allclose(
        turned[..., :8], expected_rotation(config, array[..., :8], positions, d=8), rtol=1e-12
    )
    np.testing.assert_array_equal(turned[..., 8:], array[..., 8:])


def test_fraction_zero_is_no_rope():
    array, positions = sample(4)
    array = jnp.asarray(array, jnp.float32)
    turned = make_rope(RopeConfig(rotary_fraction=0.0), H)(array, jnp.asarray(positions))
    np.testing.assert_array_equal(turned, array)


def test_bfloat16_rotates_in_float32():
    array, _ = sample(5)
    positions = jnp.full((2, 5), 30001, jnp.int32)
    low = jnp.asarray(array, jnp.bfloat16)
    turned = make_rope(RopeConfig(), H)(low, positions)
    assert turned.dtype == jnp.bfloat16
    exact = expected_rotation(RopeConfig(), np.asarray(low, np.float64), np.asarray(positions))
    np.testing.assert_allclose(np.asarray(turned, np.float64), exact, atol=2e-2, rtol=1e-2)


def test_gradient_is_the_inverse_rotation(x64):
    array, positions = sample(6)
    positions = jnp.asarray(positions)
    rope = make_rope(RopeConfig(), H)
    cotangent = jnp.asarray(sample(7)[0])
    _, pullback = jax.vjp(lambda a: rope(a, positions), jnp.asarray(array))
    np.testing.assert_allclose(pullback(cotangent)[0], rope(cotangent, -positions), rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling": "dynamic"}, "scaling='dynamic' is unknown"),
        ({"layout": "neox"}, "layout='neox' is unknown"),
        ({"theta": 0.5}, "theta=0.5 must be above 1"),
        ({"scaling": "linear", "factor": 0.5}, "factor=0.5 must be at least 1"),
        ({"factor": 4.0}, "factor=4.0 has no effect"),
        ({"rotary_fraction": 1.5}, r"rotary_fraction=1.5 must lie in \[0, 1\]"),
        ({"scaling": "yarn", "factor": 2.0}, "scaling='yarn' needs original_context"),
        ({"scaling": "longrope", "original_context": 8}, r"pair_factors=\(\) belong to scaling='l"),
        ({"pair_factors": (1.0,)}, "which needs one a rotated pair; scaling='none'"),
        (
            {"scaling": "longrope", "original_context": 8, "pair_factors": (1.0, 0.0)},
            "must be positive",
        ),
        ({"beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast=1.0 must be above beta_slow=2.0"),
        ({"high_frequency_factor": 1.0}, "high_frequency_factor=1.0 must be above"),
    ],
)
def test_nonsense_configs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**arguments)


def test_calls_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"head_width=15 .* leaves 15 dims"):
        make_rope(RopeConfig(), 15)
    factors = make_rope(RopeConfig(scaling="longrope", original_context=8, pair_factors=(2.0,)), H)
    with pytest.raises(ValueError, match="1 pair_factors do not fit 16 rotated dims"):
        factors(jnp.ones((1, 1, 1, H)), jnp.zeros((1, 1), jnp.int32))
    rope = make_rope(RopeConfig(), H)
    array, positions = jnp.ones((2, 5, 3, H)), jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match=r"positions \[B, T\]; got"):
        rope(array, positions[:, :4])
    with pytest.raises(ValueError, match="positions are float32"):
        rope(array, positions.astype(jnp.float32))
    with pytest.raises(ValueError, match="made for head_width=16, the array has 8"):
        rope(array[..., :8], positions)
    with pytest.raises(ValueError, match="dims=7 must be even"):
        rope(array, positions, dims=7)
    with pytest.raises(ValueError, match="dims=18 must be even and between 0 and the array's 16"):
        rope(array, positions, dims=18)
