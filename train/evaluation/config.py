"""What the evaluation of a run scores, as a part of the run's configuration."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Which held-out text is scored, and what is generated.

    Every scored window is the beginning of one held-out document; the documents are spread evenly
    over the evaluation split. The same tokens are scored by one teacher-forced forward and by
    single-token steps through the cache.

    Attributes:
      windows: documents scored; 0 means every held-out document.
      window: tokens of each document that are read; the first one, bos, is only context.
      batch_size: windows that go through the model together.
      prompt: text which the sample continues.
      sample_tokens: tokens generated for the sample; 0 generates none.
      temperature: of the sample; 0 always takes the likeliest token.
      top_k: the sample draws among this many likeliest tokens; 0 draws among all.

    Raises:
      ValueError: if a size is out of range.
    """

    windows: int = 16
    window: int = 1024
    batch_size: int = 16
    prompt: str = "My fellow citizens, the state of the Union"
    sample_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 40

    def __post_init__(self) -> None:
        for name, least in (
            ("windows", 0),
            ("window", 8),
            ("batch_size", 1),
            ("sample_tokens", 0),
            ("top_k", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"evaluation.{name}={getattr(self, name)} must be at least {least}"
                )
        if self.temperature < 0:
            raise ValueError(f"evaluation.temperature={self.temperature} must not be negative")
        if self.sample_tokens and not self.prompt:
            raise ValueError(
                "evaluation.prompt is empty; give the sample a beginning or set "
                "evaluation.sample-tokens 0"
            )
