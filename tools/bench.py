"""The core's own benchmarks: attend beside torch, position attention beside its naive form.

python tools/bench.py [attend|position|all]
python tools/bench.py scanpaths     beside multimatch-gaze, where it is installed
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from heed_core import attend
from heed_core.attention.position import PositionAttention
from heed_core.sites import Attend, use_impl
from heed_core.testing.benchmark import Measurement, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def bench_attend() -> None:
    """`attend` with nothing attached costs what torch's own call costs."""
    shape = (1, 8, 1024, 64)
    query, key, value = (torch.randn(shape, device=DEVICE) for _ in range(3))
    site = Attend()
    contenders = {
        "torch scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
            query, key, value
        ),
        "heed attend": lambda: attend(query, key, value),
        "heed Attend, nothing attached": lambda: site(query, key, value),
        "heed attend, reference": lambda: attend(query, key, value, impl="reference"),
    }
    with torch.no_grad():
        show(f"softmax attention {shape}", measure(contenders, rounds=60, device=DEVICE))


def bench_position() -> None:
    """MSGA's position attention at a 256 x 256 image: 64 channels on a 64 x 64 map."""
    for batch in (1, 4):
        bench_position_of(batch)


def bench_position_of(batch: int) -> None:
    """Beside the form that holds the whole map of weights."""
    x = torch.randn(batch, 64, 64, 64, device=DEVICE, requires_grad=True)
    fused, naive = (PositionAttention(64, gamma=0.5).to(DEVICE) for _ in range(2))
    use_impl(naive, "reference")
    title = f"position attention, batch {batch}, 64 channels on 64 x 64"
    forward = {"heed": lambda: fused(x), "naive": lambda: naive(x)}
    with torch.no_grad():
        show(f"{title}, forward", measure(forward, rounds=10, warmup=2, device=DEVICE))
    both = {"heed": step(fused, x), "naive": step(naive, x)}
    show(f"{title}, forward + backward", measure(both, rounds=10, warmup=2, device=DEVICE))


def step(module: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward and backward."""
    return lambda: module(x).square().mean().backward()


def show(title: str, found: list[Measurement]) -> None:
    """Print one table."""
    print(f"\n{title}, {torch.get_num_threads()} threads, {DEVICE}")
    print(f"  {'':36}{'ms':>9}{'iqr':>8}{'ratio':>8}{'peak MiB':>10}")
    for one in found:
        print(
            f"  {one.name:36}{1e3 * one.median_s:9.2f}{1e3 * one.iqr_s:8.2f}"
            f"{one.ratio:8.3f}{one.peak_mib:10.1f}"
        )


def bench_scanpaths() -> None:
    """MultiMatch of 10,000 pairs of 15 fixations; the library takes them one by one."""
    import importlib.util
    import warnings

    import numpy as np

    from heed_gaze.metrics.multimatch import multimatch
    from heed_gaze.metrics.simplification import Simplification
    from heed_gaze.scanpaths import Scanpath

    size, rng = (800, 600), np.random.default_rng(0)
    first, second = (
        [
            Scanpath(
                image="",
                subject="",
                xy_px=rng.uniform((0.0, 0.0), size, (15, 2)),
                duration_s=rng.uniform(0.1, 0.5, 15),
            )
            for _ in range(10_000)
        ]
        for _ in range(2)
    )
    contenders: dict[str, Callable[[], object]] = {
        "heed": lambda: multimatch(first, second, size_px=size),
        "heed, simplified": lambda: multimatch(
            first, second, size_px=size, simplification=Simplification()
        ),
    }
    if importlib.util.find_spec("multimatch_gaze"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from multimatch_gaze import docomparison
        records = [
            [
                np.rec.fromarrays(
                    [*path.xy_px.T, path.duration_s], names="start_x,start_y,duration"
                )
                for path in side
            ]
            for side in (first, second)
        ]
        contenders["multimatch-gaze"] = lambda: [
            docomparison(a, b, list(size)) for a, b in zip(*records, strict=True)
        ]
    show("MultiMatch, 10,000 pairs", measure(contenders, rounds=1, warmup=0, memory=False))


BENCHES = {"attend": bench_attend, "position": bench_position}
ON_DEMAND = {"scanpaths": bench_scanpaths}

if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "all"
    for name, bench in BENCHES.items():
        if chosen in (name, "all"):
            bench()
    if chosen in ON_DEMAND:
        ON_DEMAND[chosen]()
