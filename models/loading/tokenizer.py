"""Tokenizers that were published with models, under the protocol of :mod:`train.tokenizer`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from train.tokenizer import check_texts, checked_ids, write_atomically

_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
_SPACE_MARK = "▁"


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, run by the ``tokenizers`` package.

    Text that spells a special token is ordinary text, unless ``encode`` is told otherwise. Some
    published tokenizers normalise (NFC in Qwen) or put a space in front (Llama 2): ``decode`` and
    ``token_bytes`` then give the text as the tokenizer sees it. A model without a token for the
    beginning, or for padding, uses the one for the end.

    Args:
      definition: the text of ``tokenizer.json``.
      special: ids of ``"bos"``, ``"eos"`` and ``"pad"``; only ``"eos"`` must be there.

    Raises:
      ValueError: if the definition is damaged or there is no end token.
    """

    def __init__(self, definition: str, special: Mapping[str, int | None]):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"this is no definition of a tokenizer: {error}") from error
        # Truncation and padding are stored in the file too, and are not part of the mapping.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        eos = special.get("eos")
        if eos is None:
            raise ValueError(
                f"the tokenizer names no end token (special ids: {dict(special)}); add eos_token "
                f"to {_SETTINGS_FILE}"
            )
        self.eos_id = eos
        bos, pad = special.get("bos"), special.get("pad")
        self.bos_id = eos if bos is None else bos
        self.pad_id = eos if pad is None else pad
        self.definition = definition
        self._tokens = {number: token for token, number in self._tokenizer.get_vocab(True).items()}
        self.vocab_size = max(self._tokens) + 1
        self.token_bytes = self._bytes_of_tokens()
        identity = json.dumps([definition, self.bos_id, self.eos_id, self.pad_id])
        self.fingerprint = "tokenizers-" + hashlib.sha256(identity.encode()).hexdigest()[:32]

    def _bytes_of_tokens(self) -> Int[np.ndarray, "V"]:
        """The utf-8 bytes of every token, int32; 0 for special tokens and unused ids."""
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.definition).get("decoder"))
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for number, token in self._tokens.items():
            if number in added:
                sizes[number] = 0 if added[number].special else len(token.encode("utf-8"))
            elif byte_level:
                sizes[number] = len(token)  # one character stands for one byte
            elif len(token) == 6 and token.startswith("<0x"):
                sizes[number] = 1
            else:
                sizes[number] = len(token.replace(_SPACE_MARK, " ").encode("utf-8"))
        return sizes

    def encode(self, text: str, *, special_tokens: bool = False) -> Int[np.ndarray, "T"]:
        """Token ids (int32) without bos or eos.

        ``special_tokens=True`` reads ``<|im_start|>`` and its like as the tokens they name, as
        chat templates need it; never do that with text from elsewhere.

        Raises:
          ValueError: if ``text`` holds lone surrogates, which have no utf-8 form.
        """
        check_texts([text])
        self._tokenizer.encode_special_tokens = not special_tokens
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        """``[encode(text) for text in texts]`` on all cores."""
        check_texts(texts)
        self._tokenizer.encode_special_tokens = True
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"]) -> str:
        """The text; special tokens are empty, broken utf-8 becomes U+FFFD."""
        checked = checked_ids(ids, self.vocab_size).tolist()
        return self._tokenizer.decode(checked, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as ``"<|im_end|>"``; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers reads too."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._tokens[self.bos_id],
            "eos_token": self._tokens[self.eos_id],
            "pad_token": self._tokens[self.pad_id],
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        write_atomically(Path(folder) / _FILE, self.definition.encode("utf-8"))
        write_atomically(Path(folder) / _SETTINGS_FILE, text.encode("utf-8"))


def load_hugging_face(file: Path) -> HuggingFaceTokenizer:
    """``tokenizer.json``, with the special tokens that the files beside it name.

    Raises:
      ValueError: if no end token is named anywhere.
    """
    definition = file.read_text(encoding="utf-8")
    ids = {
        token["content"]: token["id"] for token in json.loads(definition).get("added_tokens", [])
    }
    model = json.loads(definition)["model"]
    if isinstance(model.get("vocab"), dict):
        ids = {**model["vocab"], **ids}
    return HuggingFaceTokenizer(
        definition, {name: _special_id(file.parent, name, ids) for name in ("bos", "eos", "pad")}
    )


def _special_id(folder: Path, name: str, ids: Mapping[str, int]) -> int | None:
    for file in (_SETTINGS_FILE, "special_tokens_map.json"):
        token = _settings(folder / file).get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content is not None and content in ids:
            return ids[content]
    number = _settings(folder / "config.json").get(f"{name}_token_id")
    # Some models list several tokens that end a text; the first is the usual one.
    return number[0] if isinstance(number, list) else number


def _settings(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
