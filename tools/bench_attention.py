"""Every mechanism of the core beside its peers: time and peak memory, forward and training step.

    python tools/bench_attention.py [NAME...] [--rounds 20] [--write DIR]

Peers are torch's own attention, timm, x-transformers, and plain forms of a formula written here.
Without names all cases run, then time and memory of the token mechanisms against the length.
`--write` adds attention.json and the plots, which the catalogue of mechanisms shows.
"""

import argparse
import json
import math
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed_core.attention.axial import MultiAxisAxialAttention
from heed_core.attention.bilevel import BilevelAttention, region_topk, routed_attention
from heed_core.attention.bounded_memory import BoundedMemoryAttention
from heed_core.attention.complex import ComplexAttention
from heed_core.attention.connectivity import ConnectivityAttention
from heed_core.attention.context_mixing import neighborhood_av
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
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.nystrom import NystromAttention
from heed_core.attention.performer import PerformerAttention
from heed_core.attention.prob_sparse import ProbSparseAttention
from heed_core.attention.randomized import RandomizedAttention
from heed_core.attention.reduced import ReducedAttention
from heed_core.attention.relative_conv import RelativeConvAttention
from heed_core.attention.spectral import SpectralGate
from heed_core.attention.tensor import tensor_attention
from heed_core.testing.benchmark import Measurement, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, HEADS = 512, 8
LENGTHS = (512, 1024, 2048, 4096)
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
"""Mechanisms of tokens, measured against the length."""


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
            shape=tokens(4096, 256),
            modules={
                "heed, chunked": partial(DeltaRuleAttention, 256, heads=4),
                "heed, recurrent": partial(DeltaRuleAttention, 256, heads=4, form="recurrent"),
            },
            train=False,
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
            train=False,
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


def run(name: str, case: Case, rounds: int) -> list[dict[str, object]]:
    """Measure a case, print its table, and return its rows."""
    torch.manual_seed(0)
    x = torch.randn(case.shape, device=DEVICE)
    modules = {title: build().to(DEVICE) for title, build in case.modules.items()}
    rows = []
    for what in ("forward", "training step")[: 1 + case.train]:
        if what == "forward":
            calls = {t: partial(forward, m.eval(), x) for t, m in modules.items()}
        else:
            calls = {t: partial(step, m.train(), x) for t, m in modules.items()}
        found = measure(calls, rounds=rounds, device=DEVICE)
        for one in found:
            rows.append(
                {
                    "mechanism": name,
                    "shape": list(case.shape),
                    "what": what,
                    "name": one.name,
                    "ms": round(1e3 * one.median_s, 3),
                    "ratio": round(one.ratio, 3),
                    "peak_mib": round(one.peak_mib, 1),
                    "asked": "",
                }
            )
        if what == "forward":
            rows[0]["asked"] = verdict(case.asked, found)
        for row in rows[-len(found) :]:
            print(
                "{mechanism:24} {what:14} {name:28} {ms:9.2f} {ratio:7.2f} {peak_mib:8.1f}  "
                "{asked}".format(**row)
            )
    return rows


def verdict(asked: Asked, found: list[Measurement]) -> str:
    """What was asked of ours and what it takes, in words; empty if nothing was."""
    said = []
    if asked.time is not None:
        share = 1 / found[1].ratio
        said.append(f"{share:.2f} of {found[1].name}, asked {asked.time:g} at most")
    if asked.peak_mib is not None:
        said.append(f"{found[0].peak_mib:.1f} MiB, asked {asked.peak_mib:.1f} at most")
    return "; ".join(said)


@torch.no_grad()
def forward(module: nn.Module, x: Tensor) -> object:
    """One answer."""
    return module(x)


def step(module: nn.Module, x: Tensor) -> None:
    """Forward and backward, to the input and all parameters."""
    leaf = x.detach().requires_grad_()
    found = module(leaf)
    answer = found if isinstance(found, Tensor) else found[0]
    answer.square().mean().backward()
    module.zero_grad(set_to_none=True)


def growth(rounds: int) -> list[dict[str, object]]:
    """Time and memory of the token mechanisms, forward, against the length."""
    rows = []
    names: Modules = {"exact attention": full, **LONG}
    for length in LENGTHS:
        x = torch.randn(tokens(length), device=DEVICE)
        calls = {n: partial(forward, build().to(DEVICE).eval(), x) for n, build in names.items()}
        for one in measure(calls, rounds=max(3, rounds // 4), warmup=1, device=DEVICE):
            rows.append(
                {
                    "name": one.name,
                    "length": length,
                    "ms": round(1e3 * one.median_s, 3),
                    "peak_mib": round(one.peak_mib, 1),
                }
            )
    return rows


def overtaking(rows: list[dict[str, object]]) -> dict[str, int | None]:
    """From which measured length on a mechanism is faster than exact attention; None: not yet."""
    exact = {row["length"]: row["ms"] for row in rows if row["name"] == "exact attention"}
    found: dict[str, int | None] = {}
    for name in LONG:
        mine = {row["length"]: row["ms"] for row in rows if row["name"] == name}
        faster = [length for length in LENGTHS if mine[length] < exact[length]]  # type: ignore[operator]
        lasting = [n for n in faster if all(m in faster for m in LENGTHS if m >= n)]
        found[name] = min(lasting) if lasting else None
    return found


def draw(rows: list[dict[str, object]], folder: Path) -> None:
    """Two plots: time and memory against the length."""
    from heed_runtime.report import new_figure, save_figure, style

    for key, label in (("ms", "forward, ms"), ("peak_mib", "peak memory, MiB")):
        with style():
            figure = new_figure(width_in=8.0, height_in=5.0)
            axes = figure.add_subplot()
            for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
                mine = [row for row in rows if row["name"] == name]
                line = "--" if name == "exact attention" else ("-", ":")[number % 2]
                axes.plot(
                    [row["length"] for row in mine],
                    [max(float(row[key]), 0.1) for row in mine],  # type: ignore[arg-type]
                    line,
                    marker="os^DvPX"[number % 7],
                    label=name,
                )
            axes.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
            axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
            axes.set_xticks([], minor=True)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
            save_figure(figure, folder / f"attention_{'time' if key == 'ms' else 'memory'}.png")


def yardstick() -> float:
    """Milliseconds of torch's attention on (1, 8, 1024, 64), to compare machines by."""
    q = torch.randn(1, 8, 1024, 64, device=DEVICE)
    call = {"sdpa": lambda: F.scaled_dot_product_attention(q, q, q)}
    return round(1e3 * statistics.median(measure(call, device=DEVICE)[0].times_s), 2)


def main() -> None:
    """Run, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases; all if none")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    known = cases()
    if unknown := set(options.names) - set(known):
        parser.error(f"no case {sorted(unknown)}; there are: {' '.join(known)}")
    print(f"{DEVICE}, {torch.get_num_threads()} threads, SDPA yardstick {yardstick()} ms")
    print(f"{'mechanism':24} {'what':14} {'name':28} {'ms':>9} {'ratio':>7} {'MiB':>8}")
    rows = [
        row
        for name, case in known.items()
        if not options.names or name in options.names
        for row in run(name, case, options.rounds)
    ]
    if options.names:
        return
    grown = growth(options.rounds)
    faster = overtaking(grown)
    for name, length in faster.items():
        print(f"{name:24} faster than exact attention from {length or f'above {LENGTHS[-1]}'} on")
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
        facts = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {DEVICE}",
            "torch": torch.__version__,
            "rounds": options.rounds,
            "sdpa_ms": yardstick(),
            "cases": rows,
            "growth": grown,
            "faster_from": faster,
        }
        (options.write / "attention.json").write_text(json.dumps(facts, indent=1) + "\n")
        draw(grown, options.write)


if __name__ == "__main__":
    main()
