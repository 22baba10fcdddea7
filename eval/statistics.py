"""Streaming mean and covariance of feature vectors, in float64 and mergeable.

The state is (count, mean, scatter): a batch, a rank's share, or a stored reference set are all merged by the same
pairwise update (Chan, Golub & LeVeque 1983, Eq. 2.1), so memory is O(D^2) and the result does not depend on how the
data was split, up to float64 rounding.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.errors import EvalError


@dataclass
class FeatureStatistics:
    """Running Gaussian statistics of one feature network's output.

    Attributes:
        network: name of the feature network, for example ``digits-cnn``; distances between different networks are
            refused.
        fingerprint: hash of that network's weights; two networks of one name but other weights do not mix either.
        count: feature vectors seen so far.
        mean: (D,) float64, their mean.
        scatter: (D, D) float64, the sum of (f - mean)(f - mean)^T.
    """

    network: str
    fingerprint: str = ""
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def update(self, features: Tensor) -> None:
        """Adds a batch of features, shape (B, D), any float type and device.

        Raises:
            EvalError: if a feature is not finite, which would turn every later figure into NaN.
        """
        values = features.detach().to(device="cpu", dtype=torch.float64)  # (B, D)
        if values.ndim != 2:
            raise ValueError(f"features must be (B, D), got shape {tuple(values.shape)}")
        if values.shape[0] == 0:
            return
        if not bool(torch.isfinite(values).all()):
            raise EvalError(f"{self.network}: features hold NaN or infinity; look at the pictures given to it")
        mean = values.mean(dim=0)  # (D,)
        centred = values - mean  # (B, D)
        self._add(values.shape[0], mean, centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds another rank's (or chunk's) statistics to these.

        Raises:
            EvalError: if the other statistics came from another network.
        """
        require_same_network(self, other)
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"features have {mean.shape[0]} dimensions, the statistics {self.mean.shape[0]}")
        total = self.count + count
        delta = mean - self.mean  # (D,)
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """The unbiased sample covariance, (D, D) float64.

        Raises:
            EvalError: with fewer than two feature vectors.
        """
        if self.count < 2:
            raise EvalError(f"{self.network}: a covariance needs at least 2 pictures, got {self.count}")
        return self.scatter / (self.count - 1)

    def save(self, path: Path) -> None:
        """Writes the statistics as a new safetensors file.

        Raises:
            EvalError: if the file exists.
        """
        if path.exists():
            raise EvalError(f"{path} exists and is never overwritten; give another name or move it away")
        tensors = {"mean": self.mean, "scatter": self.scatter.contiguous()}
        metadata = {"network": self.network, "fingerprint": self.fingerprint, "count": str(self.count)}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> "FeatureStatistics":
        """Reads statistics that `save` wrote.

        Raises:
            EvalError: if the file is missing or is not such a file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                return cls(
                    network=metadata["network"],
                    fingerprint=metadata["fingerprint"],
                    count=int(metadata["count"]),
                    mean=file.get_tensor("mean"),
                    scatter=file.get_tensor("scatter"),
                )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise EvalError(f"{path}: not readable as feature statistics ({error}); compute them again") from None


def require_same_network(first: FeatureStatistics, second: FeatureStatistics) -> None:
    """Refuses to mix features of different networks.

    Raises:
        EvalError: naming both networks.
    """
    if (first.network, first.fingerprint) != (second.network, second.fingerprint):
        raise EvalError(
            f"statistics of {first.network} ({first.fingerprint[:12]}) and {second.network} "
            f"({second.fingerprint[:12]}) cannot be compared; compute both with one network"
        )
