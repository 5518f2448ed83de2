"""Weights of torchvision that a backbone starts from: a file that is there, or ImageNet's."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import torch
import torchvision  # type: ignore[import-untyped]

from heed_core.errors import InputError, reason_of

logger = logging.getLogger(__name__)

BackboneWeights = Literal["imagenet"] | Path | None
"""What settings name: torchvision's weights of ImageNet, a file, or a random start."""

_RELEASE = "IMAGENET1K_V1"
"""The first weights of every network, which the papers had; later ones are for other recipes."""


def weights_file(named: Literal["imagenet"] | Path, backbone: str) -> Path:
    """The file that the weights of a backbone are in.

    Those of ImageNet are taken from the folder of torch.hub. Only where they are not in it yet are
    they downloaded, since somebody asked for them by name.

    Args:
        named: `imagenet`, or the file itself.
        backbone: The network, as torchvision calls it.

    Raises:
        InputError: torchvision has no such network, or its weights cannot be downloaded.
    """
    if named != "imagenet":
        return named
    release = _releases(backbone).get(_RELEASE)
    if release is None:
        raise InputError(
            f"torchvision has no weights of ImageNet for the backbone {backbone}",
            remedy="leave --training.backbone-weights out, or name a file",
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / _name(release)
    if path.is_file():
        return path
    logger.info("downloading %s to %s", release.url, path)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            release.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot be downloaded ({reason_of(error)})",
            path=release.url,
            remedy=f"put the file at {path}, or name it with --training.backbone-weights",
        ) from None
    return path


def of_imagenet(named: BackboneWeights, backbone: str) -> bool:
    """Whether weights are those of ImageNet: by that name, or a file of torchvision's name."""
    if not isinstance(named, Path):
        return named == "imagenet"
    return named.name in {_name(release) for release in _releases(backbone).values()}


def _releases(backbone: str) -> dict[str, torchvision.models.WeightsEnum]:
    """The weights of a network by name; none of a network that is not torchvision's."""
    if backbone not in torchvision.models.list_models():
        return {}
    return {item.name: item for item in torchvision.models.get_model_weights(backbone)}


def _name(release: torchvision.models.WeightsEnum) -> str:
    return Path(urlparse(release.url).path).name
