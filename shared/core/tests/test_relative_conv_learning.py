"""Relative convolutional attention reads text; its convolutions stand in for positions.

Beside learned offsets, convolutions of three tokens add little to the accuracy on this text: 0.1,
0.6 and 0.7 points with three seeds here, and between -0.3 and +0.5 points in nine other settings of
width, rate, batch and text (Python's own sources). So no gain is asserted there. What they can do
shows where the offsets are not learned: they tell the order, for 9 to 10 points.
"""

import pydoc_data.topics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed_core.attention.relative_conv import RelativeConvAttention

CHARACTERS, HELD_OUT = 200_000, 20_000
DIM, SEGMENT, BATCH, STEPS = 64, 32, 8, 1500


def text() -> Tensor:
    """What Python's own `help` says of its language: prose, grammar and code, as numbers."""
    characters = "\n".join(pydoc_data.topics.topics.values())[:CHARACTERS]
    known = {c: i for i, c in enumerate(sorted(set(characters)))}
    return torch.tensor([known[c] for c in characters])


class Layer(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.attention = RelativeConvAttention(DIM, heads=4, kernel=kernel, max_distance=SEGMENT)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Reader(nn.Sequential):
    """Two layers; a kernel of 1 only scales channels, so that no token sees its neighbours."""

    def __init__(self, kinds: int, kernel: int) -> None:
        embedding = nn.Embedding(kinds, DIM)
        layers = [Layer(kernel) for _ in range(2)]
        super().__init__(embedding, *layers, nn.LayerNorm(DIM), nn.Linear(DIM, kinds))


def accuracy_after_training(kernel: int, seed: int, *, placed: bool = True) -> float:
    """Of the next character, in text that was not trained on; `placed` = offsets are learned."""
    torch.manual_seed(seed)
    characters = text()
    train, held_out = characters[:-HELD_OUT], characters[-HELD_OUT:]
    model = Reader(int(characters.max()) + 1, kernel)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(placed or "offset" not in name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(len(train) - SEGMENT, (BATCH, 1))
        rows = train[starts + torch.arange(SEGMENT + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    rows = held_out[: (len(held_out) - 1) // SEGMENT * SEGMENT].view(-1, SEGMENT)
    following = held_out[1 : 1 + rows.numel()].view(-1, SEGMENT)
    with torch.no_grad():
        return float((model.eval()(rows).argmax(-1) == following).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_of_the_characters_are_foretold(seed: int) -> None:
    convolved, plain = (accuracy_after_training(kernel, seed) for kernel in (3, 1))
    assert convolved >= 0.50, (convolved, plain)
    assert abs(convolved - plain) <= 0.02, (convolved, plain)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_convolutions_tell_the_order_where_no_offset_is_learned(seed: int) -> None:
    convolved, plain = (accuracy_after_training(kernel, seed, placed=False) for kernel in (3, 1))
    assert convolved >= 0.50, (convolved, plain)
    assert convolved >= plain + 0.05, (convolved, plain)
