"""Ridge regression of many targets, each with its own penalty, in bounded memory.

    W = (X^T X + alpha I)^-1 X^T Y = X^T (X X^T + alpha I)^-1 Y

The smaller of the two matrices is decomposed once per fold; then each penalty and each batch of
targets costs two products. Penalties are chosen by cross-validation per target (or for all), by the
mean squared error of the held-out rows, and where scores are equal the larger one. X and Y are
centred by the means of the rows that are fitted, never scaled.

The conventions are those of himalaya (la Tour et al., NeuroImage 264, 2022): alpha is added to
X^T X, not multiplied by the number of rows; folds are contiguous. himalaya itself, whose numbers
the tests compare and whose speed `heed-neuro bench` compares, wants all targets in memory at once
and decomposes anew at each call; here targets stay in their memory-mapped file but for one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ALPHAS = tuple(float(10.0**power) for power in range(-2, 9))
"""The penalties that are tried by default."""

Split = tuple[np.ndarray, np.ndarray]
"""Rows that are fitted, rows that are held out."""


@runtime_checkable
class Rows(Protocol):
    """A table that can be cut: an array, a memory-mapped file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, then columns."""

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class RidgeOptions:
    """How penalties are chosen, and how much is computed at once."""

    alphas: tuple[float, ...] = ALPHAS
    folds: int = 5
    """Of the cross-validation; contiguous, the first n mod folds have one row more."""
    intercept: bool = True
    per_target: bool = True
    """A penalty for each target; else one for all, by the mean of their scores."""
    targets_batch: int = 4096
    """Targets that are solved together."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.alphas or min(self.alphas) <= 0:
            raise ValueError(f"alphas must be numbers above 0, got {self.alphas}")
        if self.folds < 2 or self.targets_batch < 1:
            raise ValueError(
                f"folds must be at least 2 and targets_batch at least 1, got {self.folds} and "
                f"{self.targets_batch}"
            )


@dataclass(frozen=True, kw_only=True)
class RidgeFit:
    """A fitted regression."""

    coef: Float[Tensor, "p t"]
    intercept: Float[Tensor, " t"]
    alphas: Float[Tensor, " t"]
    """The penalty of each target."""
    scores: Float[Tensor, "a t"]
    """Mean over folds of the negative mean squared error, by penalty and target."""

    def predict(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n t"]:
        """The targets of new rows."""
        return x @ self.coef + self.intercept


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One fold, decomposed: solution = basis (L Y_c) / (values + alpha)."""

    values: Tensor
    basis: Tensor
    left: Tensor
    """L (k, n): from centred targets to coordinates."""
    held: Tensor | None
    """From coordinates to the held-out rows."""
    train: Tensor


def contiguous_splits(rows: int, folds: int) -> list[Split]:
    """Rows in order, cut in `folds` parts, each held out once."""
    if rows < folds:
        raise ValueError(f"folds must be at most the number of rows, {rows}, got {folds}")
    parts = np.array_split(np.arange(rows), folds)
    return [(np.concatenate([*parts[:k], *parts[k + 1 :]]), parts[k]) for k in range(folds)]


def ridge(
    x: Float[Tensor, "n p"],
    y: Float[Tensor, "n t"],
    alphas: Float[Tensor, " t"],
    *,
    intercept: bool = False,
) -> RidgeFit:
    """Ridge regression with a given penalty for each target."""
    part = _decompose(x, np.arange(len(x)), None, intercept)
    mean = y.mean(0) if intercept else torch.zeros_like(y[0])
    coef = _coefficients(x, part, part.left @ (y - mean), alphas, intercept)
    shift = mean - x.mean(0) @ coef if intercept else mean
    return RidgeFit(coef=coef, intercept=shift, alphas=alphas, scores=y.new_zeros(0, y.shape[1]))


def ridge_cv(
    x: Float[Tensor, "n p"],
    y: Rows,
    options: RidgeOptions | None = None,
    *,
    splits: Sequence[Split] | None = None,
) -> RidgeFit:
    """Ridge regression with penalties chosen by cross-validation.

    Args:
        x: Features; computed in their type.
        y: Targets (n, t), read in batches of columns.
        options: Penalties, folds, sizes.
        splits: Folds to use instead of contiguous ones.
    """
    options = RidgeOptions() if options is None else options
    x = x.to(options.device)
    splits = contiguous_splits(len(x), options.folds) if splits is None else splits
    parts = [_decompose(x, train, held, options.intercept) for train, held in splits]
    scores = _scores(parts, splits, y, options, x.dtype)
    alphas = choose_alphas(scores, options)
    whole = _decompose(x, np.arange(len(x)), None, options.intercept)
    coefs, shifts = [], []
    for columns in _batches(y.shape[1], options.targets_batch):
        batch, mean = _centred(y, slice(None), columns, options, x.dtype)
        coef = _coefficients(x, whole, whole.left @ batch, alphas[columns], options.intercept)
        coefs.append(coef.cpu())
        shifts.append((mean - x.mean(0) @ coef if options.intercept else mean).cpu())
    return RidgeFit(
        coef=torch.cat(coefs, dim=1),
        intercept=torch.cat(shifts),
        alphas=alphas.cpu(),
        scores=scores.cpu(),
    )


def kernel_ridge_predict(
    kernel: Float[Tensor, "n n"],
    y: Rows,
    kernel_new: Float[Tensor, "m n"],
    options: RidgeOptions | None = None,
    *,
    splits: Sequence[Split] | None = None,
    centre: bool = True,
) -> tuple[Float[Tensor, "m t"], Float[Tensor, " t"]]:
    """Predictions of ridge regression from products of rows alone, for features without number.

    Args:
        kernel: Products of the rows that are fitted.
        y: Targets (n, t), read in batches of columns.
        kernel_new: Products of new rows with those that are fitted.
        options: Penalties, folds, sizes; `intercept` centres rows and targets.
        splits: Folds to use instead of contiguous ones.
        centre: Whether an intercept centres the kernel (a linear one: yes).

    Returns:
        The predictions, and the penalty of each target.
    """
    options = RidgeOptions() if options is None else options
    kernel, kernel_new = kernel.to(options.device), kernel_new.to(options.device)
    centre = centre and options.intercept
    everything = np.arange(len(kernel))
    splits = contiguous_splits(len(kernel), options.folds) if splits is None else splits
    parts = [
        _decompose_kernel(kernel[train][:, train], kernel[held][:, train], train, centre)
        for train, held in splits
    ]
    alphas = choose_alphas(_scores(parts, splits, y, options, kernel.dtype), options)
    whole = _decompose_kernel(kernel, kernel_new, everything, centre)
    assert whole.held is not None
    found = []
    for columns in _batches(y.shape[1], options.targets_batch):
        batch, mean = _centred(y, slice(None), columns, options, kernel.dtype)
        scaled = (whole.left @ batch) / (whole.values[:, None] + alphas[columns])
        found.append((whole.held @ scaled + mean).cpu())
    return torch.cat(found, dim=1), alphas.cpu()


def choose_alphas(scores: Float[Tensor, "a t"], options: RidgeOptions) -> Float[Tensor, " t"]:
    """The penalty with the best score, per target or for all; the larger of equal ones."""
    alphas = torch.tensor(options.alphas, dtype=scores.dtype, device=scores.device)
    if not options.per_target:
        scores = scores.mean(dim=1, keepdim=True).expand_as(scores)
    return alphas[(scores + 1e-10 * alphas.log()[:, None]).argmax(dim=0)]


def linear_kernel(
    rows: Rows,
    columns: Rows,
    *,
    mean: Float[Tensor, " p"],
    std: Float[Tensor, " p"],
    block: int = 8192,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "n m"]:
    """Products of z-scored rows of two tables, summed over blocks of features.

    Args:
        rows: A table (n, p), such as a memory-mapped file.
        columns: A table (m, p).
        mean: Of each feature, of the rows that are fitted.
        std: Of each feature; features that do not vary (0) are left out.
        block: Features that are in memory at once.
        dtype: Of the products.
    """
    total = torch.zeros(rows.shape[0], columns.shape[0], dtype=dtype)
    same = rows is columns
    for features in _batches(rows.shape[1], block):
        left = standardised(rows[:, features], mean[features], std[features], dtype)
        right = (
            left
            if same
            else standardised(columns[:, features], mean[features], std[features], dtype)
        )
        total += left @ right.T
    return total


def standardised(
    values: Any, mean: Float[Tensor, " p"], std: Float[Tensor, " p"], dtype: torch.dtype
) -> Float[Tensor, "n p"]:
    """(values - mean) / std, and 0 where std is 0."""
    table = torch.from_numpy(np.asarray(values, dtype=np.float32)).to(dtype)
    scale = torch.where(std > 0, 1 / std, torch.zeros_like(std)).to(dtype)
    return (table - mean.to(dtype)) * scale


def moments(rows: Rows, *, block: int = 8192) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Mean and standard deviation (ddof 0) of each feature of a table, in float64."""
    means, stds = [], []
    for features in _batches(rows.shape[1], block):
        part = np.asarray(rows[:, features], dtype=np.float64)
        means.append(part.mean(axis=0))
        stds.append(part.std(axis=0))
    return torch.from_numpy(np.concatenate(means)), torch.from_numpy(np.concatenate(stds))


def _batches(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _decompose(x: Tensor, train: np.ndarray, held: np.ndarray | None, intercept: bool) -> _Part:
    own = x[train]
    mean = own.mean(0) if intercept else torch.zeros_like(own[0])
    own = own - mean
    other = None if held is None else x[held] - mean
    if len(own) < own.shape[1]:
        values, vectors = torch.linalg.eigh(own @ own.T)
        left, basis = vectors.T, vectors
        through = None if other is None else other @ own.T @ vectors
    else:
        values, vectors = torch.linalg.eigh(own.T @ own)
        left, basis = (own @ vectors).T, vectors
        through = None if other is None else other @ vectors
    rows = torch.from_numpy(train)
    return _Part(values=values.clamp(min=0), basis=basis, left=left, held=through, train=rows)


def _decompose_kernel(kernel: Tensor, new: Tensor, train: np.ndarray, centre: bool) -> _Part:
    if centre:
        means = kernel.mean(0)
        new = new - new.mean(1, keepdim=True) - means + means.mean()
        kernel = kernel - means - means[:, None] + means.mean()
    values, vectors = torch.linalg.eigh(kernel)
    return _Part(
        values=values.clamp(min=0),
        basis=vectors,
        left=vectors.T,
        held=new @ vectors,
        train=torch.from_numpy(train),
    )


def _coefficients(
    x: Tensor, part: _Part, coordinates: Tensor, alphas: Tensor, intercept: bool
) -> Tensor:
    solved = part.basis @ (coordinates / (part.values[:, None] + alphas))
    if len(x) >= x.shape[1]:
        return solved
    return (x - x.mean(0) if intercept else x).T @ solved


def _centred(
    y: Rows, rows: Any, columns: slice, options: RidgeOptions, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    found = y[:, columns]
    table = found if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    batch = table.to(dtype=dtype, device=options.device)[rows]
    mean = batch.mean(0) if options.intercept else torch.zeros_like(batch[0])
    return batch - mean, mean


def _scores(
    parts: Sequence[_Part],
    splits: Sequence[Split],
    y: Rows,
    options: RidgeOptions,
    dtype: torch.dtype,
) -> Tensor:
    def of_batch(columns: slice) -> Tensor:
        folds = []
        for part, (_, held) in zip(parts, splits, strict=True):
            batch, mean = _centred(y, part.train, columns, options, dtype)
            wanted, _ = _centred(y, torch.from_numpy(held), columns, _uncentred(options), dtype)
            folds.append(_losses(part, part.left @ batch, wanted - mean, options.alphas))
        return torch.stack(folds).mean(0)

    return _joined(of_batch, y.shape[1], options.targets_batch)


def _losses(part: _Part, coordinates: Tensor, wanted: Tensor, alphas: Sequence[float]) -> Tensor:
    assert part.held is not None
    rows = []
    for alpha in alphas:
        found = part.held @ (coordinates / (part.values[:, None] + alpha))
        rows.append(-(found - wanted).square().mean(0))
    return torch.stack(rows)


def _uncentred(options: RidgeOptions) -> RidgeOptions:
    from dataclasses import replace

    return replace(options, intercept=False)


def _joined(of_batch: Callable[[slice], Tensor], total: int, size: int) -> Tensor:
    return torch.cat([of_batch(columns) for columns in _batches(total, size)], dim=1)
