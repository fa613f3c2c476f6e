"""The byte-level BPE inside a GGUF file, as a tokenizer of the ``tokenizers`` package.

A GGUF file holds tokens, merges and the *name* of the rule that splits text before merging; the
rules themselves are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.loading.tokenizer import HuggingFaceTokenizer

_CONTROL, _USER_DEFINED = 3, 4
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns of the rules that split by one: Llama 3 keeps up to three digits together, Qwen 2 one.
_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}
_RULES = ("gpt-2", "smollm", *_PATTERNS)


def read_tokenizer(field: Callable[..., Any]) -> HuggingFaceTokenizer | None:
    """The tokenizer in the metadata; None if there is none.

    Args:
      field: looks a value up by its name, ``field("tokenizer.ggml.tokens")``.

    Raises:
      ValueError: if it is not a byte-level BPE, or splits text by a rule that is not known.
    """
    kind, rule = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre", "gpt-2")
    if kind is None:
        return None
    if kind != "gpt2" or rule not in _RULES:
        raise ValueError(
            f"the file's tokenizer is {kind!r} with the splitting rule {rule!r}; only 'gpt2' with "
            f"{_RULES} is read. Load the model with tokenizer=False, and its tokenizer.json or "
            "tokenizer.model with train.tokenizer.load_tokenizer"
        )
    tokens = field("tokenizer.ggml.tokens")
    merges = [(left, right) for left, _, right in map(_parts, field("tokenizer.ggml.merges"))]
    built = _build(tokens, merges, rule)
    _add_tokens(built, tokens, field("tokenizer.ggml.token_type", [1] * len(tokens)))
    special = {
        name: field(f"tokenizer.ggml.{long}_token_id")
        for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return HuggingFaceTokenizer(built.to_str(), special)


def _parts(merge: str) -> tuple[str, str, str]:
    return merge.partition(" ")


def _build(tokens: list[str], merges: list[tuple[str, str]], rule: str) -> Any:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it is, without merging up to it.
    model = models.BPE(vocabulary, merges, ignore_merges=rule == "llama-bpe")
    built = tokenizers.Tokenizer(model)
    if rule == "qwen2":
        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *_splits(rule),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in _PATTERNS),
        ]
    )
    built.decoder = decoders.ByteLevel()
    return built


def _splits(rule: str) -> list[Any]:
    """What happens before the byte-level step, which splits by GPT-2's pattern where none is."""
    from tokenizers import Regex, pre_tokenizers

    if rule == "smollm":  # every digit is a word of its own
        return [pre_tokenizers.Digits(individual_digits=True)]
    if rule in _PATTERNS:
        return [pre_tokenizers.Split(Regex(_PATTERNS[rule]), behavior="isolated")]
    return []


def _add_tokens(built: Any, tokens: list[str], kinds: list[int]) -> None:
    from tokenizers import AddedToken

    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            added = AddedToken(token, special=special, normalized=False)
            (built.add_special_tokens if special else built.add_tokens)([added])
