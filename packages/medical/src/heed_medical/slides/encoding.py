"""Features of tiles by a frozen encoder: a program of torch.export, or a model of timm."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from heed_core.checkpoints import read_state
from heed_core.errors import InputError, MissingExtra, reason_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, which most encoders of histology were trained with."""

Network = Callable[[Float[Tensor, "b 3 h w"]], Tensor]


class Encoder:
    """Makes a feature vector of each tile.

    Args:
        network: Pictures (b, 3, h, w) to features (b, d), or to maps whose positions are averaged.
        mean: Of the colour channels (0..1), subtracted first.
        std: Of the colour channels.
        device: Where the network is.
    """

    def __init__(
        self,
        network: Network,
        *,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        device: str = "cpu",
    ) -> None:
        self.network, self.device = network, device
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def __call__(self, tiles: UInt8[np.ndarray, "b h w 3"]) -> Float16[np.ndarray, "b d"]:
        """The features of some tiles.

        Raises:
            InputError: The network does not take the tiles or gives no vector per tile.
        """
        pixels = torch.from_numpy(tiles).to(self.device).permute(0, 3, 1, 2).float() / 255
        try:
            found = self.network((pixels - self._mean) / self._std)
        except (RuntimeError, AssertionError) as error:
            reason = reason_of(error)
            raise InputError(
                f"the encoder does not take {len(tiles)} tiles of {tiles.shape[1]} pixels "
                f"({reason})",
                remedy="set --tiling.tile, or export it with a free batch axis",
            ) from None
        if isinstance(found, Tensor) and found.ndim == 4:
            found = found.mean(dim=(2, 3))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(tiles):
            raise InputError("the encoder does not give one vector per tile")
        return np.asarray(found.float().cpu().numpy().astype(np.float16))


def load_encoder(name: str, *, weights: Path | None = None, device: str = "cpu") -> Encoder:
    """Load an encoder.

    Args:
        name: A `.pt2` file of `torch.export.save`, or the name of a timm model.
        weights: State dict of the timm model; None: freshly initialised, from a fixed seed.
            Nothing is downloaded.
        device: Where it computes.

    Raises:
        InputError: No such file or model, or weights of another network.
        MissingExtra: A timm model without timm.
    """
    if name.endswith(".pt2"):
        if weights is not None:
            raise InputError("holds its own weights", path=name, remedy="leave the weights out")
        return Encoder(_exported(Path(name), device), device=device)
    return _timm_encoder(name, weights, device)


def _exported(path: Path, device: str) -> Network:
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="give a .pt2 of torch.export.save")
    try:
        network = torch.export.load(path).module()
    except Exception as error:  # the loader lets anything escape from a damaged file
        reason = reason_of(error)
        raise InputError(f"is not a program of torch.export ({reason})", path=path) from None
    return network.to(device)


def _timm_encoder(name: str, weights: Path | None, device: str) -> Encoder:
    try:
        import timm
    except ImportError:
        raise MissingExtra("timm", "heed-medical[encoders]") from None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names
        torch.manual_seed(0)
        try:
            network = timm.create_model(name, pretrained=False, num_classes=0)
        except RuntimeError:
            near = ", ".join(timm.list_models(f"{name[:4]}*")[:5]) or "resnet18"
            raise InputError(
                f"timm has no model {name!r}",
                remedy=f"give a .pt2 file or one of timm's, such as {near}",
            ) from None
    if weights is not None:
        known = set(network.state_dict())
        found = {key: value for key, value in read_state(weights).items() if key in known}
        missing = sorted(known - set(found))
        if missing:
            raise InputError(
                f"lacks {len(missing)} tensors of {name} ({', '.join(missing[:3])}, ...)",
                path=weights,
            )
        network.load_state_dict(found)
    config = cast(dict[str, tuple[float, ...]], network.pretrained_cfg)
    return Encoder(
        network.eval().to(device),
        mean=tuple(config.get("mean", MEAN)),
        std=tuple(config.get("std", STD)),
        device=device,
    )
