"""The decoder: values against plain numpy, causality, and every form it can be run in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.transformer import (
    Decoder,
    ModelConfig,
    RopeConfig,
    abstract,
    count_parameters,
    merge,
    split,
)
from sparse_attn import registry
from sparse_attn.dense import Dense
from sparse_attn.nsa import NSA
from sparse_attn.types import Aux

# The model is tested over the reference ops: they compile fastest, and the others are held to them.
DENSE = Dense(implementation="reference")
SPARSE = dataclasses.replace(NSA.tiny()[0], implementation="reference")
V, D, N, K, H, F = 64, 32, 4, 2, 8, 48
B, T = 2, 21


def tiny(**changes):
    sizes = {
        "vocab_size": V,
        "layers": 2,
        "model_width": D,
        "query_heads": N,
        "kv_heads": K,
        "head_width": H,
        "mlp_width": F,
        "attention": DENSE,
    }
    return ModelConfig(**{**sizes, **changes})


def make(config, seed=0):
    # The generator "rbg" compiles several times faster than the default one.
    return Decoder(config, rngs=nnx.Rngs(jax.random.key(seed, impl="rbg")))


def make_tokens(seed=1, shape=(B, T)):
    return jax.random.randint(jax.random.key(seed), shape, 0, V)


@functools.partial(jax.jit, static_argnames=("graphdef", "inspect"))
def apply(graphdef, params, state, tokens, caches=None, segment_ids=None, inspect=False):
    decoder = merge(graphdef, params, state)
    return decoder(tokens, caches, segment_ids=segment_ids, inspect=inspect)


def forward(decoder, tokens, **call):
    return apply(*split(decoder), tokens, **call)


@functools.cache
def loss_and_gradient(config):
    """Of a made-up loss, for a fresh decoder of this config; shared by the tests below."""
    graphdef, params, state = split(make(config))
    tokens = make_tokens()

    def loss(params):
        output = merge(graphdef, params, state)(tokens)
        return jnp.mean(jax.nn.logsumexp(output.logits, axis=-1) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_trees_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def numpy_decoder(params, tokens, config):
    """The dense decoder of one row of tokens, written out in float64."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def rotate(x):
        angle = np.arange(len(tokens))[:, None, None] * 10000.0 ** (-2 * np.arange(H // 2) / H)
        turned = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = params["embedding"][tokens] * config.embedding_multiplier
    for i in range(config.layers):
        layer = params["layers"][str(i)]
        a = layer["attention"]
        h = norm(x, layer["attention_norm"]["scale"])
        q = np.einsum("td,dnh->tnh", h, a["q"]) + a["q_bias"]
        k = np.einsum("td,dkh->tkh", h, a["k"][0]) + a["k_bias"][0]
        v = np.einsum("td,dkh->tkh", h, a["v"][0]) + a["v_bias"][0]
        q, k = norm(q, a["q_norm"]["scale"]), norm(k, a["k_norm"]["scale"][0])
        q, k = rotate(q), rotate(k)
        k, v = np.repeat(k, N // K, axis=1), np.repeat(v, N // K, axis=1)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
        scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh,nhd->td", p, v, a["o"])
        h = norm(x, layer["mlp_norm"]["scale"])
        gate = h @ layer["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["mlp"]["up"])) @ layer["mlp"]["down"]
    return norm(x, params["final_norm"]["scale"]) @ params["unembedding"]


def test_biases_are_zero_or_drawn_with_the_stated_scale():
    def biases(**options):
        params = split(make(tiny(scan_layers=False, qkv_bias=True, **options)))[1]
        attention = params["layers"]["0"]["attention"]
        return np.concatenate([attention[f"{name}_bias"].ravel() for name in "qkv"])

    assert (biases() == 0).all()
    drawn = biases(qkv_bias_scale=0.5)
    assert 0.3 < drawn.std() < 0.7
    with pytest.raises(ValueError, match=r"qkv_bias_scale=0\.5 .* qkv_bias=False"):
        tiny(qkv_bias_scale=0.5)


def test_logits_equal_numpy_decoder(x64):
    config = tiny(
        scan_layers=False,
        qkv_bias=True,
        query_key_norm=True,
        tie_embeddings=False,
        embedding_multiplier=3.0,
        compute_dtype="float64",
        param_dtype="float64",
    )
    graphdef, params, state = split(make(config))
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape), params)
    tokens = make_tokens()
    logits = forward(merge(graphdef, params, state), tokens).logits
    assert logits.dtype == jnp.float64
    exact = jax.tree.map(np.asarray, params)
    for row in range(B):
        expected = numpy_decoder(exact, np.asarray(tokens[row]), config)
        np.testing.assert_allclose(logits[row], expected, rtol=1e-9, atol=1e-9)


def test_parameters_have_readable_names_and_stated_shapes():
    _, params, state = abstract(tiny(layers=4, attention=SPARSE, dense_layers=(0,)))
    assert sorted(params["layers"]) == ["0", "1-3"]
    assert state == {}
    assert params["embedding"].shape == (V, D)
    dense, sparse = params["layers"]["0"]["attention"], params["layers"]["1-3"]["attention"]
    assert {k: v.shape for k, v in dense.items()} == {
        "q": (D, N, H),
        "k": (1, D, K, H),
        "v": (1, D, K, H),
        "o": (N, H, D),
    }
    assert sparse["q"].shape == (3, D, N, H)
    assert sparse["k"].shape == (3, 3, D, K, H)
    assert "mechanism" in sparse
    assert params["layers"]["1-3"]["mlp"]["down"].shape == (3, F, D)


def test_count_parameters_is_the_sum_of_the_parts():
    config = tiny(tie_embeddings=False)
    layer = D * H * (N + 2 * K) + N * H * D + 3 * D * F + 2 * D
    assert count_parameters(abstract(config)[1]) == 2 * V * D + D + 2 * layer
    assert count_parameters(make(tiny(layers=1))) == V * D + D + layer


def test_initial_values_do_not_depend_on_the_grouping_and_differ_between_layers():
    config = tiny(layers=3, dense_layers=(0,), attention=Dense(5, "reference"))
    stacked, single = (
        split(make(c))[1]["layers"]
        for c in (config, dataclasses.replace(config, scan_layers=False))
    )
    for name in ("q", "o"):
        values = [np.asarray(single[str(i)]["attention"][name]) for i in range(3)]
        np.testing.assert_array_equal(values[0], stacked["0"]["attention"][name])
        np.testing.assert_array_equal(np.stack(values[1:]), stacked["1-2"]["attention"][name])
        assert len({value.tobytes() for value in values}) == 3


def test_residual_projections_start_smaller_in_deeper_models():
    shallow, deep = split(make(tiny(layers=1)))[1], split(make(tiny(layers=16)))[1]
    for part, name in (("attention", "o"), ("mlp", "down")):
        ratio = np.std(deep["layers"]["0-15"][part][name]) / np.std(
            shallow["layers"]["0"][part][name]
        )
        assert ratio == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("attention", [DENSE, SPARSE], ids=["dense", "nsa"])
def test_no_gradient_flows_to_later_tokens(attention):
    config = tiny(attention=attention, tie_embeddings=False)
    graphdef, params, state = split(make(config))
    tokens = jax.random.permutation(jax.random.key(2), V)[None, :T]  # every token once

    def scalars(embedding):
        logits = merge(graphdef, {**params, "embedding": embedding}, state)(tokens).logits[0]
        return jnp.sum(logits * jnp.cos(jnp.arange(V, dtype=jnp.float32))[None, :], axis=1)

    gradient = jax.jit(jax.jacrev(scalars))(params["embedding"])[:, tokens[0]]
    size = np.abs(np.asarray(gradient)).max(axis=-1)  # [output t, input s]
    assert (size[np.triu_indices(T, 1)] == 0).all()
    assert (size[np.tril_indices(T)] > 0).all()


def test_scan_equals_loop():
    config = tiny()
    scanned, scanned_gradient = loss_and_gradient(config)
    looped, looped_gradient = loss_and_gradient(dataclasses.replace(config, scan_layers=False))
    np.testing.assert_allclose(scanned, looped, rtol=1e-6)
    layers = looped_gradient["layers"]
    restacked = jax.tree.map(lambda *a: jnp.stack(a), layers["0"], layers["1"])
    assert_trees_close(scanned_gradient, {**looped_gradient, "layers": {"0-1": restacked}})


def test_unstacked_and_stacked_are_the_same_decoder():
    decoder = make(tiny(attention=SPARSE))
    loop = decoder.unstacked()
    assert sorted(loop.layers) == ["0", "1"]
    assert not loop.config.scan_layers
    tokens = make_tokens()
    np.testing.assert_allclose(
        forward(loop, tokens).logits, forward(decoder, tokens).logits, rtol=1e-5, atol=1e-6
    )
    again = loop.stacked()
    assert again.config == decoder.config
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(decoder)[1])
    assert split(again)[0] == split(decoder)[0]
    assert loop.unstacked() is loop


def test_split_form_is_plain_hashable_and_shared_by_equal_models():
    config = tiny(attention=SPARSE)
    graphdef, params, state = split(make(config))
    shapes_graphdef, shapes, _ = abstract(config)
    assert graphdef == shapes_graphdef
    assert hash(graphdef) == hash(shapes_graphdef)
    assert type(params) is dict
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((params, state)))


def test_tied_logits_use_the_embedding():
    tokens = make_tokens()
    decoder = make(tiny())
    hidden = decoder.hidden(tokens).hidden
    expected = np.asarray(hidden) @ np.asarray(split(decoder)[1]["embedding"]).T
    np.testing.assert_allclose(decoder.logits(hidden), expected, rtol=1e-4, atol=1e-5)
    untied = split(make(tiny(tie_embeddings=False)))[1]
    assert untied["unembedding"].shape == (D, V)
    assert "unembedding" not in split(decoder)[1]


def test_bfloat16_computes_low_and_keeps_masters_and_logits_in_float32():
    tokens = make_tokens()
    low = make(tiny(compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(split(low)[1])} == {jnp.dtype("float32")}
    assert jax.eval_shape(low.hidden, tokens).hidden.dtype == jnp.bfloat16
    assert low.init_caches(1, 8)[0].k.dtype == jnp.bfloat16
    for attention in (DENSE, SPARSE):
        logits = forward(make(tiny(attention=attention, compute_dtype="bfloat16")), tokens).logits
        assert logits.dtype == jnp.float32
        full = forward(make(tiny(attention=attention)), tokens).logits
        assert 0 < np.abs(logits - full).max() < 0.15
    _, gradient = loss_and_gradient(tiny(compute_dtype="bfloat16"))
    _, full = loss_and_gradient(tiny())
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.05 * np.abs(b).max()), gradient, full
    )


@pytest.mark.parametrize(
    ("attention", "sizes", "stacked"),
    [
        (DENSE, (9, 5, *[1] * (T - 14)), False),
        (SPARSE, (9, 5, *[1] * (T - 14)), False),
        (SPARSE, (T - 3, 1, 1, 1), True),
    ],
    ids=["dense", "nsa", "nsa-stacked"],
)
def test_prefill_and_decode_equal_teacher_forcing(attention, sizes, stacked):
    decoder = make(tiny(attention=attention))
    tokens = make_tokens()
    expected = forward(decoder, tokens).logits
    decoder = decoder if stacked else decoder.unstacked()
    caches = decoder.init_caches(B, T + 3)
    assert len(caches) == 2
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        output = forward(decoder, tokens[:, part], caches=caches)
        np.testing.assert_allclose(output.logits, expected[:, part], rtol=1e-4, atol=1e-5)
        caches, begin = output.caches, begin + size
    np.testing.assert_array_equal(caches[1].length, [T, T])


@pytest.mark.parametrize(
    ("attention", "remat", "scan_layers"),
    [
        (DENSE, "full", True),
        (DENSE, "dots", True),
        (DENSE, "full", False),
        pytest.param(SPARSE, "selection", True, marks=pytest.mark.full),
    ],
)
def test_remat_changes_no_gradient(attention, remat, scan_layers):
    config = tiny(attention=attention, scan_layers=scan_layers)
    changed = dataclasses.replace(config, remat=remat)
    assert_trees_close(loss_and_gradient(changed), loss_and_gradient(config))


def test_remat_saves_the_selection_and_little_else():
    tokens = make_tokens()

    def residuals(remat):
        graphdef, params, state = split(make(tiny(attention=SPARSE, remat=remat, layers=1)))

        def loss(params):
            return jnp.mean(merge(graphdef, params, state)(tokens).logits)

        return jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))

    def lists(remat):
        shape = (B, T, K, SPARSE.selected_blocks)
        return [r for r in residuals(remat) if r.shape == shape and r.dtype == jnp.int32]

    assert len(lists("selection")) == 1
    assert len(lists("full")) == 0
    assert len(residuals("selection")) < len(residuals("none")) / 2


def test_remat_never_ranks_twice():
    attention = dataclasses.replace(SPARSE, implementation="xla")
    tokens = make_tokens(shape=(B, 64))

    def rankings(remat):
        graphdef, params, state = abstract(tiny(attention=attention, remat=remat, layers=1))

        def loss(params):
            return jnp.mean(merge(graphdef, params, state)(tokens).logits)

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count(" top_k[")

    assert rankings("none") == rankings("selection") > 0
    assert rankings("full") == 2 * rankings("none")


def test_packed_documents_equal_documents_alone():
    decoder = make(tiny(attention=SPARSE, dense_layers=(0,)))
    first, second = make_tokens(3, (11,)), make_tokens(4, (8,))
    tokens, segment_ids = np.zeros((2, 3, 24), np.int32)
    # Documents start on a block of 8: row 0 packs both, rows 1 and 2 hold one each.
    for row, at, document, number in ((0, 0, first, 1), (0, 16, second, 2), (1, 0, first, 1)):
        tokens[row, at : at + len(document)] = document
        segment_ids[row, at : at + len(document)] = number
    tokens[2, :8], segment_ids[2, :8] = second, 1
    logits = forward(decoder, jnp.asarray(tokens), segment_ids=jnp.asarray(segment_ids)).logits
    np.testing.assert_allclose(logits[0, :11], logits[1, :11], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[0, 16:], logits[2, :8], rtol=1e-4, atol=1e-5)
    assert np.isfinite(logits).all()


def test_inspect_reports_single_layers():
    decoder = make(tiny(attention=SPARSE, layers=3, dense_layers=(0,)))
    graphdef, params, state = split(decoder)
    call = jax.jit(lambda tokens: merge(graphdef, params, state).hidden(tokens, inspect=True))
    output = call(make_tokens())
    by_layer = output.layer_metrics
    assert {name.rpartition(".")[2] for name in by_layer} == {"1", "2"}
    for name, mean in output.aux.metrics.items():
        one, two = by_layer[f"{name}.1"], by_layer[f"{name}.2"]
        np.testing.assert_allclose(mean, (one + two) / 2, rtol=1e-6)
    plain = jax.eval_shape(lambda tokens: decoder.hidden(tokens), make_tokens())
    assert plain.layer_metrics == {}


def test_inspect_returns_one_selection_a_layer():
    tokens = make_tokens()
    decoder = make(tiny(attention=SPARSE, layers=3, dense_layers=(0,)))
    output = forward(decoder, tokens, inspect=True)
    assert output.selections[0] is None
    for selection in output.selections[1:]:
        assert selection.indices.shape == (B, T, K, SPARSE.selected_blocks)
        assert selection.block_size == SPARSE.selection_block
        # Row t sees its own block, and all blocks while they are few.
        own = np.arange(T) // SPARSE.selection_block
        listed = np.asarray(selection.indices)
        assert (listed == own[None, :, None, None]).any(axis=-1).all()
        np.testing.assert_array_equal(
            (listed >= 0).sum(-1),
            np.broadcast_to(np.minimum(own + 1, SPARSE.selected_blocks)[None, :, None], (B, T, K)),
        )
    assert output.aux.selection is None
    assert output.aux.metrics["density"] > 0
    looped = jax.eval_shape(lambda t: decoder.unstacked()(t, inspect=True), tokens)
    assert jax.tree.map(jnp.shape, looped) == jax.tree.map(jnp.shape, output)
    assert jax.eval_shape(decoder, tokens).selections == ()


@dataclasses.dataclass(frozen=True)
class Counting:
    """A mechanism with state: out = v + bias, counts its tokens."""

    causal = True
    alignment = 1
    kv_branches = 1


class CountingAttention(nnx.Module):
    def __init__(self, config, shape, *, rngs, param_dtype):
        del config, rngs
        self.group = shape.group
        self.width = nnx.Param(jnp.zeros((shape.value_width,), param_dtype))
        self.count = nnx.Variable(jnp.zeros((2,), jnp.float32))

    def __call__(self, heads, cache=None, *, positions, segment_ids, attend, inspect):
        out = jnp.repeat(heads.v[0], self.group, axis=2) + self.width[...][None, None, None]
        size = jnp.mean(jnp.abs(heads.x))
        seen = jnp.full((2,), heads.x.shape[1], jnp.float32) + self.count[...]
        return out, cache, Aux(loss=size, metrics={"size": size}, statistics={"seen": seen})

    def update_state(self, statistics):
        self.count[...] = self.count[...] + statistics["seen"]


def test_aux_adds_losses_averages_metrics_and_stacks_statistics(monkeypatch):
    monkeypatch.setitem(registry._modules, Counting, CountingAttention)
    tokens = make_tokens()
    config = tiny(attention=Counting(), layers=4, dense_layers=(0,))
    for scan_layers in (True, False):
        decoder = make(dataclasses.replace(config, scan_layers=scan_layers))
        aux = forward(decoder, tokens).aux
        np.testing.assert_allclose(aux.loss, 3 * aux.metrics["size"], rtol=1e-6)
        assert list(aux.statistics) == ["layers.1-3.seen"]
        np.testing.assert_array_equal(aux.statistics["layers.1-3.seen"], np.full((3, 2), T))
        uneven = aux.statistics["layers.1-3.seen"] * jnp.asarray([[1.0], [2.0], [3.0]])
        decoder.update_state({"layers.1-3.seen": uneven})
        decoder.update_state({})
        state = split(decoder.stacked())[2]
        count = state["layers"]["1-3"]["attention"]["mechanism"]["count"]
        np.testing.assert_array_equal(count, T * np.asarray([[1, 1], [2, 2], [3, 3]]))
        again = forward(decoder, tokens).aux.statistics["layers.1-3.seen"]
        np.testing.assert_array_equal(again, T + count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_heads": 5}, "query_heads=5 is not a multiple of kv_heads=2"),
        ({"head_width": 7}, "head_width=7 with rotary_fraction=1.0 leaves 7 dims, an odd number"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"dense_layers": (0, 2)}, r"name layers \[2\], but the model has layers 0 to 1"),
        ({"attention_overrides": ((5, DENSE),)}, r"name layers \[5\]"),
        ({"dense_layers": (1,), "attention_overrides": ((1, SPARSE),)}, r"layers \[1\] are named"),
        ({"remat": "some"}, "remat='some' is unknown; use one of"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16' is unknown"),
        ({"norm_epsilon": 0.0}, "norm_epsilon=0.0 must be positive"),
    ],
)
def test_nonsense_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_odd_heads_are_fine_without_rope():
    assert tiny(head_width=7, rope=RopeConfig(rotary_fraction=0.0)).head_width == 7


def test_calls_that_do_not_fit_are_refused():
    decoder = make(tiny())
    with pytest.raises(ValueError, match=r"tokens.shape=\(3,\) must be \[B, T\]"):
        decoder(jnp.zeros((3,), jnp.int32))
    with pytest.raises(TypeError, match="tokens are float32; the decoder takes integer"):
        decoder(jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="1 caches were given for layers=2"):
        decoder(jnp.zeros((1, 3), jnp.int32), decoder.init_caches(1, 4)[:1])
    with pytest.raises(TypeError, match="no mechanism is registered"):
        make(tiny(attention=RopeConfig()))
