"""Sparse and dynamic mechanisms of vision networks for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from heed_core.attention.connectivity import ConnectivityAttention
from heed_core.attention.context_mixing import ContextMixing
from heed_core.testing.conformance import Inputs, Mechanism, Unseen
from heed_core.testing.oracle import naive_attention
from heed_core.testing.vision_formulas import linear


def _spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name])}


def _fixed_predictor(module: ConnectivityAttention) -> ConnectivityAttention:
    """Take the predictor out of the parameters: nothing but reconstruction reaches it."""
    generator = torch.Generator().manual_seed(3)
    for owner in list(module.connectivity.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            delattr(owner, name)
            owner.register_buffer(name, torch.randn(parameter.shape, generator=generator))
    return module


def _connectivity(module: nn.Module, inputs: Inputs) -> Tensor:
    module = cast(ConnectivityAttention, module)
    x, kept = inputs["x"], inputs["kept"]
    batch, tokens, _ = x.shape
    query, key, value = (
        (linear(layer, x) * kept[..., None]).view(batch, tokens, module.heads, -1).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    )
    mask = torch.zeros(batch, module.heads, tokens, tokens, dtype=torch.bool)
    mask[:, :, 0] = True
    guess = module.connectivity
    up = cast(Tensor, guess.up).abs()
    up = torch.where(up > guess.threshold, up, 0)
    for b in range(batch):
        budget = min(module.keys, int(kept[b, 1:].sum()))
        for h in range(module.heads):
            asking, asked = (
                linear(layer, t[b, h].detach()) * kept[b, :, None]
                for layer, t in ((guess.query, query), (guess.key, key))
            )
            folded = asked.T @ guess.down
            for i in range(1, tokens):
                row = (guess.scale * asking[i] @ folded).softmax(-1)
                best = row.tolist()
                best = sorted(range(len(best)), key=best.__getitem__, reverse=True)
                guessed = sum(row[r] * up[:, r] for r in best[: guess.top_coefficients])
                scores = cast(Tensor, guessed).masked_fill(~kept[b], -torch.inf).tolist()
                seen = sorted(range(tokens), key=scores.__getitem__, reverse=True)
                mask[b, h, i, seen[:budget]] = True
    mixed = naive_attention(query, key, value, mask=mask)
    return linear(module.out, mixed.transpose(1, 2).flatten(2))


def _tokens(batch: int, size: int) -> Inputs:
    kept = torch.ones(batch, 7, dtype=torch.bool)
    kept[:, 2] = False
    return {"x": torch.randn(batch, 7, 8), "kept": kept}


def _loud_pruned(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"].masked_fill(~inputs["kept"][..., None], 1e4)}


def _one_by_one(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """A 1 x 1 convolution and its norm in evaluation, channels last."""
    rows = (x[..., None, :] * cast(Tensor, layer.weight).flatten(1)).sum(-1)
    spread = (cast(Tensor, norm.running_var) + 1e-5).sqrt()
    centred = (rows - cast(Tensor, norm.running_mean)) / spread
    return centred * cast(Tensor, norm.weight) + cast(Tensor, norm.bias)


def _context_mixing(module: nn.Module, inputs: Inputs) -> Tensor:
    module = cast(ContextMixing, module)
    x, context, value = (inputs[name].movedim(1, -1) for name in ("x", "context", "value"))
    high, wide, dim = x.shape[1:]
    query = _one_by_one(module.query, module.query_norm, x) * (dim / module.heads) ** -0.5
    cuts = [
        (i * size // module.regions, -(-(i + 1) * size // module.regions))
        for size in (high, wide)
        for i in range(module.regions)
    ]
    rows, columns = cuts[: module.regions], cuts[module.regions :]
    pooled = [context[:, a:b, c:d].mean((1, 2)) for a, b in rows for c, d in columns]
    key = _one_by_one(module.key, module.key_norm, torch.stack(pooled, dim=1))
    width = dim // (2 * module.heads)
    y = torch.zeros_like(x)
    begin = 0
    for part, (kernel, table) in enumerate(
        zip(module.kernels, (module.small_bias, module.large_bias), strict=True)
    ):
        numbers = slice(begin, begin + kernel**2)
        begin += kernel**2
        for g in range(module.heads):
            own = slice(g * width, (g + 1) * width)
            channels = slice(part * dim // 2 + g * width, part * dim // 2 + (g + 1) * width)
            for i in range(high):
                for j in range(wide):
                    affinity = (query[:, i, j, None, own] * key[:, :, own]).sum(-1)
                    logits = (affinity[:, None] * module.mix.weight[numbers]).sum(-1)
                    logits = logits + module.mix.bias[numbers]
                    r = min(max(i - kernel // 2, 0), high - kernel)
                    c = min(max(j - kernel // 2, 0), wide - kernel)
                    first = (r - i + kernel - 1, c - j + kernel - 1)
                    near = table[g, first[0] : first[0] + kernel, first[1] : first[1] + kernel]
                    shares = (logits + near.flatten()).exp()
                    window = value[:, r : r + kernel, c : c + kernel, channels].flatten(1, 2)
                    mixed = (shares[..., None] * window).sum(1) / shares.sum(1, keepdim=True)
                    y[:, i, j, channels] = mixed
    return _one_by_one(module.out, module.out_norm, y).movedim(-1, 1)


def _maps(batch: int, size: int) -> Inputs:
    return {
        "x": torch.randn(batch, 4, size, size + 1),
        "context": torch.randn(batch, 3, size, size + 1),
        "value": torch.randn(batch, 4, size, size + 1),
    }


VISION_SPARSE_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="predicted-connectivity",
        build=lambda dropout: _fixed_predictor(
            ConnectivityAttention(
                8,
                heads=2,
                tokens=7,
                keep=0.4,
                rank=3,
                top_coefficients=2,
                qkv_bias=False,
                dropout=dropout,
            )
        ),
        inputs=_tokens,
        reference=_connectivity,
        exponent=1.0,
        unseen=(Unseen(name="pruned tokens", change=_loud_pruned),),
        wrong=(
            (_spoilt("x", lambda x: x[:, 1:]), "x must be (batch, 7, 8)"),
            (_spoilt("x", lambda x: x[0]), "x must be (batch, 7, 8)"),
            (_spoilt("kept", lambda x: x[:, 1:]), "kept must be"),
            (_spoilt("kept", lambda x: x.float()), "kept must be boolean"),
        ),
        excused={
            "symmetry": "the predictor has weights for each token",
            "cost": "the number of tokens is part of the weights",
            "exported-size": "the number of tokens is part of the weights",
        },
    ),
    Mechanism(
        name="context-mixing",
        build=lambda dropout: ContextMixing(
            4, context_dim=3, heads=2, kernel=5, small_kernel=3, regions=2
        ),
        inputs=_maps,
        reference=_context_mixing,
        size=5,
        tokens=lambda size: size * (size + 1),
        exponent=1.0,
        costly_sizes=(32, 64),
        wrong=(
            (_spoilt("x", lambda x: x[:, 1:]), "x must be (batch, 4, H, W)"),
            (_spoilt("x", lambda x: x[0]), "x must be (batch, 4, H, W)"),
            (_spoilt("value", lambda x: x[:, 1:]), "value must be"),
            (_spoilt("context", lambda x: x[:, 1:]), "context must be (batch, 3, H, W)"),
        ),
        dynamic={name: {2: "h", 3: "w"} for name in ("x", "context", "value")},
        excused={
            "unseen": "every place sees the whole context",
            "symmetry": "regions and offsets have weights of their own",
            "eval-deterministic": "the mechanism has no dropout",
            "observe": "kernels are softmaxes of mixed affinities: no site of `attend`",
        },
    ),
)
"""The sparse and dynamic vision mechanisms of `heed_core.attention`."""
