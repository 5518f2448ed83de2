"""Parts of MoRE for `export` and `bench`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heed_medical.more import More, MoreConfig
from heed_medical.more.network import xray_tower


class Embedder(nn.Module):
    """What is exported of one modality: X-rays or ECGs in, their embeddings out."""

    def __init__(self, model: More, name: str) -> None:
        super().__init__()
        self.tower = getattr(model, name)
        self.projector = model.projectors[name]

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors."""
        return nn.functional.normalize(self.projector(self.tower(x)), dim=1)


class Embedders(nn.Module):
    """What is exported of two modalities."""

    def __init__(self, model: More) -> None:
        super().__init__()
        self.xray, self.ecg = Embedder(model, "xray"), Embedder(model, "ecg")

    def forward(self, xray: Tensor, ecg: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of both."""
        return self.xray(xray), self.ecg(ecg)


def bench_inputs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Random numbers, always the same."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)),)


def bench_tower(config: MoreConfig) -> nn.Module:
    """The X-ray tower."""
    return xray_tower(config)


def timm_tower(config: MoreConfig) -> nn.Module:
    """The vision transformer of timm with the same sizes."""
    from timm.models.vision_transformer import VisionTransformer

    tower = config.tower
    network: nn.Module = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch,
        embed_dim=tower.dim,
        depth=tower.depth,
        num_heads=tower.heads,
        mlp_ratio=tower.hidden / tower.dim,
        qkv_bias=False,
        num_classes=0,
    )
    return network


def is_installed(name: str) -> bool:
    """Whether a library is there."""
    import importlib.util

    return importlib.util.find_spec(name) is not None
