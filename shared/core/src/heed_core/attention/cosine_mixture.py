"""Mixtures of heads on maps, whose scores are cosines that grow with the number of keys.

    q'_i = (q_i / |q_i| + e) softplus(t) ln(m_i),    score_ij = q'_i . k_j / |k_j| + f(offset of j)
    o = W_out concat_h gate_h head_h

with e and t learned per head, m_i the number of keys of query i, gates as in
`heed_core.attention.mixture_of_heads`, and f two linear maps (2 -> 512 -> heads) with a ReLU, of
offsets on a logarithmic scale. `CosineMixture` attends to the whole map. `PooledCosineMixture`
attends to the 3 x 3 places around and to a pooled map under one softmax,

    pooled = LN(average pool(GELU(W_r x))),
    head_i = sum_j of window (w_ij + q_i / |q_i| . T_j + b_j) v_j + sum_j of pooled w_ij v_j

where T and b are learned and the bias of the window is a table. Jin et al., "MoH: multi-head
attention as mixture-of-head attention" (arXiv 2410.11842), whose vision model has the attention of
Shi, "TransNeXt" (arXiv 2311.17132).

Cost per head for a map of n places: time n^2 d, memory n^2 for the bias; pooled to p places time
n (9 + p) d, memory n (9 + p).

The site is `attend`: weights (b, h, n, n) before the gates, or of the 9 places of the window, row
by row, and the pooled ones (b, h, n, 9 + p), without the terms T and b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed_core.attention.mixture_of_heads import Mixture, mixture_from_dit
from heed_core.attention.multi_head import check_heads
from heed_core.head_routing import Gating, balance_loss, check_routing, mixture_gates
from heed_core.head_skipping import gate_heads
from heed_core.impl import Impl
from heed_core.layers import matrix_and_bias, type_and_place
from heed_core.precision import at_least_float32
from heed_core.sites import Attend
from heed_core.tokens import check_some, check_type

HIDDEN = 512
"""Channels between the two maps of offsets."""

STRETCH = 8.0
"""What offsets of a whole map become before the logarithm, whose base it is."""

FIRST_HEAT = 1 / 0.24
"""softplus(t) at the beginning."""

WINDOW = 9
"""Places around a token, itself among them."""


class OffsetBias(nn.Module):
    """A bias of scores per head by the offset of two places of a map, of any size.

    Liu et al., "Swin Transformer V2" (arXiv 2111.09883), section 3.3.

    Args:
        heads: Of queries.
        trained_on: Height and width by which offsets are divided; those of the map if not given.
            Weights trained on maps of one size serve others better with it.
    """

    def __init__(self, heads: int, *, trained_on: tuple[int, int] | None = None) -> None:
        super().__init__()
        if trained_on is not None and min(trained_on) < 1:
            raise ValueError(f"trained_on must be at least (1, 1), got {trained_on}")
        self.trained_on = trained_on
        self.enter = nn.Linear(2, HIDDEN)
        self.leave = nn.Linear(HIDDEN, heads)

    def forward(
        self, shape: tuple[int, int], pooled: tuple[int, int] | None = None
    ) -> Float[Tensor, "h n m"]:
        """The bias of every place of a map.

        Args:
            shape: Its rows and columns.
            pooled: Of the places that are attended to: those of the same map, pooled to this shape;
                as they are if not given.
        """
        dtype, device = type_and_place(self.enter)
        sides = self.trained_on or shape
        steps, places = [], []
        for axis, (size, whole) in enumerate(zip(shape, sides, strict=True)):
            count = None if pooled is None else pooled[axis]
            step, place = axis_offsets(size, count, device=device)
            far = step * STRETCH / torch.arange(whole, device=device).amax().clamp(min=1)
            steps.append(far.sign() * (far.abs() + 1).log2() / math.log2(STRETCH))
            places.append(place)
        down, right = torch.meshgrid(*steps, indexing="ij")
        offsets = torch.stack([down.flatten(), right.flatten()], dim=-1).to(dtype)
        table = self.leave(F.relu(self.enter(offsets)))
        row = places[0][:, None, :, None] * steps[1].shape[0] + places[1][None, :, None, :]
        return cast(Tensor, table[row.flatten(2).flatten(0, 1)]).movedim(-1, 0)

    def extra_repr(self) -> str:
        """Show the option."""
        return f"trained_on={self.trained_on}"


def axis_offsets(
    size: int, pooled: int | None = None, *, device: torch.device | None = None
) -> tuple[Float[Tensor, " steps"], Int[Tensor, "n m"]]:
    """Offsets of the places of an axis from each other, or from the middles of its pooled cells.

    Args:
        size: Of the axis.
        pooled: Cells to which it is pooled adaptively; not at all if not given.
        device: Of the result.

    Returns:
        Offsets in equal steps, in float64, among them all that occur; which of them each pair has.
    """
    here = torch.arange(size, device=device)
    twice_middle, step, odd = 2 * here, 2, 0
    if pooled is not None:
        cell = torch.arange(pooled, device=device)
        twice_middle = (cell * size) // pooled + ((cell + 1) * size + pooled - 1) // pooled - 1
        # a graph of any size cannot branch on what divides it
        even = not torch.compiler.is_compiling() and size % pooled == 0
        step, odd = (2, 1 - size // pooled % 2) if even else (1, 0)
    least = 2 - 2 * size - odd
    steps = torch.arange(2 * size if step == 2 else 4 * size, device=device)
    return (steps * step + least).double() / 2, (2 * here[:, None] - twice_middle - least) // step


class CosineMixture(nn.Module):
    """A mixture of heads with length-scaled cosine scores between all places of a map.

    Every head is computed for every token: the bias is a map of all pairs in any case.

    Args:
        dim: Channels of a token, in and out.
        heads: All of them, the `shared` ones first.
        shared: Heads that every token uses.
        active: Routed heads that a token uses; 0 if all heads are shared.
        head_dim: Channels of a head; dim / heads if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight in training.
        gating: As in `MixtureOfHeads`.
        trained_on: As in `OffsetBias`.
        sync_balance: Take the balance loss over all processes, see `head_routing.balance_loss`.
        impl: Back-end of `attend`.

    Example:
        >>> result = CosineMixture(32, heads=4, shared=2, active=1)(torch.randn(1, 4, 5, 32))
        >>> result.output.shape, result.gates.shape
        (torch.Size([1, 4, 5, 32]), torch.Size([1, 4, 5, 4]))
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        shared: int,
        active: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        gating: Gating = "code",
        trained_on: tuple[int, int] | None = None,
        sync_balance: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim)
        check_routing(heads, shared, active, "learned", gating, straight_through=False)
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.shared, self.active, self.sync_balance = shared, active, sync_balance
        self.gating: Gating = gating
        width = heads * head_dim
        self.query = nn.Linear(dim, width, bias=qkv_bias)
        self.key = nn.Linear(dim, width, bias=qkv_bias)
        self.value = nn.Linear(dim, width, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.expm1(FIRST_HEAT))))
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, head_dim))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.offset_bias = OffsetBias(heads, trained_on=trained_on)
        self.route = nn.Linear(dim, heads - shared, bias=False) if active else None
        self.share = nn.Linear(dim, shared, bias=False) if shared > 1 else None
        self.kind = nn.Linear(dim, 2, bias=False) if active and shared else None
        self.attend = Attend(scale=1.0, dropout=dropout, impl=impl)
        self.out = nn.Linear(width, dim, bias=out_bias)

    def forward(self, x: Float[Tensor, "b y x c"]) -> Mixture:
        """Attend.

        Args:
            x: A map of tokens.

        Raises:
            ValueError: Another shape, or no token at all.
            TypeError: Another type than that of the weights.
        """
        if x.dim() != 4 or x.shape[3] != self.dim:
            raise ValueError(f"x must be (batch, rows, columns, {self.dim}), got {tuple(x.shape)}")
        check_some(x=x)
        check_type(self.query, x=x)
        tokens = x.flatten(1, 2)
        route, share, kind = (
            None if layer is None else matrix_and_bias(layer)[0]
            for layer in (self.route, self.share, self.kind)
        )
        routing = mixture_gates(
            tokens, route, share, kind,
            shared=self.shared, active=self.active, gating=self.gating,
        )  # fmt: skip
        mixed = self._mixed(x, F.normalize(self._heads(self.query(tokens)), dim=-1))
        gated = gate_heads(mixed, routing.gates.transpose(1, 2)).transpose(1, 2).flatten(2)
        loss = balance_loss(routing.probabilities, routing.chosen, None, sync=self.sync_balance)
        gates = routing.gates.reshape(*x.shape[:3], self.heads)
        return Mixture(cast(Tensor, self.out(gated)).reshape(x.shape), loss, gates)

    def _mixed(self, x: Tensor, query: Tensor) -> Tensor:
        """What the heads give for queries of length 1, (b, h, n, d)."""
        tokens, shape = x.flatten(1, 2), (x.shape[1], x.shape[2])
        key = F.normalize(self._heads(self.key(tokens)), dim=-1)
        bias = self.offset_bias(shape)
        # as a tensor: a number would hold a graph to one size
        count = tokens.new_ones(tokens.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        mixed: Tensor = self.attend(
            self._heated(query, count.sum().log()),
            key,
            self._heads(self.value(tokens)),
            bias=bias.to(query.dtype),
        )
        return mixed

    def _heated(self, query: Tensor, logarithm: Tensor) -> Tensor:
        """Queries for the scores, of the logarithm of their numbers of keys."""
        heat = F.softplus(at_least_float32(self.temperature)) * logarithm
        return (query + self.query_embedding) * heat.to(query.dtype)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(*tokens.shape[:2], self.heads, self.head_dim).transpose(1, 2)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, shared={self.shared}, "
            f"active={self.active}, gating={self.gating!r}"
        )


class PooledCosineMixture(CosineMixture):
    """The same for large maps: each place attends to its neighbours and to a pooled map.

    Args:
        dim: As in `CosineMixture`.
        heads: As in `CosineMixture`.
        shared: As in `CosineMixture`.
        active: As in `CosineMixture`.
        pool: The pooled map is so many times smaller on each side, and has one place at least.
        head_dim: As in `CosineMixture`.
        qkv_bias: As in `CosineMixture`.
        out_bias: As in `CosineMixture`.
        dropout: As in `CosineMixture`.
        gating: As in `CosineMixture`.
        trained_on: As in `CosineMixture`.
        sync_balance: As in `CosineMixture`.
        impl: As in `CosineMixture`.

    Example:
        >>> mixture = PooledCosineMixture(32, heads=4, shared=2, active=1, pool=2)
        >>> mixture(torch.randn(1, 6, 8, 32)).output.shape
        torch.Size([1, 6, 8, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        shared: int,
        active: int,
        pool: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        gating: Gating = "code",
        trained_on: tuple[int, int] | None = None,
        sync_balance: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            dim, heads=heads, shared=shared, active=active, head_dim=head_dim, qkv_bias=qkv_bias,
            out_bias=out_bias, dropout=dropout, gating=gating, trained_on=trained_on,
            sync_balance=sync_balance, impl=impl,
        )  # fmt: skip
        if pool < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        self.pool = pool
        self.reduce = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.window_bias = nn.Parameter(torch.empty(heads, WINDOW))
        self.window_tokens = nn.Parameter(torch.empty(heads, self.head_dim, WINDOW))
        self.window_shift = nn.Parameter(torch.zeros(heads, 1, WINDOW))
        nn.init.trunc_normal_(self.window_bias, std=0.0004)
        nn.init.trunc_normal_(self.window_tokens, std=0.02)

    def _mixed(self, x: Tensor, query: Tensor) -> Tensor:
        tokens, shape = x.flatten(1, 2), (x.shape[1], x.shape[2])
        inside = _around(x.new_ones(1, 1, *shape, 1)).squeeze(-1).flatten(2, 3).bool()  # 1 1 n 9
        few, small = self._pooled(x)
        count = inside.sum(-1, keepdim=True) + few.shape[1]
        heated = self._heated(query, count.to(torch.promote_types(x.dtype, torch.float32)).log())
        near_key, near = (
            _around(rows.reshape(*rows.shape[:2], *shape, self.head_dim)).flatten(2, 3)
            for rows in (F.normalize(self._heads(self.key(tokens)), dim=-1),
                         self._heads(self.value(tokens)))
        )  # fmt: skip
        close = (heated.unsqueeze(-2) * near_key).sum(-1) + self.window_bias[:, None]
        close = close.masked_fill(~inside, -torch.inf)
        far = self.offset_bias(shape, small).to(close.dtype).expand(x.shape[0], -1, -1, -1)
        mixed: Tensor = self.attend(
            heated, *self._far(few), bias=torch.cat([close, far], dim=-1), causal=False
        )
        own = mixed[..., :WINDOW] + query @ self.window_tokens + self.window_shift
        return (own.unsqueeze(-1) * near).sum(-2) + mixed[..., WINDOW:]

    def _far(self, few: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the pooled map behind stand-ins for the window.

        Its scores are given as a bias, and each of its places has a channel of the values, where
        its weight arrives.
        """
        key, value = F.normalize(self._heads(self.key(few)), dim=-1), self._heads(self.value(few))
        one = torch.eye(WINDOW, dtype=value.dtype, device=value.device)
        one = F.pad(one, (0, self.head_dim)).expand(*value.shape[:2], -1, -1)
        key = F.pad(key, (0, 0, WINDOW, 0))
        return key, torch.cat([one, F.pad(value, (WINDOW, 0))], dim=2)

    def _pooled(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The tokens of the pooled map (b, p, c), and its sides."""
        small = max(1, x.shape[1] // self.pool), max(1, x.shape[2] // self.pool)
        reduced = F.gelu(self.reduce(x)).movedim(-1, 1)
        rows = F.adaptive_avg_pool2d(reduced, small).flatten(2).mT
        return cast(Tensor, self.norm(rows)), small

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"{super().extra_repr()}, pool={self.pool}"


def _around(rows: Float[Tensor, "b h y x d"]) -> Float[Tensor, "b h y x 9 d"]:
    """The 3 x 3 places around each place, row by row; zeros outside of the map."""
    height, width = rows.shape[2:4]
    padded = F.pad(rows, (0, 0, 1, 1, 1, 1))
    parts = [
        padded[:, :, down : down + height, right : right + width]
        for down in range(3)
        for right in range(3)
    ]
    return torch.stack(parts, dim=4)


def cosine_mixture_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published vision model's two attentions.

    Their tables of offsets are no weights: they follow from the sides of the map.

    Raises:
        ValueError: A name that they do not have.
    """
    alone = {
        "temperature": "temperature",
        "query_embedding": "query_embedding",
        "relative_pos_bias_local": "window_bias",
        "learnable_tokens": "window_tokens",
        "learnable_bias": "window_shift",
    }
    layers = {"cpb_fc1": "offset_bias.enter", "cpb_fc2": "offset_bias.leave", "q": "query"}
    layers |= {"sr": "reduce", "norm": "norm"}
    result, rest = {}, {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name in alone:
            result[alone[name]] = tensor
        elif module == "kv":
            parts = zip(("key", "value"), tensor.chunk(2), strict=True)
            result |= {f"{part}.{kind}": rows for part, rows in parts}
        elif module in layers:
            whole = tensor.flatten(1) if module == "sr" and kind == "weight" else tensor
            result[f"{layers[module]}.{kind}"] = whole
        else:
            rest[name] = tensor
    return {**result, **mixture_from_dit(rest)}
