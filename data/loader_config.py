"""The `data` part of a training recipe. See docs/data.md and docs/order.md."""

from dataclasses import dataclass

from data.buckets import BucketConfig, make_buckets
from data.captions import CaptionConfig
from data.filters import FilterRule
from data.transforms import Crop


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """One data set of several."""

    shards: str  # address of the data set
    weight: float = 1.0  # its share of the samples, relative to the others' weights

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight={self.weight}: must be above 0; leave the data set out instead")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What a run reads and how."""

    shards: str | None = None  # address of the data set, unless mix names several
    mix: tuple[MixConfig, ...] = ()  # data sets, each with epochs of its own. Changes the order
    image_size: int  # px, side of the square training image, or of the square whose area a bucket keeps
    buckets: BucketConfig | None = None  # several shapes instead of one square. Changes the order
    captions: CaptionConfig = CaptionConfig()  # which of a sample's captions
    filters: tuple[FilterRule, ...] = ()  # samples must pass all of them. Changes the order
    num_workers: int = 0  # reader processes per rank; 0 = the rank's own process. Does not change the order
    num_streams: int = 8  # logical streams; ranks x workers must divide it. Changes the order
    shuffle_block_shards: int = 4  # shards shuffled together. Changes the order
    shuffle_chunk_samples: int = 512  # samples of each of them that are shuffled at a time. Changes the order
    window_micro_batches: int = 64  # over which buckets and mixes come out even. Changes the order
    crop: Crop = "centre"  # which part of a picture that has another shape
    max_bad_fraction: float = 0.01  # share of unusable samples above which training stops, [0, 1]

    def __post_init__(self) -> None:
        least = {"image_size": 1, "num_workers": 0, "num_streams": 1, "shuffle_block_shards": 1}
        for name, value in {**least, "shuffle_chunk_samples": 1, "window_micro_batches": 1}.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {value}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: is a share; give a number from 0 to 1")
        if (self.shards is None) == (not self.mix):
            raise ValueError("give either shards, the address of the data set, or mix, a list of several")
        make_buckets(self.image_size, self.buckets)

    @property
    def sources(self) -> tuple[MixConfig, ...]:
        """The data sets, one or several."""
        return self.mix or (MixConfig(shards=self.shards or ""),)
