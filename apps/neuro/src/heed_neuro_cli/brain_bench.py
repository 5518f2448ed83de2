"""What `bench` measures: the read-out of 40,000 vertices by 50 queries, and ridge regression.

Of ridge: 40,000 targets with a penalty each, 11 penalties, 5 folds, on 200 rows.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heed_core.positions import sine_grid
from heed_neuro.brain_encoder.network import BrainEncoder, BrainEncoderConfig, Group
from heed_neuro.ridge import ALPHAS, RidgeOptions, ridge_cv
from heed_runtime.recipe import Contender

VERTICES, REGIONS, IMAGES = 20_000, 25, 8
ROWS, TARGETS, FOLDS = 200, 40_000, 5
FEATURES = {"fewer features than rows": 128, "more features than rows": 512}
"""himalaya has a solver for each case (`RidgeCV`, `KernelRidgeCV`); ours chooses by itself."""


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
        *(
            Contender(
                name=f"{solver}, {case}",
                build=build,
                inputs=partial(_table, features),
                loss=torch.mean,
                missing=why,
                items=TARGETS,
            )
            for case, features in FEATURES.items()
            for solver, build, why in (
                ("ridge", OurRidge, None),
                ("ridge by himalaya", Himalaya, missing),
            )
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
    """himalaya called directly, by its faster solver for the number of features."""

    def __init__(self) -> None:
        super().__init__()
        self.still = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The coefficients."""
        import numpy as np
        from himalaya.backend import set_backend  # type: ignore[import-untyped]
        from himalaya.kernel_ridge import KernelRidgeCV  # type: ignore[import-untyped]
        from himalaya.ridge import RidgeCV  # type: ignore[import-untyped]

        set_backend("numpy")
        table = x.detach().cpu().numpy()
        wide = table.shape[1] > table.shape[0]
        solver = KernelRidgeCV if wide else RidgeCV
        model = solver(alphas=np.array(ALPHAS), cv=FOLDS, fit_intercept=True)
        model.fit(table, y.detach().cpu().numpy())
        coef = model.get_primal_coef(table) if wide else model.coef_
        return torch.from_numpy(np.asarray(coef)) + self.still.cpu()


def _tokens(images: int) -> tuple[Tensor, ...]:
    return (torch.randn(images, 31, 31, 768, generator=torch.Generator().manual_seed(0)),)


def _table(features: int, targets: int = TARGETS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, features, generator=generator)
    weights = torch.randn(features, targets, generator=generator) / features**0.5
    return x, x @ weights + torch.randn(ROWS, targets, generator=generator)


def _sum(output: Any) -> Tensor:
    return torch.stack([own.square().mean() for own in output]).sum()
