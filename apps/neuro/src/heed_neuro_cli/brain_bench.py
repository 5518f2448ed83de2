"""What `bench` measures: the read-out of 40,000 vertices by 50 queries, and ridge regression."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heed_core.positions import sine_grid
from heed_neuro.brain_encoder.network import BrainEncoder, BrainEncoderConfig, Group
from heed_neuro.ridge import RidgeOptions, ridge_cv
from heed_runtime.recipe import Contender

VERTICES, REGIONS, IMAGES = 20_000, 25, 8
ROWS, FEATURES, TARGETS, FOLDS = 200, 128, 40_000, 5
"""More rows than features, where himalaya's `RidgeCV` is its faster solver too."""
ALPHAS = tuple(float(10.0**power) for power in range(-2, 9))


def contenders() -> list[Contender]:
    """Ours first, then the peers at the same input."""
    tokens = partial(_tokens, IMAGES)
    himalaya = importlib.util.find_spec("himalaya")
    missing = None if himalaya else "himalaya is not installed"
    return [
        Contender(
            name="brain encoder, 50 queries", build=_ours, inputs=tokens, loss=_sum, items=IMAGES
        ),
        Contender(
            name="torch's decoder layer, masked sum",
            build=MaskedForm,
            inputs=tokens,
            loss=_sum,
            items=IMAGES,
        ),
        Contender(
            name="ridge, 11 penalties, 5 folds",
            build=OurRidge,
            inputs=_table,
            loss=torch.mean,
            items=TARGETS,
        ),
        Contender(
            name="ridge by himalaya",
            build=Himalaya,
            inputs=_table,
            loss=torch.mean,
            missing=missing,
            items=TARGETS,
        ),
    ]


def _ours() -> BrainEncoder:
    sizes = (VERTICES // REGIONS,) * REGIONS
    names = tuple(f"region {k}" for k in range(REGIONS))
    groups = tuple(
        Group(name=name, vertices=VERTICES, regions=names, sizes=sizes) for name in ("lh", "rh")
    )
    return BrainEncoder(BrainEncoderConfig(groups=groups))


class MaskedForm(nn.Module):
    """torch's own decoder layer (with the self-attention that it has), all responses, a mask."""

    mask: Tensor
    code: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2 * REGIONS, 768))
        self.layer = nn.TransformerDecoderLayer(768, 16, 1024, norm_first=True, batch_first=True)
        self.linear = nn.ModuleList(nn.Linear(768, VERTICES) for _ in range(2))
        mask = torch.zeros(REGIONS, VERTICES)
        mask[torch.arange(VERTICES) % REGIONS, torch.arange(VERTICES)] = 1.0
        self.register_buffer("mask", mask)
        self.register_buffer("code", sine_grid((31, 31), 768, normalise=True).flatten(0, 1))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Responses of both hemispheres."""
        memory = features.flatten(1, 2) + self.code
        found = self.layer(self.queries.expand(len(features), -1, -1), memory)
        halves = found.split(REGIONS, dim=1)
        return tuple(
            (layer(own) * self.mask).sum(1) for layer, own in zip(self.linear, halves, strict=True)
        )


class OurRidge(nn.Module):
    """Our solver as a network with nothing to train, so that `bench` can run it."""

    def __init__(self) -> None:
        super().__init__()
        self.still = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The coefficients."""
        with torch.no_grad():
            options = RidgeOptions(alphas=ALPHAS, folds=FOLDS, device=str(x.device))
            coef = ridge_cv(x, y, options).coef
        return coef + self.still.to(coef.device)


class Himalaya(nn.Module):
    """himalaya's solver, called directly."""

    def __init__(self) -> None:
        super().__init__()
        self.still = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The coefficients."""
        import numpy as np
        from himalaya.backend import set_backend  # type: ignore[import-untyped]
        from himalaya.ridge import RidgeCV  # type: ignore[import-untyped]

        set_backend("numpy")
        model = RidgeCV(alphas=np.array(ALPHAS), cv=FOLDS, fit_intercept=True)
        model.fit(x.detach().cpu().numpy(), y.detach().cpu().numpy())
        return torch.from_numpy(np.asarray(model.coef_)) + self.still.cpu()


def _tokens(images: int) -> tuple[Tensor, ...]:
    return (torch.randn(images, 31, 31, 768, generator=torch.Generator().manual_seed(0)),)


def _table() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    weights = torch.randn(FEATURES, TARGETS, generator=generator) / FEATURES**0.5
    return x, x @ weights + torch.randn(ROWS, TARGETS, generator=generator)


def _sum(output: Any) -> Tensor:
    return torch.stack([own.square().mean() for own in output]).sum()
