"""Feature networks by name, and the statistics of a set of pictures under one of them."""

from typing import Protocol

import torch
from torch import Tensor

from eval.digit_reader import NETWORK as DIGITS_NETWORK
from eval.digit_reader import DigitReader, require_size
from eval.pictures import to_images
from eval.statistics import FeatureStatistics


class FeatureNetwork(Protocol):
    """What a Fréchet distance is measured under."""

    name: str  # the distance is reported under this name
    fingerprint: str  # of its weights

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, D) of uint8 pictures (B, 3, H, W)."""
        ...


class DigitFeatures:
    """`digits-cnn`: the penultimate layer of a fitted digit reader."""

    def __init__(self, reader: DigitReader) -> None:
        self.name = DIGITS_NETWORK
        self.fingerprint = reader.fingerprint
        self._reader = reader.eval()

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        require_size(pictures)
        return self._reader.features(to_images(pictures))  # (B, 128)


def feature_statistics(network: FeatureNetwork, pictures: Tensor, batch_size: int = 256) -> FeatureStatistics:
    """Mean and covariance of the features of uint8 pictures, (B, 3, H, W)."""
    statistics = FeatureStatistics(network=network.name, fingerprint=network.fingerprint)
    for chunk in pictures.split(batch_size):
        statistics.update(network(chunk))
    return statistics
