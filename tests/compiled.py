"""Calls compiled as one program: op by op, each operation of each shape compiles by itself."""

import functools

import jax


@functools.cache
def jitted(function, **options):
    """``function`` with these hashable options under ``jax.jit``, the same for equal options."""
    return jax.jit(functools.partial(function, **options))


def decoder_logits(decoder, tokens):
    """Logits [B, T, V] of a decoder for tokens [B, T]."""
    return jax.jit(lambda tokens: decoder(tokens).logits)(jax.numpy.asarray(tokens))
