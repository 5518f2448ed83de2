"""Regions of the cortex as masks over vertices: names, order, clusters, overlaps.

The names and their order are those of the Algonauts 2023 challenge (Gifford et al., arXiv
2301.03198); 24 named regions and the rest make the 25 of each hemisphere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "prf-visualrois": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"),
    "floc-bodies": ("EBA", "FBA-1", "FBA-2", "mTL-bodies"),
    "floc-faces": ("OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"),
    "floc-places": ("OPA", "PPA", "RSC"),
    "floc-words": ("OWFA", "VWFA-1", "VWFA-2", "mfs-words", "mTL-words"),
}
"""File name of a family -> its regions, in the order of the queries."""

STREAMS = (
    "early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal",
)  # fmt: skip
"""The regions of the family `streams`."""

CLUSTERS: Mapping[str, tuple[str, ...]] = {
    "visual": FAMILIES["prf-visualrois"],
    "bodies": FAMILIES["floc-bodies"],
    "faces": FAMILIES["floc-faces"],
    "places": FAMILIES["floc-places"],
    "words": FAMILIES["floc-words"],
}
"""What results are summed up by."""

REST = "rest"
"""The vertices that no named region has."""


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Named sets of the vertices of one group (a hemisphere); every vertex is in at least one."""

    names: tuple[str, ...]
    members: Bool[np.ndarray, "r v"]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.members) or len(set(self.names)) < len(self.names):
            raise ValueError("regions must have a mask and a name of its own each")
        if not self.members.any(axis=0).all():
            raise ValueError("every vertex must be in a region; add the rest")

    @property
    def vertices(self) -> int:
        """How many there are."""
        return int(self.members.shape[1])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Vertices of each region."""
        return tuple(int(n) for n in self.members.sum(axis=1))

    @property
    def overlap(self) -> int:
        """The most regions that one vertex is in."""
        return int(self.members.sum(axis=0).max(initial=1))

    @property
    def fingerprint(self) -> str:
        """Of names and masks: two brains have two."""
        digest = hashlib.sha256("|".join(self.names).encode())
        digest.update(np.packbits(self.members).tobytes())
        return digest.hexdigest()[:16]


def with_rest(named: Mapping[str, Bool[np.ndarray, " v"]], vertices: int) -> Regions:
    """The named regions, and the rest as the last one; it may be empty."""
    masks = [np.asarray(mask, dtype=bool) for mask in named.values()]
    members = np.stack(masks) if masks else np.zeros((0, vertices), dtype=bool)
    rest = np.logical_not(np.any(members, axis=0))
    return Regions(names=(*named, REST), members=np.concatenate([members, rest[None]]))


def whole(vertices: int) -> Regions:
    """One region of all vertices."""
    return Regions(names=("all",), members=np.ones((1, vertices), dtype=bool))


def places(regions: Regions) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, "k v"]]:
    """Pairs of region and vertex sorted by region, and where each vertex finds its own.

    Returns:
        The vertex of each pair; for each vertex the numbers of its pairs, filled up with the
        number of pairs (which is no pair).
    """
    _, vertex = np.nonzero(regions.members)
    order = np.argsort(vertex, kind="stable")
    counts = np.bincount(vertex, minlength=regions.vertices)
    found = np.full((regions.overlap, regions.vertices), len(vertex), dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.arange(len(vertex)) - starts[vertex[order]]
    found[rank, vertex[order]] = order
    return vertex.astype(np.int64), found


def reported(
    regions: Regions, clusters: Mapping[str, Sequence[str]] = CLUSTERS
) -> dict[str, Bool[np.ndarray, " v"]]:
    """What results are given for: each region that has vertices, and the clusters of them."""
    found = dict(zip(regions.names, regions.members, strict=True))
    for cluster, names in clusters.items():
        masks = [found[name] for name in names if name in found]
        if masks:
            found[f"cluster {cluster}"] = np.any(masks, axis=0)
    return {name: mask for name, mask in found.items() if mask.any()}


def overlap_weights(regions: Regions, how: str) -> Float[np.ndarray, " v"]:
    """What the sum over a vertex's regions is multiplied by: 1 ("sum") or 1 / their number."""
    counts = regions.members.sum(axis=0)
    return np.asarray(1.0 / counts if how == "mean" else np.ones(len(counts)), dtype=np.float32)
