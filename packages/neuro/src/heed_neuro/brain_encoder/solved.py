"""Encoders that are solved, not trained: ridge regression on a frozen network's features.

| encoder | features |
| --- | --- |
| ridge, all tokens | every channel of every token, by products of images |
| ridge, mean token | mean over tokens (of a class token, that token) |
| PCA + regression | principal components of all tokens, then least squares |

Means, scales and components are those of the training images alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heed_neuro.ridge import (
    RidgeOptions,
    Rows,
    kernel_ridge_predict,
    linear_kernel,
    moments,
    ridge_cv,
    standardised,
)


class Flat:
    """Some images of a feature table as rows (images, tokens x channels), read in pieces."""

    def __init__(self, table: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.table = table.reshape(len(table), -1)
        self.rows = np.arange(len(table)) if rows is None else rows
        self.shape = (len(self.rows), self.table.shape[1])

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        return np.asarray(self.table[:, columns][self.rows[rows]], dtype=np.float32)


def ridge_all_tokens(
    train: Rows, y: Rows, test: Rows, options: RidgeOptions, *, block: int = 8192
) -> Float[Tensor, "m t"]:
    """Predictions of ridge regression on z-scored features of all tokens."""
    mean, std = moments(train, block=block)
    kernel = linear_kernel(train, train, mean=mean, std=std, block=block)
    new = linear_kernel(test, train, mean=mean, std=std, block=block)
    # Per feature, so that one grid of penalties serves any number of them.
    size = max(1, int((std > 0).sum()))
    return kernel_ridge_predict(kernel / size, y, new / size, options)[0]


def ridge_mean_token(
    train: Float[np.ndarray, "n h w c"],
    y: Rows,
    test: Float[np.ndarray, "m h w c"],
    options: RidgeOptions,
) -> Float[Tensor, "m t"]:
    """Predictions of ridge regression on the z-scored mean token."""
    own, new = (np.asarray(x, dtype=np.float32).mean(axis=(1, 2)) for x in (train, test))
    mean, std = moments(own)
    x = standardised(own, mean, std, torch.float32)
    return ridge_cv(x, y, options).predict(standardised(new, mean, std, torch.float32))


def pca_regression(
    train: Rows, y: Rows, test: Rows, *, components: int, options: RidgeOptions, block: int = 8192
) -> Float[Tensor, "m t"]:
    """Predictions of least squares on principal components of all tokens.

    The components are those of the training images, from their products (n x n).
    """
    mean, std = moments(train, block=block)
    kernel = linear_kernel(train, train, mean=mean, std=std, block=block).double()
    new = linear_kernel(test, train, mean=mean, std=std, block=block).double()
    values, vectors = torch.linalg.eigh(kernel)
    count = min(components, int((values > 1e-9 * values[-1]).sum()))
    values, vectors = values[-count:], vectors[:, -count:]
    scores, new_scores = vectors, new @ vectors / values  # both in units of the training scores
    found = []
    for start in range(0, y.shape[1], options.targets_batch):
        part = torch.from_numpy(np.array(y[:, start : start + options.targets_batch])).double()
        centre = part.mean(0)
        found.append((new_scores @ (scores.T @ (part - centre)) + centre).float())
    return torch.cat(found, dim=1)


def gather_targets(tables: Sequence[np.ndarray]) -> np.ndarray:
    """The responses of all groups side by side, (images, vertices)."""
    return np.concatenate([np.asarray(table, dtype=np.float32) for table in tables], axis=1)
