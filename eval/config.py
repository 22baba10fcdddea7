"""The recipe of an evaluation (`kind: eval`)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """The packed sets that an evaluation reads; each a folder of shards, local or s3://."""

    test: str  # held-out pictures and their captions
    train: str | None = None  # real training pictures; the reader is fitted on them
    combinations: str | None = None  # held-out pictures of combinations that training never saw


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """The classifier that reads digit pictures (`eval.digit_reader`)."""

    kind: Literal["digits"] = "digits"  # the embedded sample is the only set a reader is known for
    num_pictures: int = 16384  # real training pictures that it is fitted on
    epochs: int = 2  # passes over them
    batch_size: int = 128  # pictures per optimiser step
    learning_rate: float = 3e-3  # peak of the one-cycle schedule (AdamW)
    seed: int = 0  # of its weights, the order and the shifts

    def __post_init__(self) -> None:
        for name in ("num_pictures", "epochs", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be positive")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvalRecipe:
    """What to measure of a model, and on which data.

    Always measured: reconstruction of held-out pictures by the autoencoder, the validation loss at fixed times, and a
    grid of samples. With `reader` also prompt following and the Fréchet distance under the reader's features.
    """

    model: str  # a run directory, a checkpoint or an artifact, local or s3://
    data: EvalData
    num_prompts: int = 256  # held-out prompts per set, one picture each
    seed: int = 0  # of the choice of prompts; picture i of a set is generated from seed + i
    num_steps: int = 28  # sampler steps per picture
    guidance_scale: float = 4.0  # 1.0 = no guidance
    batch_size: int = 64  # pictures per forward pass
    num_validation: int = 512  # held-out pictures for reconstruction and validation loss
    reader: ReaderConfig | None = field(default=None)  # absent: no prompt following

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_steps", "batch_size", "num_validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} must not be negative")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale: {self.guidance_scale} must not be negative; 1.0 is no guidance")
        if self.reader is not None and self.data.train is None:
            raise ValueError("data.train: missing, but `reader` is fitted on it; name the training shards or drop it")
        if self.reader is None and (self.data.combinations or self.data.train):
            raise ValueError("reader: missing, but only it reads data.train and data.combinations; add `reader: {}`")
