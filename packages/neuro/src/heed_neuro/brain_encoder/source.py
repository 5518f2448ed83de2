"""Features of a subject's images: from a cache on disk, or computed by the frozen network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from heed_core.errors import InputError
from heed_neuro.brain_encoder.backbones import (
    WEIGHTS_FLAG,
    Backbone,
    BackboneConfig,
    build_backbone,
)
from heed_neuro.brain_encoder.features import (
    Progress,
    cached,
    compute,
    content_hash,
    describe,
    open_table,
    read_manifest,
)


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """Where features come from.

    A finished cache serves without the network's weights: then its name and layer are compared.
    """

    config: BackboneConfig
    cache: Path | None = None
    """Holds a folder per split. None: features are computed, and kept in memory."""
    device: str = "cpu"

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen network; loads its weights."""
        return _built(self.config)

    def identity(self) -> dict[str, Any]:
        """What tells these features from others.

        Raises:
            InputError: There are neither weights nor a cache.
        """
        manifest = None if self.cache is None else _first_manifest(self.cache)
        if manifest is None or not self._without_weights:
            return self.backbone.identity
        return dict(manifest["backbone"])

    def table(
        self, split: str, images: Sequence[Path], progress: Progress | None = None
    ) -> np.ndarray:
        """Features (images, rows, columns, channels) of the images of a split.

        Raises:
            InputError: An image cannot be read; the cache is of another network or other images.
        """
        if self.cache is None:
            hashes = tuple(content_hash(path) for path in images)
            return _in_memory(self.config, tuple(images), hashes, self.device)
        folder = self.cache / split
        if not self._without_weights:
            return cached(folder, self.backbone, images, device=self.device, progress=progress)
        self._compare(folder, images)
        return open_table(folder)

    def one(self, image: Path) -> tuple[int, int, int]:
        """Rows, columns and channels of the tokens of one image."""
        if self.cache is not None and self._without_weights:
            for folder in sorted(self.cache.iterdir()) if self.cache.is_dir() else []:
                if read_manifest(folder) is not None:
                    _, rows, columns, channels = open_table(folder).shape
                    return rows, columns, channels
        _, rows, columns, channels = compute(self.backbone, [image], device=self.device).shape
        return rows, columns, channels

    def compute(self, images: Sequence[Path]) -> np.ndarray:
        """Features of a few new images, in memory."""
        return compute(self.backbone, images, device=self.device)

    @property
    def _without_weights(self) -> bool:
        needs = self.config.name not in ("pixels", "random_q")
        return needs and self.config.weights is None

    def _compare(self, folder: Path, images: Sequence[Path]) -> None:
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(
                f"holds no features, and {self.config.name} needs its weights to compute them",
                path=folder,
                remedy=f"give {WEIGHTS_FLAG} FOLDER_OR_FILE, or the cache of an earlier call",
            )
        own = {"name": self.config.name, "layer": self.config.layer}
        theirs = {key: manifest["backbone"].get(key) for key in own}
        if own != theirs:
            raise InputError(
                f"holds features of {describe(manifest['backbone'])}, not of {describe(own)}",
                path=folder,
                remedy="choose another cache, or the backbone that made it",
            )
        if manifest["images"] != [content_hash(path) for path in images]:
            raise InputError(
                f"holds features of {len(manifest['images'])} other images",
                path=folder,
                remedy="choose another cache",
            )


def _first_manifest(cache: Path) -> dict[str, Any] | None:
    if not cache.is_dir():
        return None
    found = (read_manifest(folder) for folder in sorted(cache.iterdir()) if folder.is_dir())
    return next((manifest for manifest in found if manifest is not None), None)


@lru_cache(maxsize=2)
def _built(config: BackboneConfig) -> Backbone:
    return build_backbone(config)


@lru_cache(maxsize=2)
def _in_memory(
    config: BackboneConfig, images: tuple[Path, ...], hashes: tuple[str, ...], device: str
) -> np.ndarray:
    """Training and validation ask for the same images one after the other."""
    return compute(_built(config), images, device=device)
