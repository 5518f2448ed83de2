"""The network learns: eight slices by heart."""

import pytest
import torch
from torch import Tensor

from heed_medical.msga import Msga, MsgaConfig, msga_loss


def slices(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Noisy slices with two discs and an ellipse, a class each, and their labels."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.zeros(count, size, size, dtype=torch.long)
    shapes = (((0.25, 0.3), (0.12, 0.12)), ((0.7, 0.3), (0.16, 0.16)), ((0.5, 0.7), (0.3, 0.12)))
    for slice_labels in labels:
        for label, ((y, x), (height, width)) in enumerate(shapes, start=1):
            shift = (torch.rand(2, generator=generator) - 0.5) * 0.1
            inside = ((rows / size - y - shift[0]) / height) ** 2 + (
                (columns / size - x - shift[1]) / width
            ) ** 2
            slice_labels[inside < 1] = label
    grey = torch.tensor([0.1, 0.4, 0.6, 0.8])[labels]
    noise = 0.05 * torch.randn(labels.shape, generator=generator)
    return (grey + noise).clamp(0, 1)[:, None], labels


def foreground_dice(logits: Tensor, labels: Tensor) -> float:
    found = logits.argmax(1)
    scores = [
        2 * ((found == k) & (labels == k)).sum() / ((found == k).sum() + (labels == k).sum())
        for k in (1, 2, 3)
    ]
    return float(torch.stack(scores).mean())


@pytest.mark.slow
def test_eight_slices_are_learnt_by_heart() -> None:
    torch.manual_seed(0)
    images, labels = slices(8, 64)
    model = Msga(MsgaConfig(backbone="resnet18", classes=4))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    best = 0.0
    for step in range(1, 151):
        model.train()
        optimiser.zero_grad()
        msga_loss(model(images), labels).total.backward()
        optimiser.step()
        if step % 25 == 0:
            with torch.no_grad():
                best = max(best, foreground_dice(model.eval()(images), labels))
            if best > 0.95:
                break
    assert best > 0.95
