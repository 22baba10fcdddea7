"""The Fréchet distance between two Gaussians fitted to features.

d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))   (Dowson & Landau 1982; Eq. 6 of arXiv:1706.08500)

The trace of the root needs no matrix root: with S_1 = L L^T, the eigenvalues of S_1 S_2 are those of the symmetric
matrix L^T S_2 L, and the trace is the sum of their square roots. A Cholesky factor and one symmetric eigenvalue problem
cost an order of magnitude less than a general matrix root. Symmetry matters: a symmetric eigenvalue routine on the
unsymmetrised S_1 S_2 reads one triangle of it and answers wrongly.
"""

import torch
from torch import Tensor

from eval.errors import EvalError
from eval.statistics import FeatureStatistics, require_same_network


def trace_of_product_root(covariance_1: Tensor, covariance_2: Tensor) -> float:
    """tr((S_1 S_2)^(1/2)) of two symmetric positive semi-definite (D, D) float64 matrices."""
    factor, info = torch.linalg.cholesky_ex(covariance_1)
    if int(info) != 0:  # singular: fewer pictures than dimensions, or a dead feature
        eigenvalues, vectors = torch.linalg.eigh(covariance_1)
        factor = vectors * eigenvalues.clamp(min=0).sqrt()  # (D, D), again S_1 = factor factor^T
    product = factor.T @ covariance_2 @ factor  # (D, D), symmetric up to rounding
    product = (product + product.T) / 2
    # The true eigenvalues are >= 0; rounding leaves tiny negative ones whose root would be NaN.
    return float(torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum())


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The squared Fréchet distance d^2 between the Gaussians fitted to two sets of features.

    Under the FID's own Inception weights this is the FID; under any other network it is reported as
    ``FD-<network>`` (see `metric_name`).

    Raises:
        EvalError: if the two sets come from different networks, or a set has fewer than two pictures.
    """
    require_same_network(first, second)
    if first.mean.shape != second.mean.shape:
        raise EvalError(f"{first.network}: {first.mean.numel()} and {second.mean.numel()} dimensions do not compare")
    covariance_1, covariance_2 = first.covariance(), second.covariance()
    difference = first.mean - second.mean  # (D,)
    traces = float(torch.trace(covariance_1) + torch.trace(covariance_2))
    distance = float(difference @ difference) + traces - 2 * trace_of_product_root(covariance_1, covariance_2)
    return max(distance, 0.0)  # equal sets may round to -1e-13


def metric_name(network: str) -> str:
    """The key under which a distance is stored: ``fd_digits_cnn`` for the network ``digits-cnn``."""
    return "fd_" + network.replace("-", "_")
