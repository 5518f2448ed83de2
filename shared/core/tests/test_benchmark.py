"""The measuring of time and memory: what it reports is what was spent."""

import time

import pytest
import torch

from heed_core.testing.benchmark import measure, peak_memory_mib


def test_a_slower_contender_has_the_larger_ratio() -> None:
    quick, slow = measure(
        {"quick": lambda: time.sleep(0.002), "slow": lambda: time.sleep(0.02)},
        rounds=5,
        warmup=1,
        memory=False,
    )
    assert (quick.name, slow.name, quick.ratio) == ("quick", "slow", 1.0)
    assert 3 < slow.ratio < 12
    assert slow.median_s >= 0.02
    assert len(slow.times_s) == 5
    assert slow.iqr_s >= 0


def test_peak_memory_is_that_of_the_call() -> None:
    def hold(mib: int) -> None:
        x = torch.ones(mib * 2**18)
        time.sleep(0.05)
        del x

    peaks = [peak_memory_mib(lambda mib=mib: hold(mib)) for mib in (16, 128)]
    assert peaks[0] == pytest.approx(16, abs=8)
    assert peaks[1] == pytest.approx(128, abs=16)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="contenders must name"):
        measure({})
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        measure({"a": lambda: None}, rounds=0)
