"""Efficient attentions of long sequences written out from their formulas, slowly."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from heed_core.attention.bounded_memory import BoundedMemoryAttention
from heed_core.attention.causal_long_short import CausalLongShortAttention
from heed_core.attention.cosformer import CosformerAttention
from heed_core.attention.diagonal_state import DiagonalStateMixer
from heed_core.attention.local import LocalAttention
from heed_core.attention.long_short import LongShortAttention
from heed_core.attention.nystrom import NystromAttention
from heed_core.attention.performer import PerformerAttention
from heed_core.attention.prob_sparse import ProbSparseAttention, sample_keys
from heed_core.attention.projected import ProjectedAttention
from heed_core.attention.randomized import RandomizedAttention
from heed_core.testing.conformance import (
    Inputs,
)
from heed_core.testing.oracle import naive_attention
from heed_core.testing.vision_formulas import linear


def _heads(layer: nn.Module, tokens: Tensor, head_dim: int) -> Tensor:
    """(b, n, c) -> (b, h, n, d)."""
    return linear(layer, tokens).reshape(*tokens.shape[:2], -1, head_dim).transpose(1, 2)


def _projected(module: ProjectedAttention, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs["x"]
    source = inputs.get("context", x)
    return (
        _heads(module.query, x, module.head_dim),
        _heads(module.key, source, module.head_dim),
        _heads(module.value, source, module.head_dim),
    )


def _back(module: ProjectedAttention, mixed: Tensor) -> Tensor:
    return linear(module.out, mixed.transpose(1, 2).flatten(2))


def _real(inputs: Inputs) -> Tensor:
    """(b, m), True = real token."""
    source = inputs.get("context", inputs["x"])
    return inputs.get("padding_mask", torch.ones(source.shape[:2], dtype=torch.bool))


def local(module: nn.Module, inputs: Inputs) -> Tensor:
    """The band as a mask of all pairs, pair by pair."""
    module = cast(LocalAttention, module)
    query, key, value = _projected(module, inputs)
    n = query.shape[2]
    near = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            away = i - j
            near[i, j] = 0 <= away < module.window if module.causal else abs(away) <= module.window
    mixed = naive_attention(query, key, value, mask=near & _real(inputs)[:, None, None])
    return _back(module, mixed)


def _averaged(scores: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    """Rows (t, e) by the softmax of scores (t,) over the seen ones, term by term."""
    top = max(float(s) for s, there in zip(scores.detach(), seen, strict=True) if there)
    shares = [(s - top).exp() for s, there in zip(scores, seen, strict=True) if there]
    kept = [row for row, there in zip(rows, seen, strict=True) if there]
    parts = [share * row for share, row in zip(shares, kept, strict=True)]
    return torch.stack(parts).sum(0) / torch.stack(shares).sum()


def bounded_memory(module: nn.Module, inputs: Inputs) -> Tensor:
    """Slots filled anew for every query."""
    module = cast(BoundedMemoryAttention, module)
    query, key, value = _projected(module, inputs)
    real, n = _real(inputs), query.shape[2]
    rows = []
    for b in range(len(query)):
        for h in range(module.heads):
            for i in range(n):
                seen = real[b].clone()
                if module.causal:
                    seen[i + 1 :] = False
                slots = [
                    torch.stack(
                        [
                            _averaged((source * control[:, s]).sum(-1), source, seen)
                            for s in range(module.slots)
                        ]
                    )
                    for source, control in (
                        (key[b, h], module.key_control),
                        (value[b, h], module.value_control),
                    )
                ]
                scores = (query[b, h, i] * slots[0]).sum(-1) / module.head_dim**0.5
                rows.append(_averaged(scores, slots[1], torch.ones(module.slots)))
    return _back(module, torch.stack(rows).view_as(query))


def _weighted(weights: list[Tensor], rows: Tensor, least: float) -> Tensor:
    total = torch.stack(weights).sum().clamp(min=least)
    return torch.stack([w * row for w, row in zip(weights, rows, strict=True)]).sum(0) / total


def performer(module: nn.Module, inputs: Inputs) -> Tensor:
    """Features of every pair; what is seen decides the largest exponent."""
    module = cast(PerformerAttention, module)
    query, key, value = _projected(module, inputs)
    real = _real(inputs)
    scaled = [x / module.head_dim**0.25 for x in (query, key)]
    products = [(x[:, :, :, None] * module.projection[:, None]).sum(-1) for x in scaled]
    half = [x.square().sum(-1) / 2 for x in scaled]
    rows = []
    for b in range(len(query)):
        for h in range(module.heads):
            for i in range(query.shape[2]):
                own = products[0][b, h, i]
                asking = (own - half[0][b, h, i] - own.max()).exp() + 1e-4
                last = i + 1 if module.causal else key.shape[2]
                seen = [j for j in range(last) if real[b, j]]
                top = torch.stack([products[1][b, h, j].max() for j in seen]).max()
                weights = []
                for j in seen:
                    asked = (products[1][b, h, j] - half[1][b, h, j] - top).exp() + 1e-4
                    weights.append((asking * asked).sum() / module.features)
                rows.append(_weighted(weights, value[b, h, seen], module.least_normaliser))
    return _back(module, torch.stack(rows).view_as(query))


def cosformer(module: nn.Module, inputs: Inputs) -> Tensor:
    """The cosine of every pair; the mask leaves a shorter sequence."""
    module = cast(CosformerAttention, module)
    query, key, value = _projected(module, inputs)
    real = _real(inputs)
    rows = []
    for b in range(len(query)):
        seen = [j for j in range(key.shape[2]) if real[b, j]]
        length = len(seen) if "context" not in inputs else max(query.shape[2], len(seen))
        for h in range(module.heads):
            for i in range(query.shape[2]):
                weights = []
                for j in seen:
                    alike = (query[b, h, i].clamp(min=0) * key[b, h, j].clamp(min=0)).sum()
                    place = sum(k < i for k in seen) if "context" not in inputs else i
                    if "context" not in inputs and not real[b, i]:
                        place = len(seen) - 1  # padding: unspecified, but it must be something
                    weights.append(alike * math.cos(math.pi / 2 * (place - seen.index(j)) / length))
                rows.append(_weighted(weights, value[b, h, seen], 1e-6))
    return _back(module, torch.stack(rows).view_as(query))


def _segments(real: list[int], count: int) -> list[list[int]]:
    """Tokens of each landmark: the first ones are shorter by one."""
    short = len(real) // count
    sizes = [short] * ((short + 1) * count - len(real))
    sizes += [short + 1] * (count - len(sizes))
    starts = [sum(sizes[:k]) for k in range(count)]
    return [real[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _means(rows: Tensor, segments: list[list[int]]) -> list[Tensor]:
    return [rows[some].sum(0) / len(some) for some in segments]


def randomized(module: nn.Module, inputs: Inputs) -> Tensor:
    """The proposals one by one."""
    module = cast(RandomizedAttention, module)
    query, key, value = _projected(module, inputs)
    c, masked = 1 / math.sqrt(module.head_dim), _real(inputs)

    def psi(x: Tensor, w: Tensor) -> Tensor:
        return c * (w * x).sum(-1) - c * x.square().sum(-1) / 2

    rows = []
    for b in range(len(query)):
        real = [j for j in range(query.shape[2]) if masked[b, j]]
        segments = [some for some in _segments(real, module.landmarks) if some]
        for h in range(module.heads):
            pair = zip(_means(query[b, h], segments), _means(key[b, h], segments), strict=True)
            centres = [q + k for q, k in pair]
            known, read = [], []
            for centre in centres:
                scores = psi(key[b, h, real], centre)
                read.append(_averaged(scores, value[b, h, real], torch.ones(len(real))))
                known.append(scores.exp().sum().log() - psi(centre, centre))
            for i in range(query.shape[2]):
                asking = query[b, h, i]
                scores = torch.stack(
                    [
                        c * (centre * asking).sum() + psi(asking, centre) + one
                        for centre, one in zip(centres, known, strict=True)
                    ]
                )
                rows.append(_averaged(scores, torch.stack(read), torch.ones(len(read))))
    return _back(module, torch.stack(rows).view_as(query))


def _softmax(query: list[Tensor], key: list[Tensor], scale: float) -> Tensor:
    rows = []
    for q in query:
        shares = torch.stack([(scale * (q * k).sum()).exp() for k in key])
        rows.append(shares / shares.sum())
    return torch.stack(rows)


def nystrom(module: nn.Module, inputs: Inputs) -> Tensor:
    """The three maps of each sample and head, and the iteration written out."""
    module = cast(NystromAttention, module)
    query, key, value = _projected(module, inputs)
    masked, scale = _real(inputs), module.head_dim**-0.5
    rows = []
    for b in range(len(query)):
        real = [j for j in range(query.shape[2]) if masked[b, j]]
        segments = [some for some in _segments(real, module.landmarks) if some]
        for h in range(module.heads):
            short_query = _means(query[b, h], segments)
            short_key = _means(key[b, h], segments)
            keys = list(key[b, h, real])
            first = _softmax(list(query[b, h]), short_key, scale)
            inner = _softmax(short_query, short_key, scale)
            last = _softmax(short_query, keys, scale)
            one = torch.eye(len(inner), dtype=inner.dtype)
            guess = inner.T / (inner.sum(0).max() * inner.sum(1).max())
            for _ in range(6):
                step = inner @ guess
                guess = guess @ (13 * one - step @ (15 * one - step @ (7 * one - step))) / 4
            mixed = first @ guess @ last @ value[b, h, real]
            if module.conv is not None:
                width = cast(int, module.conv_width)
                taps = module.conv.weight[h, 0, :, 0]
                for i in range(len(mixed)):
                    for t in range(width):
                        j = i + t - width // 2
                        if j in real:
                            mixed = mixed + taps[t] * value[b, h, j] * (
                                torch.arange(len(mixed))[:, None] == i
                            )
            rows.append(mixed)
    return _back(module, torch.stack(rows).view_as(query))


def prob_sparse(module: nn.Module, inputs: Inputs) -> Tensor:
    """Queries ranked by Python."""
    module = cast(ProbSparseAttention, module)
    query, key, value = _projected(module, inputs)
    masked = _real(inputs)
    mask = inputs.get("padding_mask")
    sampled = sample_keys(module.seed, query.shape[2], module.factor, padding_mask=mask)
    sampled = sampled.expand(len(query), -1, -1)
    full = naive_attention(query, key, value, mask=masked[:, None, None])
    rows = []
    for b in range(len(query)):
        real = [j for j in range(query.shape[2]) if masked[b, j]]
        few = min(max(1, module.factor * math.ceil(math.log(len(real)))), len(real))
        for h in range(module.heads):
            measure = {}
            for i in real:
                scores = [
                    float((query[b, h, i] * key[b, h, j]).sum().detach())
                    for j in sampled[b, i].tolist()
                    if j >= 0
                ]
                assert len(scores) == few
                measure[i] = max(scores) - sum(scores) / len(real)
            chosen = sorted(real, key=lambda i: -measure[i])[:few]
            mean = value[b, h, real].sum(0) / len(real)
            rows += [full[b, h, i] if i in chosen else mean for i in range(query.shape[2])]
    return _back(module, torch.stack(rows).view_as(query))


def _normed(norm: nn.Module, rows: Tensor) -> Tensor:
    """Layer norm over the last axis by its formula."""
    centred = rows - rows.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * cast(Tensor, norm.weight) + cast(Tensor, norm.bias)


def _split(rows: Tensor, heads: int) -> Tensor:
    """(b, n, c) -> (b, h, n, d)."""
    return rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2)


def long_short(module: nn.Module, inputs: Inputs) -> Tensor:
    """Summaries and the tile of each token in loops."""
    module = cast(LongShortAttention, module)
    x, masked, heads = inputs["x"], _real(inputs), module.heads
    n, w = x.shape[1], module.window
    query = _split(linear(module.query, x), heads)
    grades = linear(module.summarise, x).reshape(*x.shape[:2], heads, module.landmarks)
    near, far = [], []
    for layer in (module.key, module.value):
        rows = _normed(module.near_norm, linear(layer, x))
        near.append(_split(rows, heads))
        read = torch.stack(
            [
                torch.stack(
                    [
                        torch.cat(
                            [
                                _averaged(grades[b, :, h, s], near[-1][b, h], masked[b])
                                for h in range(heads)
                            ]
                        )
                        for s in range(module.landmarks)
                    ]
                )
                for b in range(len(x))
            ]
        )
        far.append(_split(_normed(module.far_norm, read), heads))
    seen = torch.zeros(len(x), 1, n, module.landmarks + n, dtype=torch.bool)
    for b in range(len(x)):
        for i in range(n):
            seen[b, 0, i, : module.landmarks] = True
            for j in range(n):
                tile = i // w
                inside = tile * w - w // 2 <= j < (tile + 1) * w + w // 2
                seen[b, 0, i, module.landmarks + j] = inside and bool(masked[b, j])
    key, value = (torch.cat(both, dim=2) for both in zip(far, near, strict=True))
    return linear(
        module.out, naive_attention(query, key, value, mask=seen).transpose(1, 2).flatten(2)
    )


def causal_long_short(module: nn.Module, inputs: Inputs) -> Tensor:
    """Scores of places, pair by pair."""
    module = cast(CausalLongShortAttention, module)
    x, heads, chunk, rank = inputs["x"], module.heads, module.chunk, module.rank
    n, dim = x.shape[1], module.dim
    query = _split(linear(module.query, x), heads) / module.head_dim**0.5
    key, value = linear(module.key, x), linear(module.value, x)
    grades = linear(module.summarise, x).reshape(*x.shape[:2], heads, rank)

    def placed(layer: nn.Module, distance: int) -> Tensor:
        rate = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        code = torch.cat([(distance * rate).sin(), (distance * rate).cos()]).to(x.dtype)
        return linear(cast(nn.Module, layer.map), code).reshape(heads, 1, -1)

    keys = list(_split(_normed(module.near_norm, key), heads).unbind(2))
    values = list(_split(_normed(module.near_norm, value), heads).unbind(2))
    far = []
    for start in range(0, n - chunk + 1, chunk):
        some = slice(start, start + chunk)
        share = grades[:, some].softmax(1)  # (b, c, h, r)
        for r in range(rank):
            pair = []
            for rows in (key, value):
                parts = rows[:, some].reshape(len(x), chunk, heads, -1) * share[..., r, None]
                pair.append(
                    _split(_normed(module.far_norm, parts.sum(1).flatten(1))[:, None], heads)
                )
            far.append((start + chunk, pair[0][:, :, 0], pair[1][:, :, 0]))
    mixed: list[Tensor] = []
    for i in range(n):
        asked = query[:, :, i]
        scores: list[Tensor] = []
        values_seen: list[Tensor] = []
        visible = [one for one in far if one[0] <= i // chunk * chunk]
        for back, (_, far_key, far_value) in enumerate(reversed(visible)):
            code = placed(module.far_place, back)[:, 0]
            scores.append((asked * (far_key + code)).sum(-1))
            values_seen.append(far_value)
        for j in range(max(0, i - module.window + 1), i + 1):
            code = placed(module.near_place, i - j)[:, 0]
            near = ((asked + module.content_bias) * keys[j]).sum(-1)
            scores.append(near + ((asked + module.place_bias) * code).sum(-1))
            values_seen.append(values[j])
        shares = torch.stack(scores, dim=-1).softmax(-1)
        mixed.append((shares[..., None] * torch.stack(values_seen, dim=2)).sum(2))
    return linear(module.out, torch.stack(mixed, dim=2).transpose(1, 2).flatten(2))


def diagonal_state(module: nn.Module, inputs: Inputs) -> Tensor:
    """The recurrence of real pairs, forwards and, without the own token, backwards."""
    module = cast(DiagonalStateMixer, module)
    x, half = inputs["x"], module.state // 2
    u = x * _real(inputs)[..., None]
    step = module.log_step.exp()[:, None]
    fade, turn = -module.log_decay.exp() * step, module.frequency * step
    keep = fade.exp() * turn.cos(), fade.exp() * turn.sin()
    # (exp(dt a) - 1) / a, as a quotient of complex numbers
    square = (fade.square() + turn.square()) / step
    real = ((keep[0] - 1) * fade + keep[1] * turn) / square
    imaginary = (keep[1] * fade - (keep[0] - 1) * turn) / square

    def run(tokens: list[Tensor], sets: Tensor) -> list[Tensor]:
        state = [x.new_zeros(len(x), module.dim, half)] * 2
        rows = []
        for token in tokens:
            state = [
                keep[0] * state[0] - keep[1] * state[1] + token[..., None],
                keep[1] * state[0] + keep[0] * state[1],
            ]
            weight = (
                sets[..., 0] * real - sets[..., 1] * imaginary,
                sets[..., 0] * imaginary + sets[..., 1] * real,
            )
            product = weight[0] * state[0][:, None] - weight[1] * state[1][:, None]
            rows.append(2 * product.sum(-1))  # (b, r, c)
        return rows

    rows = run(list(u.unbind(1)), module.coefficients[: module.channels])
    if not module.causal:
        back = run(list(u.flip(1).unbind(1)), module.coefficients[module.channels :])[::-1]
        rows = [row + later for row, later in zip(rows, [*back[1:], 0 * back[0]], strict=True)]
    mixed = torch.stack(rows, dim=1) + module.skip * u[:, :, None]
    active = mixed * 0.5 * (1 + (mixed / 2**0.5).erf())
    return linear(module.out, active.flatten(2))
