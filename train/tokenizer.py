"""Tokenizers without loss: ``decode(encode(text)) == text``, and every token knows its bytes.

Losslessness is what makes bits per byte comparable between tokenizers: the bytes of the scored
tokens add up to the bytes of the text, whatever the vocabulary. Tokenizers that were published
with models (:func:`load_tokenizer`) follow the same protocol; a few of them normalise text first or
put a space in front of it, and are lossless but for that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Int

_log = logging.getLogger(__name__)

_PAD, _BOS, _EOS = 0, 1, 2
_SPACE_MARK = "▁"  # sentencepiece writes spaces as this character
_MODEL_FILE = "tokenizer.model"
_CONFIG_FILE = "tokenizer.json"


TokenizerKind = Literal["sentencepiece", "bytes", "published"]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens.

    Attributes:
      kind: "sentencepiece" learns ``vocab_size`` pieces from the training split; "bytes" needs no
        training and always has 259 ids (``vocab_size`` is ignored); "published" is the one that
        comes with the published model a run starts from.
      vocab_size: pieces that sentencepiece learns.
      algorithm: of sentencepiece, unigram or bpe.
      training_bytes: at most about this much text (lines spread evenly over the split) is shown to
        the trainer; it bounds the training time.

    Raises:
      ValueError: if a name is unknown or a size out of range.
    """

    kind: TokenizerKind = "sentencepiece"
    vocab_size: int = 4096
    algorithm: Literal["unigram", "bpe"] = "unigram"
    training_bytes: int = 4_000_000

    def __post_init__(self) -> None:
        if self.kind not in get_args(TokenizerKind):
            raise ValueError(f"tokenizer kind={self.kind!r}; choose of {get_args(TokenizerKind)}")
        if self.algorithm not in ("unigram", "bpe"):
            raise ValueError(f"tokenizer algorithm={self.algorithm!r}; choose 'unigram' or 'bpe'")
        if self.kind == "sentencepiece" and self.vocab_size < 300:
            raise ValueError(
                f"vocab_size={self.vocab_size} leaves no room beside 256 byte pieces; "
                "use at least 300, or kind='bytes'"
            )
        if self.training_bytes < 1:
            raise ValueError(f"training_bytes={self.training_bytes} must be at least 1")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back without loss.

    ``token_bytes`` [V] int32 holds the utf-8 bytes of every token (0 for the special ones), so
    ``token_bytes[encode(text)].sum() == len(text.encode())``. ``fingerprint`` identifies the
    mapping: equal fingerprints encode every text alike.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    token_bytes: Int[np.ndarray, "V"]
    fingerprint: str

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Token ids (int32) without bos or eos."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        """``[encode(text) for text in texts]``, faster."""
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"]) -> str:
        """The text; special tokens are empty, broken utf-8 becomes U+FFFD."""
        ...

    def save(self, folder: str | os.PathLike) -> None:
        """Write what ``load_tokenizer(folder)`` needs."""
        ...


class ByteTokenizer:
    """One token a byte: ids 0, 1, 2 are pad, bos and eos; byte ``b`` is ``3 + b``."""

    pad_id, bos_id, eos_id = _PAD, _BOS, _EOS
    vocab_size = 259
    fingerprint = "bytes-1"

    def __init__(self) -> None:
        self.token_bytes = np.ones(self.vocab_size, np.int32)
        self.token_bytes[:3] = 0

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Utf-8 bytes, each shifted by the three special ids."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + 3

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        """``[encode(text) for text in texts]``."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"]) -> str:
        """The text; special tokens are empty, broken utf-8 becomes U+FFFD."""
        ids = checked_ids(ids, self.vocab_size)
        return (ids[ids >= 3] - 3).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike) -> None:
        """Write what ``load_tokenizer(folder)`` needs."""
        _save_description(Path(folder), {"kind": "bytes", "fingerprint": self.fingerprint})


class SentencePieceTokenizer:
    """A sentencepiece model, read so that nothing is lost.

    Decoding joins the bytes of the pieces instead of calling sentencepiece, because its own
    decoder cannot tell a space from a literal U+2581. Models of :func:`train_sentencepiece` have
    pad, bos and eos at 0, 1, 2 and an unknown token that byte fallback never emits. A published
    model keeps its own ids; without a token for padding or the beginning, the one for the end
    serves. If it puts a space in front of every text (Llama 2), decoding takes it away again.

    Args:
      model: the serialised model, as ``train_sentencepiece`` returns it, or a ``.model`` file.

    Raises:
      ValueError: if ``model`` is not a sentencepiece model, or has no end token.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            pad, bos, eos = (
                getattr(self._processor, name)() for name in ("pad_id", "bos_id", "eos_id")
            )
        except RuntimeError as error:
            raise ValueError(
                f"{len(model)} bytes are no sentencepiece model ({error}); "
                "delete the file to have it trained again"
            ) from error
        if eos < 0:
            raise ValueError("the sentencepiece model has no end token, so texts cannot be parted")
        self.pad_id, self.bos_id, self.eos_id = (eos if i < 0 else i for i in (pad, bos, eos))
        self.model = model
        self.vocab_size = self._processor.vocab_size()
        self.fingerprint = "sentencepiece-" + hashlib.sha256(model).hexdigest()[:32]
        self._pieces = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)
        self._mark_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode("utf-8")
        ]
        first = "".join(self._processor.encode("a", out_type=str))
        self._prefixes_space = first.startswith(_SPACE_MARK)
        can_spell = self._processor.unk_id() not in self._mark_ids
        self._spells_marks = can_spell and not self._prefixes_space

    def _piece_bytes(self, token: int) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode("utf-8")

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Token ids (int32) without bos or eos.

        Raises:
          ValueError: if ``text`` holds lone surrogates, which have no utf-8 form.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        """``[encode(text) for text in texts]`` on two threads."""
        check_texts(texts)
        # A literal space mark is spelled with its three byte pieces.
        parts = [text.split(_SPACE_MARK) if self._spells_marks else [text] for text in texts]
        flat = [part for split in parts for part in split]
        encoded = iter(self._processor.encode(flat, num_threads=2)) if flat else iter(())
        result = []
        for split in parts:
            ids = list(next(encoded))
            for _ in split[1:]:
                ids += self._mark_ids
                ids += next(encoded)
            result.append(np.array(ids, np.int32))
        return result

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"]) -> str:
        """The text; special tokens are empty, broken utf-8 becomes U+FFFD."""
        checked = checked_ids(ids, self.vocab_size)
        text = b"".join(self._pieces[i] for i in checked).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._prefixes_space else text

    def save(self, folder: str | os.PathLike) -> None:
        """Write what ``load_tokenizer(folder)`` needs."""
        write_atomically(Path(folder) / _MODEL_FILE, self.model)
        _save_description(Path(folder), {"kind": "sentencepiece", "fingerprint": self.fingerprint})


def train_sentencepiece(texts: Sequence[str], config: TokenizerConfig) -> bytes:
    """Train a sentencepiece model; equal texts and config give equal bytes.

    The normaliser is the identity, spaces are kept as they are and unknown characters fall back
    to byte pieces, so that no text is changed. Pieces do not cross lines; one and two newlines
    are pieces of their own.

    Args:
      texts: the documents of the *training* split.
      config: vocabulary size, algorithm, and the amount of text to look at.

    Returns:
      The serialised model.

    Raises:
      ValueError: if there is no text, or too little for ``config.vocab_size`` pieces.
    """
    import sentencepiece

    # The trainer skips lines with NUL and reads the space mark as a space.
    unspoilt = (text.replace("\0", "\n").replace(_SPACE_MARK, "\n") for text in texts)
    lines = [line for text in unspoilt for line in text.split("\n") if line]
    total = sum(len(line.encode("utf-8")) for line in lines)
    if not total:
        raise ValueError(
            f"no text in the {len(texts)} documents to train a tokenizer on; check the data source"
        )
    keep = min(1.0, config.training_bytes / total)
    lines = [line for i, line in enumerate(lines) if int((i + 1) * keep) > int(i * keep)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=config.vocab_size,
            model_type=config.algorithm,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\n\n"],
            pad_id=_PAD,
            bos_id=_BOS,
            eos_id=_EOS,
            unk_id=3,
            shuffle_input_sentence=False,
            input_sentence_size=0,
            max_sentence_length=1 << 24,
            # Part of the result: the threads' sums are added in their order.
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab_size={config.vocab_size} cannot be trained on {total} bytes of text ({error}); "
            "use a smaller vocabulary, more text, or kind='bytes'"
        ) from error
    return model.getvalue()


def build_tokenizer(
    config: TokenizerConfig, texts: Sequence[str], cache_dir: str | os.PathLike | None = None
) -> Tokenizer:
    """The tokenizer of ``config``, trained on ``texts`` or taken from the cache.

    The cache key is a hash of the texts, the config and sentencepiece's version; a damaged cache
    file is replaced.

    Args:
      config: which tokenizer.
      texts: the documents of the training split (never of another one).
      cache_dir: where trained models are kept; None keeps nothing.
    """
    if config.kind == "published":
        raise ValueError(
            "the tokenizer of kind 'published' comes with the model a run starts from; it is not "
            "built from texts"
        )
    if config.kind == "bytes":
        return ByteTokenizer()
    path = None
    if cache_dir is not None:
        import sentencepiece

        settings = json.dumps([dataclasses.asdict(config), sentencepiece.__version__])
        path = Path(cache_dir) / f"tokenizer-{text_hash([settings, *texts])}.model"
        try:
            return SentencePieceTokenizer(path.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            _log.warning("%s is unusable and trained again: %s", path, error)
    model = train_sentencepiece(texts, config)
    if path is not None:
        cache_atomically(path, model)
    return SentencePieceTokenizer(model)


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
    """The tokenizer that ``tokenizer.save(folder)`` wrote, or one that came with a model.

    Args:
      source: a folder, in which ``tokenizer.json`` (ours or Hugging Face's) goes before
        ``tokenizer.model`` (sentencepiece); or such a file, of any name that ends alike.

    Raises:
      FileNotFoundError: if there is no tokenizer.
      ValueError: if its files are damaged or do not belong together.
    """
    path = Path(source)
    if path.is_dir():
        candidates = [path / _CONFIG_FILE, path / _MODEL_FILE]
        path = next((file for file in candidates if file.exists()), candidates[0])
    if not path.exists():
        raise FileNotFoundError(
            f"{source} holds no {_CONFIG_FILE} and no {_MODEL_FILE}; save a tokenizer there first"
        )
    if path.suffix != ".json":
        return SentencePieceTokenizer(path.read_bytes())
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        published = "model" in description
        kind, fingerprint = description.get("kind"), description.get("fingerprint")
        if not published and (kind is None or fingerprint is None):
            raise KeyError("kind" if kind is None else "fingerprint")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if published:
        from models.loading.tokenizer import load_hugging_face

        return load_hugging_face(path)
    return _load_saved(path.parent, kind, fingerprint)


def _load_saved(folder: Path, kind: str, fingerprint: str) -> Tokenizer:
    tokenizer: Tokenizer
    if kind == "bytes":
        tokenizer = ByteTokenizer()
    elif kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer((folder / _MODEL_FILE).read_bytes())
    else:
        raise ValueError(f"{folder / _CONFIG_FILE}: unknown tokenizer kind {kind!r}")
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{folder}: the model has fingerprint {tokenizer.fingerprint}, {_CONFIG_FILE} says "
            f"{fingerprint}; the files come from different tokenizers"
        )
    return tokenizer


def text_hash(texts: Sequence[str]) -> str:
    """A hash of a list of texts and of where each one ends."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or absent, also when two processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_atomically(path: Path, data: bytes) -> None:
    """``write_atomically`` for what can be computed again: a failure is logged, not raised."""
    try:
        write_atomically(path, data)
    except OSError as error:
        _log.warning("%s cannot be cached and is computed again next time: %s", path, error)


def _save_description(folder: Path, description: dict[str, str]) -> None:
    data = json.dumps(description, indent=2) + "\n"
    write_atomically(folder / _CONFIG_FILE, data.encode("utf-8"))


def check_texts(texts: Sequence[str]) -> None:
    """Refuse text that has no utf-8 form.

    Raises:
      ValueError: with the place of the first such text.
    """
    for index, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {index} cannot be written as utf-8 ({error}); "
                "replace lone surrogates before encoding"
            ) from error


def checked_ids(ids: Sequence[int] | Int[np.ndarray, "T"], vocab_size: int) -> np.ndarray:
    """``ids`` as a flat array.

    Raises:
      ValueError: for an id outside the vocabulary.
    """
    array = np.asarray(ids, np.int64).reshape(-1)
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(f"token {outside[0]} is outside the vocabulary [0, {vocab_size})")
    return array
