"""HEED_CHECK_FINITE=1 names the first call that is given NaN or infinity."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from heed_core import attend
from heed_core.attention.mixture_of_heads import MixtureOfHeads
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.spectral import SpectralGate

CALL = """
import torch
from heed_core import attend
x = torch.ones(1, 1, 3, 2)
x[0, 0, 1, 1] = torch.nan
attend(torch.ones_like(x), x, torch.ones_like(x))
"""


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heed_core.tokens.CHECK_FINITE", True)


def spoilt(*shape: int, value: float = torch.nan) -> torch.Tensor:
    x = torch.ones(shape)
    x.flatten()[-1] = value
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_attend_names_the_argument(name: str, value: float, checking: None) -> None:
    given = {each: torch.ones(1, 2, 3, 4) for each in ("query", "key", "value")}
    given[name] = spoilt(1, 2, 3, 4, value=value)
    with pytest.raises(ValueError, match=rf"^{name} must be finite.* 1 of 24 .*\(0, 1, 2, 3\)"):
        attend(**given)


def test_modules_name_the_argument(checking: None) -> None:
    modules: list[tuple[nn.Module, tuple[int, ...]]] = [
        (MultiHeadAttention(8, heads=2), (1, 3, 8)),
        (MixtureOfHeads(8, heads=2, shared=1, active=1), (1, 3, 8)),
        (SpectralGate(8, grid=(4, 4)), (1, 4, 4, 8)),
    ]
    for module, shape in modules:
        module(torch.ones(shape))
        with pytest.raises(ValueError, match=r"^x must be finite"):
            module(spoilt(*shape))


@pytest.mark.parametrize("kind", [MultiHeadAttention, MixtureOfHeads])
def test_a_bias_may_forbid(kind: type[nn.Module], checking: None) -> None:
    more = {"shared": 1, "active": 1} if kind is MixtureOfHeads else {}
    bias = torch.zeros(3, 3)
    bias[0, 1] = -torch.inf
    kind(8, heads=2, **more)(torch.ones(1, 3, 8), bias=bias)


@pytest.mark.parametrize(("given", "refused"), [("1", True), ("0", False)])
def test_the_environment_decides(given: str, refused: bool) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", CALL],
        env=os.environ | {"HEED_CHECK_FINITE": given},
        capture_output=True,
        text=True,
    )
    assert (finished.returncode != 0) is refused, finished.stderr
    assert ("key must be finite (HEED_CHECK_FINITE=1)" in finished.stderr) is refused
