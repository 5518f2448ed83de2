"""Where the brain encoder looked, and how alike its queries are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure

from heed_neuro.brain_encoder.network import BrainEncoder
from heed_neuro.brain_encoder.routing import attention_maps, query_similarity, upsample
from heed_neuro_cli.brain_cases import ImageSet
from heed_neuro_cli.brain_pictures import (
    draw_maps,
    draw_mean_maps,
    draw_similarity,
    picture_of,
)
from heed_runtime.recipe import Explanation

SHOWN = 4
"""Images with a picture of their own."""
MOST_NAMED = 60
"""Queries whose mean maps and similarity are drawn: a query per vertex would be too many."""


def used_queries(model: BrainEncoder) -> list[int]:
    """The queries that some vertex is read from: a region may be empty."""
    if model.config.readout == "voxels":
        return list(range(sum(model.config.queries)))
    counts = [count for group in model.config.groups for count in group.counts]
    return [query for query, count in enumerate(counts) if count]


def query_names(model: BrainEncoder) -> list[str]:
    """Group and region (or vertex) of each query."""
    groups = model.config.groups
    alone = len(groups) == 1
    names = []
    for group, count in zip(groups, model.config.queries, strict=True):
        of_vertices = model.config.readout == "voxels"
        own = [f"vertex {k}" for k in range(count)] if of_vertices else group.regions
        names += [name if alone else f"{group.name} {name}" for name in own]
    return names


def explain_images(model: BrainEncoder, case: ImageSet, device: torch.device) -> Explanation:
    """Maps of each query over the images; of an encoder without queries, where it is sensitive."""
    if model.config.kind not in ("transformer", "factorised"):
        return _explain_by_gradient(model, case, device)
    used = used_queries(model)
    every = query_names(model)
    names = [every[query] for query in used]
    maps = []
    for start in range(0, len(case.rows), 8):
        features, _ = case.batch(slice(start, start + 8))
        maps.append(attention_maps(model, features.to(device)).float().cpu())
    found = torch.cat(maps)[:, used]
    arrays = {"maps": found.numpy(), "names": np.array(names)}
    figures = dict(_overlays(case, found, names))
    if len(names) <= MOST_NAMED:
        similarity = query_similarity(model)[np.ix_(used, used)]
        arrays["similarity"] = similarity
        figures["mean"] = draw_mean_maps(found.mean(0).numpy(), names)
        figures["similarity"] = draw_similarity(similarity, names)
    return Explanation(name=case.name, arrays=arrays, figures=figures)


def _explain_by_gradient(model: BrainEncoder, case: ImageSet, device: torch.device) -> Explanation:
    """|gradient x input| of each group's mean response, summed over channels."""
    names = [group.name for group in model.config.groups]
    found = []
    for start in range(0, len(case.rows), 8):
        features, saliency = case.batch(slice(start, start + 8))
        x = features.to(device).requires_grad_()
        with torch.enable_grad():
            outputs = model(x, None if saliency is None else saliency.to(device))
            gradients = [
                torch.autograd.grad(o.mean(1).sum(), x, retain_graph=True)[0] for o in outputs
            ]
        maps = torch.stack([(g * x).sum(-1).abs() for g in gradients], dim=1).detach().cpu()
        found.append(maps / maps.sum((-2, -1), keepdim=True).clamp(min=1e-12))
    maps = torch.cat(found)
    return Explanation(
        name=case.name,
        arrays={"maps": maps.numpy(), "names": np.array(names)},
        figures={
            **_overlays(case, maps, names),
            "mean": draw_mean_maps(maps.mean(0).numpy(), names),
        },
    )


def _overlays(case: ImageSet, maps: torch.Tensor, names: list[str]) -> Mapping[str, Figure]:
    figures = {}
    for place, path in enumerate(case.images[:SHOWN]):
        picture = picture_of(path)
        larger = upsample(maps[place : place + 1], picture.shape[:2])[0].numpy()
        figures[f"maps-{path.stem}"] = draw_maps(picture, larger, names)
    return figures
