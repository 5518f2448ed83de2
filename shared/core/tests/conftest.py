"""Every test of the core: its own seed, one thread, and uninitialised memory that shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN, so that reading it before writing is seen."""

    def filling(make):
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            if (
                made.device.type != "meta"
                and made.is_floating_point()
                and type(made) is torch.Tensor
            ):
                made.data.fill_(torch.nan)
            return made

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filling(getattr(owner, name)))
