"""What `bench_attention.py` measures: every mechanism of the core beside its peers.

Peers are torch's own attention, timm, x-transformers, and plain forms of a formula written here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed_core.attention.axial import MultiAxisAxialAttention
from heed_core.attention.bilevel import BilevelAttention, region_topk, routed_attention
from heed_core.attention.bounded_memory import BoundedMemoryAttention
from heed_core.attention.causal_long_short import CausalLongShortAttention
from heed_core.attention.class_attention import ClassAttentionBlock
from heed_core.attention.complex import ComplexAttention
from heed_core.attention.conditional import ConditionalCrossAttention
from heed_core.attention.connectivity import ConnectivityAttention
from heed_core.attention.context_mixing import ContextMixing, neighborhood_av
from heed_core.attention.cosformer import CosformerAttention
from heed_core.attention.delta_rule import DeltaRuleAttention
from heed_core.attention.diagonal_state import DiagonalStateMixer
from heed_core.attention.dynamic_mask import DynamicMaskAttention
from heed_core.attention.enhanced_linear import EnhancedLinearAttention
from heed_core.attention.gaussian import GaussianAttention
from heed_core.attention.linear import LinearAttention
from heed_core.attention.local import LocalAttention
from heed_core.attention.long_short import LongShortAttention
from heed_core.attention.mixture_of_heads import MixtureOfHeads
from heed_core.attention.multi_axis import PartitionBlock
from heed_core.attention.multi_axis_mlp import CrossGating, MultiAxisMlp
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.nystrom import NystromAttention
from heed_core.attention.performer import PerformerAttention
from heed_core.attention.prob_sparse import ProbSparseAttention
from heed_core.attention.randomized import RandomizedAttention
from heed_core.attention.reduced import ReducedAttention
from heed_core.attention.relative_conv import RelativeConvAttention
from heed_core.attention.spectral import SpectralGate
from heed_core.attention.tensor import tensor_attention

WIDTH, HEADS = 512, 8
Modules = Mapping[str, Callable[[], nn.Module]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What ours may take at most, forwards."""

    time: float | None = None
    """Over that of the second module."""
    peak_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """Modules at one input; the first is ours."""

    shape: tuple[int, ...]
    modules: Modules
    train: bool = True
    asked: Asked = Asked()


def tokens(length: int, width: int = WIDTH) -> tuple[int, ...]:
    """One sequence."""
    return (1, length, width)


def full(width: int = WIDTH, heads: int = HEADS, *, causal: bool = False) -> nn.Module:
    """Exact attention."""
    return MultiHeadAttention(width, heads=heads, causal=causal)


class Own(nn.Module):
    """A module whose answer is its first output."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Tensor:
        """The tensor."""
        found = self.call(self.inner, x)
        answer = found if isinstance(found, Tensor) else found[0]  # type: ignore[index]
        assert isinstance(answer, Tensor)
        return answer


class Formula(nn.Module):
    """A function of the input and parameters."""

    def __init__(self, call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.call = call
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s) * 0.02) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.call(x, *self.weights)


def torch_attention(width: int = WIDTH, heads: int = HEADS) -> nn.Module:
    """The module of torch itself."""
    inner = nn.MultiheadAttention(width, heads, batch_first=True)
    return Own(inner, lambda layer, x: layer(x, x, x, need_weights=False))


def x_transformers_attention(width: int = WIDTH, heads: int = HEADS) -> nn.Module:
    """x-transformers' module with its fused path."""
    from x_transformers.x_transformers import Attention

    return Own(
        Attention(width, heads=heads, dim_head=width // heads, flash=True), lambda m, x: m(x)
    )


def timm_attention(width: int, heads: int) -> nn.Module:
    """The attention of vision transformers in timm."""
    from timm.layers import Attention

    return Attention(width, num_heads=heads, qkv_bias=True)


def timm_class_attention() -> nn.Module:
    """The block of CaiT in timm, which returns the class token alone."""
    from timm.models.cait import LayerScaleBlockClassAttn

    block = LayerScaleBlockClassAttn(384, 6, qkv_bias=True, init_values=1e-4)
    return Own(block, lambda inner, x: torch.cat([inner(x[:, 1:], x[:, :1]), x[:, 1:]], dim=1))


def torch_queries(width: int, heads: int, queries: int) -> nn.Module:
    """Learned queries of torch's module, which ask the tokens."""
    inner = nn.MultiheadAttention(width, heads, batch_first=True)
    inner.register_parameter("asked", nn.Parameter(torch.randn(1, queries, width)))

    def call(layer: nn.Module, x: Tensor) -> object:
        asked = layer.asked.expand(x.shape[0], -1, -1)
        return layer(asked, x, x, need_weights=False)

    return Own(inner, call)


def gated_by_itself() -> nn.Module:
    """Cross-gating of a map with itself."""
    return Own(CrossGating(64, block=(7, 7)), lambda inner, x: inner(x, x))


def timm_partition(mode: str) -> nn.Module:
    """The block of MaxViT in timm, with the activation of its published weights and of ours."""
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    config = MaxxVitTransformerCfg(
        dim_head=32, window_size=(7, 7), grid_size=(7, 7), act_layer="gelu_tanh"
    )
    return PartitionAttentionCl(64, partition_type=mode, cfg=config)


def plain_spectral(x: Tensor, weight: Tensor) -> Tensor:
    """The filter in three lines."""
    frequencies = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
    gated = frequencies * torch.view_as_complex(weight)
    return torch.fft.irfft2(gated, s=x.shape[1:3], dim=(1, 2), norm="ortho")


def plain_gaussians(x: Tensor, offsets: Tensor, widths: Tensor) -> Tensor:
    """A product of Gaussians, one after the other."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
    weight = torch.ones_like(x)
    for offset, width in zip(offsets, widths + 1, strict=True):
        z = (x - mean - offset) ** 2 / (2 * width**2 * (var + 1e-8))
        weight = weight * (-z).exp() / (2 * torch.pi * width**2).sqrt()
    return x * weight / weight.sum(-1, keepdim=True).clamp(min=1e-8)


def neighbours(x: Tensor, weights: Tensor) -> Tensor:
    """Ours: 13 x 13 windows of a (1, 8, 14, 14, 32) map."""
    return neighborhood_av(weights.softmax(-1), x, kernel=13)


def plain_neighbours(x: Tensor, weights: Tensor) -> Tensor:
    """The same with all windows gathered at once."""
    starts = (torch.arange(14, device=x.device) - 6).clamp(0, 1)
    index = starts[:, None] + torch.arange(13, device=x.device)
    windows = x[:, :, index[:, None, :, None], index[None, :, None, :]]  # (b, g, h, w, k, k, c)
    return (weights.softmax(-1)[..., None] * windows.flatten(4, 5)).sum(-2)


def routed(x: Tensor) -> Tensor:
    """Ours: bi-level routing of 49 regions of 64 cells, two heads."""
    return routed_attention(x, x, x, region_topk(x, x, topk=1), heads=2)


def triples(x: Tensor) -> Tensor:
    """Ours: exact tensor attention of (1, 4, 512, 16)."""
    return tensor_attention(x, x, x, x, x)


def plain_triples(x: Tensor) -> Tensor:
    """With all n^3 scores at once."""
    scores = torch.einsum("bhic,bhjc,bhkc->bhijk", x, x, x) * x.shape[-1] ** -0.5
    weights = scores.flatten(-2).softmax(-1).view_as(scores)
    return torch.einsum("bhijk,bhjc,bhkc->bhic", weights, x, x)


def plain_states(width: int) -> nn.Module:
    """S4D with all powers of all states at once, and a convolution by transforms."""
    ours = DiagonalStateMixer(width)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, DiagonalStateMixer)
        length = x.shape[1]
        decay = torch.complex(-module.log_decay.exp(), module.frequency)
        rate = decay * module.log_step.exp()[:, None]
        first = torch.view_as_complex(module.coefficients) * torch.expm1(rate) / decay
        powers = (rate[..., None] * torch.arange(length, device=x.device)).exp()
        response = 2 * torch.einsum("rcm,cml->rcl", first, powers).real
        frequencies = torch.fft.rfft(x.mT, n=2 * length)[:, None]
        product = frequencies * torch.fft.rfft(response, n=2 * length)
        mixed = torch.fft.irfft(product, n=2 * length)[..., :length]
        mixed = mixed + module.skip[..., None] * x.mT[:, None]
        answer: Tensor = module.out(F.gelu(mixed).flatten(1, 2).mT)
        return answer

    return Own(ours, call)


def flat(module: nn.Module) -> nn.Module:
    """A token module on a map, channels last."""
    return Own(module, lambda inner, x: inner(x.flatten(1, -2)).view_as(x))


def channels_first(module: nn.Module) -> nn.Module:
    """A mixing of a map with itself as the context, channels last outside."""

    def call(inner: nn.Module, x: Tensor) -> Tensor:
        cells = x.movedim(-1, 1)
        mixed: Tensor = inner(cells, cells, cells)
        return mixed.movedim(1, -1)

    return Own(module, call)


def grid(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same, built later."""
    return lambda: flat(build())


LONG: Modules = {
    "local": partial(LocalAttention, WIDTH, heads=HEADS),
    "bounded_memory": partial(BoundedMemoryAttention, WIDTH, heads=HEADS),
    "performer": partial(PerformerAttention, WIDTH, heads=HEADS),
    "randomized": partial(RandomizedAttention, WIDTH, heads=HEADS),
    "cosformer": partial(CosformerAttention, WIDTH, heads=HEADS),
    "nystrom": partial(NystromAttention, WIDTH, heads=HEADS),
    "long_short": partial(LongShortAttention, WIDTH, heads=HEADS),
    "prob_sparse": partial(ProbSparseAttention, WIDTH, heads=HEADS),
    "linear": partial(LinearAttention, WIDTH, heads=HEADS),
    "delta_rule": partial(DeltaRuleAttention, WIDTH, heads=HEADS),
    "diagonal_state": partial(DiagonalStateMixer, WIDTH),
    "dynamic_mask": partial(DynamicMaskAttention, WIDTH, heads=HEADS, kv_heads=4, keep=256),
    "mixture_of_heads": partial(MixtureOfHeads, WIDTH, heads=16, shared=4, active=4),
}
"""Mechanisms of tokens."""

LENGTHS = (512, 1024, 2048, 4096)
SIDES = (14, 28, 56, 84)


def of_length(_: int) -> Modules:
    """Mechanisms of tokens at any length; the first is exact attention."""
    return {
        "exact attention": full,
        **LONG,
        "causal_long_short": partial(CausalLongShortAttention, WIDTH, heads=HEADS),
        "complex": partial(ComplexAttention, WIDTH, heads=HEADS),
        "relative_conv": partial(RelativeConvAttention, WIDTH, heads=HEADS),
        "reduced": partial(ReducedAttention, WIDTH, qk="collapsed", vo="none"),
    }


def of_side(side: int) -> Modules:
    """Mechanisms of maps at a side, 64 channels; the first is exact attention."""
    mixing = partial(ContextMixing, 64, context_dim=64, heads=4, kernel=13)
    return {
        "exact attention": grid(partial(full, 64, 2)),
        "multi_axis": partial(PartitionBlock, 64, heads=2, size=(7, 7), mode="block"),
        "bilevel": partial(BilevelAttention, 64, heads=2, regions=(7, 7), topk=1),
        "axial": partial(MultiAxisAxialAttention, 64, heads=2),
        "enhanced_linear": grid(partial(EnhancedLinearAttention, 64, heads=2)),
        "spectral": partial(SpectralGate, 64, grid=(side, side)),
        "multi_axis_mlp": partial(MultiAxisMlp, 64, block=(7, 7)),
        "context_mixing": lambda: channels_first(mixing()),
    }


def softmax_cases() -> dict[str, Case]:
    """Sequences: softmax of queries and keys."""
    return {
        "multi_head": Case(
            shape=tokens(1024),
            modules={
                "heed": full,
                "torch MultiheadAttention": torch_attention,
                "x-transformers": x_transformers_attention,
            },
        ),
        "mixture_of_heads": Case(
            shape=tokens(2048),
            modules={
                "heed, half of 16 heads": LONG["mixture_of_heads"],
                "all heads": partial(full, WIDTH, 16),
            },
            asked=Asked(time=0.7),
        ),
        "mixture_of_heads-vision": Case(
            shape=(8, 196, 384),
            modules={
                "heed": partial(MixtureOfHeads, 384, heads=16, shared=4, active=8),
                "timm, all heads": partial(timm_attention, 384, 16),
            },
        ),
        "dynamic_mask": Case(
            shape=tokens(8192),
            modules={
                "heed, 256 keys": LONG["dynamic_mask"],
                "exact, causal": partial(full, causal=True),
            },
            train=False,
            asked=Asked(time=0.3),
        ),
        "dynamic_mask-shorter": Case(
            shape=tokens(2048),
            modules={
                "heed, 256 keys": LONG["dynamic_mask"],
                "exact, causal": partial(full, causal=True),
            },
        ),
        "causal_long_short": Case(
            shape=tokens(2048),
            modules={
                "heed": partial(CausalLongShortAttention, WIDTH, heads=HEADS),
                "exact, causal": partial(full, causal=True),
            },
        ),
        "complex": Case(
            shape=tokens(512),
            modules={
                "heed": partial(ComplexAttention, WIDTH, heads=HEADS),
                "exact attention": full,
            },
        ),
        "relative_conv": Case(
            shape=tokens(512),
            modules={
                "heed": partial(RelativeConvAttention, WIDTH, heads=HEADS),
                "exact attention": full,
            },
        ),
        "reduced": Case(
            shape=tokens(1024, 64),
            modules={
                "heed, minimum": partial(ReducedAttention, 64, qk="collapsed", vo="none"),
                "all matrices": partial(ReducedAttention, 64),
            },
        ),
    }


def state_cases() -> dict[str, Case]:
    """Sequences: recurrences, and attention to pairs."""
    return {
        "delta_rule": Case(
            shape=tokens(2048, 256),
            modules={
                "heed, chunked": partial(DeltaRuleAttention, 256, heads=4),
                "heed, recurrent": partial(DeltaRuleAttention, 256, heads=4, form="recurrent"),
            },
        ),
        "diagonal_state": Case(
            shape=tokens(2048, 256),
            modules={
                "heed": partial(DiagonalStateMixer, 256),
                "all powers at once": partial(plain_states, 256),
            },
        ),
        "tensor": Case(
            shape=(1, 4, 512, 16),
            modules={"heed": partial(Formula, triples)},
            asked=Asked(peak_mib=300.0),
        ),
        "tensor-small": Case(
            shape=(1, 4, 96, 16),
            modules={"heed": partial(Formula, triples), "einsum": partial(Formula, plain_triples)},
        ),
    }


def grid_cases() -> dict[str, Case]:
    """Maps."""
    blocks = {
        f"multi_axis-{mode}": Case(
            shape=(8, 56, 56, 64),
            modules={
                "heed": partial(PartitionBlock, 64, heads=2, size=(7, 7), mode=mode),
                "timm": partial(timm_partition, mode),
            },
            asked=Asked(time=1.1),
        )
        for mode in ("block", "grid")
    }
    return blocks | {
        "bilevel": Case(
            shape=(4, 56, 56, 64),
            modules={
                "heed": partial(BilevelAttention, 64, heads=2, regions=(7, 7), topk=1),
                "exact attention": grid(partial(full, 64, 2)),
            },
        ),
        "bilevel-routing": Case(
            shape=(4, 49, 64, 64),
            modules={"heed, without projections": partial(Formula, routed)},
            asked=Asked(peak_mib=routed_mib((4, 49, 64, 64), regions=49, topk=1)),
        ),
        "axial": Case(
            shape=(2, 64, 64, 128),
            modules={
                "heed": partial(MultiAxisAxialAttention, 128, heads=8),
                "exact attention": grid(partial(full, 128, 8)),
            },
        ),
        "enhanced_linear": Case(
            shape=(4, 3136, 96),
            modules={
                "heed": partial(EnhancedLinearAttention, 96, heads=3),
                "exact attention": partial(full, 96, 3),
            },
        ),
    }


def mixing_cases() -> dict[str, Case]:
    """Maps and patches without a softmax of queries and keys, or with part of it."""
    return {
        "spectral": Case(
            shape=(8, 14, 14, 384),
            modules={
                "heed": partial(SpectralGate, 384, grid=(14, 14)),
                "three lines": partial(Formula, plain_spectral, (14, 8, 384, 2)),
            },
        ),
        "connectivity": Case(
            shape=(8, 197, 384),
            modules={
                "heed": partial(ConnectivityAttention, 384, heads=6, tokens=197),
                "timm, all pairs": partial(timm_attention, 384, 6),
            },
        ),
        "connectivity-long": Case(
            shape=(1, 2048, 384),
            modules={
                f"heed, {path}": partial(
                    ConnectivityAttention, 384, heads=6, tokens=2048, keep=0.015, path=path
                )
                for path in ("gather", "mask")
            }
            | {"exact attention": partial(full, 384, 6)},
            train=False,
        ),
        "class_attention": Case(
            shape=(8, 197, 384),
            modules={
                "heed": partial(ClassAttentionBlock, 384, heads=6, layer_scale=1e-4),
                "timm": timm_class_attention,
            },
        ),
        "conditional": Case(
            shape=(8, 197, 384),
            modules={
                "heed, 4 conditions": partial(
                    ConditionalCrossAttention, 384, heads=6, conditions=4
                ),
                "torch MultiheadAttention": partial(torch_queries, 384, 6, 4),
            },
        ),
        "context_mixing": Case(
            shape=(1, 8, 14, 14, 32),
            modules={
                "heed": partial(Formula, neighbours, (1, 8, 14, 14, 169)),
                "windows at once": partial(Formula, plain_neighbours, (1, 8, 14, 14, 169)),
            },
        ),
        "gaussian": Case(
            shape=(8, 196, 384),
            modules={
                "heed": partial(GaussianAttention, axis=-1, gaussians=5),
                "one by one": partial(Formula, plain_gaussians, (5,), (5,)),
            },
        ),
        "multi_axis_mlp": Case(
            shape=(2, 56, 56, 64),
            modules={
                "heed": partial(MultiAxisMlp, 64, block=(7, 7)),
                "exact attention": grid(partial(full, 64, 2)),
            },
        ),
        "cross_gating": Case(
            shape=(2, 56, 56, 64),
            modules={
                "heed": gated_by_itself,
                "exact attention": grid(partial(full, 64, 2)),
            },
        ),
    }


def cases() -> dict[str, Case]:
    """Name -> what is compared."""
    found = softmax_cases() | state_cases() | grid_cases() | mixing_cases()
    for name, build in LONG.items():
        if name not in found:
            modules = {"heed": build, "exact attention": full}
            found[name] = Case(shape=tokens(1024), modules=modules)
    return found


def routed_mib(shape: tuple[int, ...], *, regions: int, topk: int) -> float:
    """What may come on top of queries, keys and values.

    Together that is 1.5 times inputs and outputs, and the routing: affinities, and routes.
    """
    batch, each = shape[0], 4 * math.prod(shape)
    routing = 4 * batch * regions**2 + 8 * batch * regions * topk
    return (1.5 * 4 * each - 3 * each + routing) / 2**20
