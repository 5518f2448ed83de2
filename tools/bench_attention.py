"""Every mechanism of the core beside its peers: time and peak memory, forward and training step.

    python tools/bench_attention.py [NAME...] [--rounds 20] [--write DIR]

Without names all cases of `attention_cases.py` run, then time and memory of the mechanisms of
tokens against the length, and of those of maps against the side. `--write` adds attention.json and
the plots, which the catalogue of mechanisms shows.
"""

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from attention_cases import LENGTHS, SIDES, Asked, Case, Modules, cases, of_length, of_side, tokens
from torch import Tensor, nn

from heed_core.testing.benchmark import Measurement, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
                    "iqr_ms": round(1e3 * one.iqr_s, 3),
                    "ratio": round(one.ratio, 3),
                    "peak_mib": round(one.peak_mib, 1),
                    "error": None,
                    "asked": "",
                }
            )
        if what == "forward":
            rows[0]["asked"] = verdict(case.asked, found)
            rows[0]["error"] = float(f"{rounding(next(iter(modules.values())), x):.2g}")
        for row in rows[-len(found) :]:
            print(
                "{mechanism:24} {what:14} {name:28} {ms:9.2f} {iqr_ms:7.2f} {ratio:7.2f} "
                "{peak_mib:8.1f}  {asked}".format(**row)
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
def rounding(module: nn.Module, x: Tensor) -> float:
    """The largest error of a float32 answer beside that in float64, over the largest value."""
    exact = answer_of(copy.deepcopy(module).double()(x.double()))
    return float((answer_of(module(x)) - exact).abs().max() / exact.abs().max())


def answer_of(found: object) -> Tensor:
    """The first output."""
    answer = found if isinstance(found, Tensor) else found[0]  # type: ignore[index]
    assert isinstance(answer, Tensor)
    return answer


@torch.no_grad()
def forward(module: nn.Module, x: Tensor) -> object:
    """One answer."""
    return module(x)


def step(module: nn.Module, x: Tensor) -> None:
    """Forward and backward, to the input and all parameters."""
    leaf = x.detach().requires_grad_()
    answer_of(module(leaf)).square().mean().backward()
    module.zero_grad(set_to_none=True)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Mechanisms of one kind of input, at growing sizes."""

    of: str
    """What grows, for the axis of the plots."""
    sizes: tuple[int, ...]
    shape: Callable[[int], tuple[int, ...]]
    modules: Callable[[int], Modules]
    """At a size; the first is exact attention."""


FAMILIES = {
    "tokens": Family(of="tokens", sizes=LENGTHS, shape=tokens, modules=of_length),
    "maps": Family(
        of="cells along a side", sizes=SIDES, shape=lambda n: (1, n, n, 64), modules=of_side
    ),
}


def growth(family: Family, rounds: int) -> list[dict[str, object]]:
    """Time and memory of a family, forward, against the size."""
    rows = []
    for size in family.sizes:
        x = torch.randn(family.shape(size), device=DEVICE)
        modules = family.modules(size)
        calls = {n: partial(forward, build().to(DEVICE).eval(), x) for n, build in modules.items()}
        for one in measure(calls, rounds=rounds, warmup=1, device=DEVICE):
            rows.append(
                {
                    "name": one.name,
                    "size": size,
                    "ms": round(1e3 * one.median_s, 3),
                    "peak_mib": round(one.peak_mib, 1),
                }
            )
    return rows


def overtaking(rows: list[dict[str, object]]) -> dict[str, int | None]:
    """From which measured size on a mechanism is faster than exact attention; None: not yet."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        times.setdefault(str(row["name"]), {})[int(row["size"])] = float(row["ms"])  # type: ignore[call-overload, arg-type]
    exact = times.pop("exact attention")
    found: dict[str, int | None] = {}
    for name, mine in times.items():
        slower = [size for size in exact if mine[size] >= exact[size]]
        lasting = [size for size in exact if size > max(slower, default=0)]
        found[name] = min(lasting, default=None)
    return found


def draw(name: str, family: Family, rows: list[dict[str, object]], folder: Path) -> None:
    """Two plots: time and memory against the size."""
    from heed_runtime.report import new_figure, save_figure, style

    for key, label in (("ms", "forward, ms"), ("peak_mib", "peak memory, MiB")):
        with style():
            figure = new_figure(width_in=8.0, height_in=5.0)
            axes = figure.add_subplot()
            for number, title in enumerate(dict.fromkeys(row["name"] for row in rows)):
                mine = [row for row in rows if row["name"] == title]
                line = "--" if title == "exact attention" else ("-", ":", "-.")[number // 7]
                axes.plot(
                    [row["size"] for row in mine],
                    [max(float(row[key]), 0.1) for row in mine],  # type: ignore[arg-type]
                    line,
                    marker="os^DvPX"[number % 7],
                    label=title,
                )
            axes.set(xlabel=family.of, ylabel=label, xscale="log", yscale="log")
            axes.set_xticks(family.sizes, [str(n) for n in family.sizes])
            axes.set_xticks([], minor=True)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
            save_figure(figure, folder / f"{name}_{'time' if key == 'ms' else 'memory'}.png")


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
    print(f"{'mechanism':24} {'what':14} {'name':28} {'ms':>9} {'iqr':>7} {'ratio':>7} {'MiB':>8}")
    rows = [
        row
        for name, case in known.items()
        if not options.names or name in options.names
        for row in run(name, case, options.rounds)
    ]
    if options.names:
        return
    grown = {name: growth(family, options.rounds) for name, family in FAMILIES.items()}
    faster = {name: overtaking(rows) for name, rows in grown.items()}
    for name, family in FAMILIES.items():
        for mechanism, size in faster[name].items():
            beyond = f"above {family.sizes[-1]}"
            print(f"{mechanism:24} faster than exact attention from {size or beyond} {family.of}")
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
        for name, family in FAMILIES.items():
            draw(name, family, grown[name], options.write)


if __name__ == "__main__":
    main()
