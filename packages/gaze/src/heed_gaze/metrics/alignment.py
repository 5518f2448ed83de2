"""Alignments of many pairs of sequences at once, by dynamic programming along anti-diagonals.

All pairs of a batch are padded to one length; a cell of the table depends on smaller indices only,
so padding never reaches the cells that are read. Time O(p n m), of which O(n + m) steps are
sequential; memory O(p n m).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64, Num

Lengths = Int64[np.ndarray, " p"]
_CELLS = 4_000_000
"""Of the tables that are held at once."""


def pad(
    sequences: Sequence[Num[np.ndarray, "_ ..."]],
) -> tuple[Float64[np.ndarray, "p n ..."], Lengths]:
    """Sequences of different lengths as one array, filled up with zeros, and their lengths.

    Raises:
        ValueError: There is none.
    """
    if not sequences:
        raise ValueError("there must be at least one sequence")
    lengths = np.array([len(one) for one in sequences], dtype=np.int64)
    shape = (len(sequences), int(lengths.max()), *sequences[0].shape[1:])
    padded = np.zeros(shape, dtype=np.float64)
    for row, one in zip(padded, sequences, strict=True):
        row[: len(one)] = one
    return padded, lengths


def batches(first: Sequence[object], second: Sequence[object]) -> Iterator[Int64[np.ndarray, " b"]]:
    """Indices of pairs in batches of about equal lengths, so that little is padding.

    Raises:
        ValueError: Other numbers of first and second ones.
    """
    sizes = np.array([[len(a), len(b)] for a, b in zip(first, second, strict=True)])  # type: ignore[arg-type]
    if not len(sizes):
        return
    sizes = np.maximum(sizes.reshape(-1, 2), 1)
    order = np.lexsort((sizes[:, 1], sizes[:, 0]))
    start = 0
    while start < len(order):
        cells = np.maximum.accumulate(sizes[order[start:]], axis=0).prod(axis=1)
        count = np.arange(1, len(cells) + 1)
        fits = int(np.searchsorted(cells * count, _CELLS, side="right"))
        yield order[start : start + max(fits, 1)]
        start += max(fits, 1)


def in_batches(
    score: Callable[[list[np.ndarray], list[np.ndarray]], Float64[np.ndarray, "b ..."]],
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    defined: Bool[np.ndarray, " p"],
    columns: int | None = None,
) -> Float64[np.ndarray, "p ..."]:
    """Score pairs batch by batch; NaN where a score is not defined.

    Args:
        score: Of a batch of pairs.
        first: Sequences.
        second: Sequences, as many.
        defined: The pairs to score.
        columns: Numbers per score; None: one number, without an axis of its own.
    """
    shape = (len(first),) if columns is None else (len(first), columns)
    scores = np.full(shape, np.nan)
    chosen: list[int] = np.flatnonzero(defined).tolist()
    for batch in batches([first[k] for k in chosen], [second[k] for k in chosen]):
        rows = [chosen[k] for k in batch]
        scores[rows] = score([first[k] for k in rows], [second[k] for k in rows])
    return scores


def _skewed(table: Float64[np.ndarray, "p n m"], fill: float) -> Float64[np.ndarray, "d p n"]:
    """Row d holds the cells (i, d - i) of the table at [i]."""
    pairs, n, m = table.shape
    out = np.full((n + m - 1, pairs, n), fill)
    for i in range(n):
        out[i : i + m, :, i] = table[:, i, :].T
    return out


def warp(cost: Float64[np.ndarray, "p n m"]) -> Float64[np.ndarray, "d p n"]:
    """Cheapest way from (0, 0) to every cell by steps right, down or both.

    A way costs the sum of its cells: D[i, j] = c[i, j] + min(D[i-1, j], D[i, j-1], D[i-1, j-1]).

    Args:
        cost: Of the cells, not negative.

    Returns:
        D[i, j] of every pair at [i + j, pair, i]; infinite outside the table.
    """
    skewed = _skewed(cost, np.inf)
    total = np.full_like(skewed, np.inf)
    total[0] = skewed[0]
    for d in range(1, len(skewed)):
        best = total[d - 1].copy()
        best[:, 1:] = np.minimum(best[:, 1:], total[d - 1][:, :-1])
        if d > 1:
            best[:, 1:] = np.minimum(best[:, 1:], total[d - 2][:, :-1])
        total[d] = best + skewed[d]
    return total


def warp_cost(
    total: Float64[np.ndarray, "d p n"], first: Lengths, second: Lengths
) -> Float64[np.ndarray, " p"]:
    """Cost of the cheapest way to the last cell of each pair."""
    pairs = np.arange(total.shape[1])
    return np.asarray(total[first + second - 2, pairs, first - 1])


def warp_path(
    total: Float64[np.ndarray, "d p n"], first: Lengths, second: Lengths
) -> tuple[Int64[np.ndarray, "p s"], Int64[np.ndarray, "p s"], Bool[np.ndarray, "p s"]]:
    """The cells (i, j) of the cheapest way, from the last to (0, 0), and which of them are real.

    Of equally cheap steps the one along the diagonal is taken.
    """
    pairs = np.arange(total.shape[1])
    i, j = first - 1, second - 1
    rows, columns, real = [i], [j], [np.ones(len(pairs), dtype=bool)]
    for _ in range(int((first + second).max()) - 2):
        going = (i > 0) | (j > 0)
        options = np.stack(
            [
                _cell(total, pairs, i - 1, j - 1),
                _cell(total, pairs, i - 1, j),
                _cell(total, pairs, i, j - 1),
            ]
        )
        step = options.argmin(axis=0)
        i = np.where(going & (step != 2), i - 1, i)
        j = np.where(going & (step != 1), j - 1, j)
        rows.append(i)
        columns.append(j)
        real.append(going)
    return np.stack(rows, axis=1), np.stack(columns, axis=1), np.stack(real, axis=1)


def _cell(
    total: Float64[np.ndarray, "d p n"],
    pairs: Int64[np.ndarray, " p"],
    i: Int64[np.ndarray, " p"],
    j: Int64[np.ndarray, " p"],
) -> Float64[np.ndarray, " p"]:
    inside = (i >= 0) & (j >= 0)
    values = total[np.where(inside, i + j, 0), pairs, np.where(inside, i, 0)]
    return np.asarray(np.where(inside, values, np.inf))


def needleman_wunsch(
    score: Float64[np.ndarray, "p n m"],
    first: Lengths,
    second: Lengths,
    *,
    gap: float = 0.0,
    corner: float = 0.0,
    best_anywhere: bool = False,
) -> Float64[np.ndarray, " p"]:
    """Score of the best global alignment (Needleman and Wunsch, 1970).

    D[i, j] = max(D[i-1, j-1] + s[i, j], D[i-1, j] + gap, D[i, j-1] + gap), with borders
    D[i, 0] = D[0, i] = corner + i gap.

    Args:
        score: Of putting symbol i of the first beside symbol j of the second.
        first: Lengths.
        second: Lengths.
        gap: Added for a symbol that is beside nothing.
        corner: D[0, 0].
        best_anywhere: Give the largest value of the table, not the last.
    """
    pairs, n, m = score.shape
    inner = np.pad(score, ((0, 0), (1, 0), (1, 0)))
    skewed = _skewed(inner, -np.inf)  # (d, p, n + 1)
    total = np.full_like(skewed, -np.inf)
    total[0, :, 0] = corner
    i = np.arange(n + 1)
    for d in range(1, len(skewed)):
        value = total[d - 1] + gap
        value[:, 1:] = np.maximum(value[:, 1:], total[d - 1][:, :-1] + gap)
        if d > 1:
            value[:, 1:] = np.maximum(value[:, 1:], total[d - 2][:, :-1] + skewed[d][:, 1:])
        value[:, (i > d) | (d - i > m)] = -np.inf
        total[d] = value
    every = np.arange(pairs)
    if not best_anywhere:
        return np.asarray(total[first + second, every, first])
    j = np.arange(len(total))[:, None, None] - i
    inside = (i <= first[None, :, None]) & (j <= second[None, :, None])
    return np.asarray(np.where(inside, total, -np.inf).max(axis=(0, 2)))
