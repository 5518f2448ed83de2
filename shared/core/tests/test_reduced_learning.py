"""Reduced attention learns digits: how little of a transformer is enough."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed_core.attention.reduced import ReducedAttention
from heed_core.blocks import FeedForward

DIM, DEPTH, EPOCHS, BATCH = 64, 3, 40, 128


class Layer(nn.Module):
    def __init__(self, mlp: bool, options: dict) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), ReducedAttention(DIM, **options)
        self.feed = nn.Sequential(nn.LayerNorm(DIM), FeedForward(DIM)) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x if self.feed is None else x + self.feed(x)


class Reader(nn.Module):
    """Patches of 2 x 2 of pictures of 8 x 8, layers, mean, class."""

    def __init__(self, mlp: bool, **options) -> None:
        super().__init__()
        self.embed = nn.Linear(4, DIM)
        self.places = nn.Parameter(torch.randn(16, DIM) * 0.02)
        self.layers = nn.Sequential(*[Layer(mlp, options) for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = F.unfold(pictures[:, None], 2, stride=2).mT
        return self.head(self.norm(self.layers(self.embed(patches) + self.places).mean(1)))


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 pictures that come with scikit-learn, in one random order."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(found.images, dtype=torch.float32)[order] / 16
    return pictures, torch.tensor(found.target)[order]


def accuracy_after_training(model: Reader) -> float:
    pictures, labels = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    steps = EPOCHS * -(-1437 // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(1437).split(BATCH):
            loss = F.cross_entropy(model(pictures[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        found = model.eval()(pictures[1437:]).argmax(-1)
    return float((found == labels[1437:]).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mlp", "options", "parameters", "least"),
    [
        (True, {}, 151_306, 0.93),
        (False, {}, 51_658, 0.93),
        (False, {"qk": "collapsed"}, 39_370, 0.93),
        (False, {"heads": 4, "qk": "symmetric"}, 39_370, 0.93),
        (False, {"qk": "collapsed", "vo": "none"}, 14_794, 0.86),
    ],
    ids=["full", "no-mlp", "collapsed", "symmetric", "minimum"],
)
def test_digits_are_read(mlp: bool, options: dict, parameters: int, least: float) -> None:
    model = Reader(mlp, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    accuracy = accuracy_after_training(model)
    assert accuracy >= least, accuracy


@pytest.mark.slow
def test_digits_are_read_less_well_without_attention() -> None:
    """Patches that never meet: below what every layer with values must reach."""
    model = Reader(mlp=False)
    for layer in model.layers:
        layer.attention = nn.Identity()
    assert accuracy_after_training(model) < 0.92
