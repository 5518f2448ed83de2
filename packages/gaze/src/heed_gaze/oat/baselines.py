"""Searchers without a network, to compare with: chance, centre, similarity, saliency, Markov.

Each draws scanpaths of objects. Random and centre-biased searchers stop at a length drawn from the
training trials; those by similarity and saliency never look at an object twice and stop at the
target, or at a drawn length where there is none; the Markov chain stops by its own probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Int64, UInt8
from scipy import ndimage  # type: ignore[import-untyped]

from heed_gaze.oat.network import NO_TARGET
from heed_gaze.oat.shelves import Layout, Trial

Weights = Float64[np.ndarray, " _"]
Paths = list[Int64[np.ndarray, " _"]]
_SMOOTHING = 0.1  # added to every count of a transition
_CENTRE_SIGMA = (1.0, 4.0)  # of the surround in cells of 1/64 of the picture


@dataclass(frozen=True, kw_only=True)
class Chain:
    """First-order transitions between the objects of layouts of one grid, and STOP at the end."""

    start: Weights
    move: Float64[np.ndarray, "n n1"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the searchers without a network know of the training trials."""

    lengths: Int64[np.ndarray, " k"]
    """Of the training scanpaths."""
    spread: tuple[float, float]
    """Standard deviation of the fixated centres from the middle, as shares of width and height."""
    chains: Mapping[tuple[int, int, int], Chain] = field(default_factory=dict)
    """(rows, columns, objects) -> its Markov chain."""

    def chain(self, layout: Layout) -> Chain | None:
        """The chain of a layout's grid; None where training had no such grid."""
        return self.chains.get(_grid(layout))


def _grid(layout: Layout) -> tuple[int, int, int]:
    return layout.rows, layout.columns, len(layout)


def learn_reference(trials: Sequence[Trial], layouts: Mapping[str, Layout]) -> Reference:
    """Count what the training trials did."""
    offsets = np.concatenate(
        [
            layouts[t.layout].centres_px[t.objects] / np.array(layouts[t.layout].size_px) - 0.5
            for t in trials
        ]
    )
    x, y = np.sqrt((offsets**2).mean(axis=0)).tolist()
    grids: dict[tuple[int, int, int], list[Trial]] = {}
    for trial in trials:
        grids.setdefault(_grid(layouts[trial.layout]), []).append(trial)
    return Reference(
        lengths=np.array([len(trial.objects) for trial in trials]),
        spread=(max(x, 1e-3), max(y, 1e-3)),
        chains={grid: _learn_chain(members, grid[2]) for grid, members in grids.items()},
    )


def _learn_chain(trials: Sequence[Trial], count: int) -> Chain:
    start = np.full(count, _SMOOTHING)
    move = np.full((count, count + 1), _SMOOTHING)
    for trial in trials:
        start[trial.objects[0]] += 1
        np.add.at(move, (trial.objects[:-1], trial.objects[1:]), 1)
        move[trial.objects[-1], count] += 1
    return Chain(start=start / start.sum(), move=move / move.sum(axis=1, keepdims=True))


def random_paths(
    layout: Layout, reference: Reference, *, samples: int, rng: np.random.Generator
) -> Paths:
    """Objects drawn evenly."""
    return _drawn(np.ones(len(layout)), reference, samples, rng)


def centre_paths(
    layout: Layout, reference: Reference, *, samples: int, rng: np.random.Generator
) -> Paths:
    """Objects drawn from a Gaussian around the middle, as wide as the viewers' fixations."""
    offset = (layout.centres_px / np.array(layout.size_px) - 0.5) / np.array(reference.spread)
    return _drawn(np.exp(-0.5 * (offset**2).sum(axis=1)), reference, samples, rng)


def _drawn(weights: Weights, reference: Reference, samples: int, rng: np.random.Generator) -> Paths:
    lengths = rng.choice(reference.lengths, size=samples)
    share = weights / weights.sum()
    return [rng.choice(len(weights), size=length, p=share) for length in lengths]


def guided_paths(
    weights: Weights,
    target: int,
    reference: Reference,
    *,
    samples: int,
    rng: np.random.Generator,
) -> Paths:
    """Objects drawn by weight, none twice, until the target (or a drawn length) is reached.

    Args:
        weights: Of the objects, not negative.
        target: -1: none.
        reference: Gives the lengths without a target.
        samples: How many paths.
        rng: Draws.
    """
    floor = max(float(weights.max()), 1e-12) * 1e-6
    keys = rng.gumbel(size=(samples, len(weights))) + np.log(np.maximum(weights, floor))
    orders = np.argsort(-keys, axis=1)
    lengths = rng.choice(reference.lengths, size=samples)
    if target != NO_TARGET:
        lengths = (orders == target).argmax(axis=1) + 1
    return [order[:length] for order, length in zip(orders, lengths, strict=True)]


def colour_similarity(crops: UInt8[np.ndarray, "n h w 3"], target: int) -> Weights:
    """exp(-z) with z the mean RGB difference to the target's crop over its mean over objects."""
    small = np.stack([_small(crop) for crop in crops])
    difference = np.abs(small - small[target]).mean(axis=(1, 2, 3))
    others = np.delete(difference, target)
    return np.asarray(np.exp(-difference / max(float(others.mean()), 1e-9)))


def _small(crop: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "_ _ 3"]:
    import cv2

    return cv2.resize(crop, (8, 12), interpolation=cv2.INTER_AREA).astype(np.float64)


def saliency(picture: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "_ _"]:
    """Centre-surround contrast of brightness and two opponent colours, after Itti et al. (1998)."""
    import cv2

    height, width = picture.shape[:2]
    scale = 256 / max(height, width)
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    rgb = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.float64) / 255
    red, green, blue = np.moveaxis(rgb, 2, 0)
    channels = (rgb.mean(axis=2), red - green, blue - (red + green) / 2)
    total = np.zeros(rgb.shape[:2])
    for channel in channels:
        for sigma in _CENTRE_SIGMA:
            fine = ndimage.gaussian_filter(channel, sigma)
            contrast = np.abs(fine - ndimage.gaussian_filter(channel, 5 * sigma))
            total += contrast / max(float(contrast.max()), 1e-9)
    return total / total.sum() if total.sum() > 0 else np.full(total.shape, 1 / total.size)


def object_saliency(picture: UInt8[np.ndarray, "h w 3"], layout: Layout) -> Weights:
    """The mean saliency of each box."""
    values = saliency(picture)
    scale = np.array(values.shape[::-1]) / np.array(layout.size_px)
    corners = np.rint(layout.boxes * np.tile(scale, 2)).astype(int)
    return np.array(
        [
            values[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].mean()
            for x0, y0, x1, y1 in np.clip(corners, 0, np.tile(values.shape[::-1], 2) - 1).tolist()
        ]
    )


def markov_paths(chain: Chain, *, samples: int, max_len: int, rng: np.random.Generator) -> Paths:
    """Paths of a chain, cut at `max_len`."""
    paths: Paths = []
    stop = len(chain.start)
    for _ in range(samples):
        path = [int(rng.choice(stop, p=chain.start))]
        while len(path) < max_len:
            after = int(rng.choice(stop + 1, p=chain.move[path[-1]]))
            if after == stop:
                break
            path.append(after)
        paths.append(np.array(path))
    return paths


def markov_similarity(chain: Chain, objects: Int64[np.ndarray, " t"]) -> float:
    """Mean probability that a chain gave to what a viewer did next, stopping included."""
    after = [*objects[1:].tolist(), len(chain.start)]
    steps = chain.move[objects, after]
    return float(np.append(steps, chain.start[objects[0]]).mean())
