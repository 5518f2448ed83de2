"""The mixtures of heads on maps for the conformance suite."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
from torch import Tensor, nn

from heed_core.attention.cosine_mixture import CosineMixture, PooledCosineMixture
from heed_core.testing.conformance import Inputs, Mechanism
from heed_core.testing.recurrence_formulas import heads_of, joined
from heed_core.testing.sequence_mechanisms import gates_of
from heed_core.testing.vision_formulas import layer_norm, linear


class _OutputOnMap(nn.Module):
    """A mixture of heads on a map, its output alone."""

    def __init__(self, mixture: CosineMixture | PooledCosineMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mixture(x).output
        return output


def _built(dropout: float, *, pool: int | None = None) -> nn.Module:
    if pool is None:
        return _OutputOnMap(
            CosineMixture(8, heads=4, shared=2, active=1, head_dim=3, dropout=dropout)
        )
    return _OutputOnMap(
        PooledCosineMixture(8, heads=4, shared=2, active=1, head_dim=3, pool=pool, dropout=dropout)
    )


def _map(batch: int, size: int) -> Inputs:
    return {"x": torch.randn(batch, size, size + 1, 8)}


def _cells(size: int) -> int:
    return size * (size + 1)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def _bias(mixture: nn.Module, x: Tensor, offsets: list[list[tuple[float, float]]]) -> Tensor:
    """Of pairs (n, m) by their offsets, (n, m, h)."""
    bias = cast(CosineMixture, mixture).offset_bias

    def stretched(offset: float, side: int) -> float:
        return math.copysign(math.log2(8 * abs(offset) / max(side - 1, 1) + 1) / 3, offset)

    height, width = x.shape[1:3]
    far = [[(stretched(down, height), stretched(to, width)) for down, to in row] for row in offsets]
    hidden = linear(bias.enter, torch.tensor(far, dtype=torch.float64).to(x.dtype))
    return linear(bias.leave, hidden.clamp(min=0.0))


def _softmax(scores: list[Tensor]) -> list[Tensor]:
    top = max(float(score.detach()) for score in scores)
    shares = [(score - top).exp() for score in scores]
    return [share / torch.stack(shares).sum() for share in shares]


def _finished(mixture: nn.Module, x: Tensor, mixed: Tensor) -> Tensor:
    mixture = cast(CosineMixture, mixture)
    gates = gates_of(mixture, x.flatten(1, 2), None).transpose(1, 2)[..., None]
    return linear(mixture.out, joined(gates * mixed)).reshape(x.shape)


def _cosine(module: nn.Module, inputs: Inputs) -> Tensor:
    """Pair by pair."""
    mixture, x = cast(_OutputOnMap, module).mixture, inputs["x"]
    tokens, width = x.flatten(1, 2), mixture.head_dim
    places = list(itertools.product(range(x.shape[1]), range(x.shape[2])))
    bias = _bias(mixture, x, [[(a - c, b - d) for c, d in places] for a, b in places])
    heat = (1 + mixture.temperature.exp()).log() * math.log(len(places))
    query = (_unit(heads_of(mixture.query, tokens, width)) + mixture.query_embedding) * heat
    key = _unit(heads_of(mixture.key, tokens, width))
    value = heads_of(mixture.value, tokens, width)
    rows = []
    for b, h, i in itertools.product(range(len(x)), range(mixture.heads), range(len(places))):
        scores = [(query[b, h, i] * key[b, h, j]).sum() + bias[i, j, h] for j in range(len(places))]
        parts = [w * value[b, h, j] for j, w in enumerate(_softmax(scores))]
        rows.append(torch.stack(parts).sum(0))
    return _finished(mixture, x, torch.stack(rows).view_as(value))


def _ranges(size: int, pooled: int) -> list[range]:
    """The places that each pooled one averages."""
    return [range(i * size // pooled, -(-(i + 1) * size // pooled)) for i in range(pooled)]


def _pooled(module: nn.Module, inputs: Inputs) -> Tensor:
    """The window and the pooled map of every place, term by term."""
    mixture, x = cast(PooledCosineMixture, cast(_OutputOnMap, module).mixture), inputs["x"]
    sides, width = x.shape[1:3], mixture.head_dim
    cells = list(itertools.product(*(_ranges(s, max(1, s // mixture.pool)) for s in sides)))
    reduced = linear(mixture.reduce, x)
    reduced = 0.5 * reduced * (1 + torch.special.erf(reduced / math.sqrt(2)))
    means = [reduced[:, r.start : r.stop, c.start : c.stop].mean((1, 2)) for r, c in cells]
    few = layer_norm(mixture.norm, torch.stack(means, dim=1))
    places = list(itertools.product(*map(range, sides)))
    middles = [(r.start + (len(r) - 1) / 2, c.start + (len(c) - 1) / 2) for r, c in cells]
    bias = _bias(mixture, x, [[(a - c, b - d) for c, d in middles] for a, b in places])
    asked = _unit(heads_of(mixture.query, x.flatten(1, 2), width))
    heat = (1 + mixture.temperature.exp()).log()[:, 0, 0]
    layers = mixture.key, mixture.value
    near_key, near = (heads_of(layer, x.flatten(1, 2), width) for layer in layers)
    far_key, far = (heads_of(layer, few, width) for layer in layers)
    near_key, far_key = _unit(near_key), _unit(far_key)
    rows = []
    for b, h, i in itertools.product(range(len(x)), range(mixture.heads), range(len(places))):
        around = [(places[i][0] + d - 1, places[i][1] + r - 1) for d in range(3) for r in range(3)]
        seen = [(w, places.index(place)) for w, place in enumerate(around) if place in places]
        query = (asked[b, h, i] + mixture.query_embedding[h, 0]) * heat[h]
        query = query * math.log(len(seen) + len(cells))
        scores = [(query * near_key[b, h, j]).sum() + mixture.window_bias[h, w] for w, j in seen]
        scores += [(query * far_key[b, h, j]).sum() + bias[i, j, h] for j in range(len(cells))]
        weights = _softmax(scores)
        parts = [weight * far[b, h, j] for j, weight in enumerate(weights[len(seen) :])]
        for (w, j), weight in zip(seen, weights, strict=False):
            more = (asked[b, h, i] * mixture.window_tokens[h, :, w]).sum()
            parts.append((weight + more + mixture.window_shift[h, 0, w]) * near[b, h, j])
        rows.append(torch.stack(parts).sum(0))
    return _finished(mixture, x, torch.stack(rows).view_as(near))


_WRONG = (
    (lambda inputs: {"x": inputs["x"][..., :-1]}, "x must be"),
    (lambda inputs: {"x": inputs["x"][0]}, "x must be"),
    (lambda inputs: {"x": inputs["x"].long()}, "x must"),
)
_EXCUSED = {
    "unseen": "every place sees the whole map: there is no mask",
    "symmetry": "every offset has scores of its own",
}

MIXTURE_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="cosine-mixture",
        build=lambda dropout: _built(dropout),
        inputs=_map,
        reference=_cosine,
        size=3,
        tokens=_cells,
        exponent=2.0,
        costly_sizes=(256, 512),
        wrong=_WRONG,
        dynamic={"x": {1: "y", 2: "z"}},
        excused=_EXCUSED,
    ),
    Mechanism(
        name="cosine-mixture-pooled",
        build=lambda dropout: _built(dropout, pool=2),
        inputs=_map,
        reference=_pooled,
        size=4,
        tokens=_cells,
        exponent=2.0,
        costly_sizes=(256, 512),
        wrong=_WRONG,
        excused={**_EXCUSED, "exported-size": "adaptive pooling depends on the size"},
    ),
)
"""Attentions of maps whose heads are gated place by place."""
