"""A mixture of heads learns to send samples of other classes to other heads.

Samples are symbols behind the mark of a class, which says how far back the symbol is that every
token has to name. The mark is read by the first layer, so that the second can choose heads by it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed_core.attention.mixture_of_heads import MixtureOfHeads

CLASSES, SYMBOLS, LENGTH, DIM = 4, 8, 12, 32
HEADS, SHARED, ACTIVE = 6, 1, 2
SAMPLES = 800
"""To count heads by: one token of each, so that counts are independent."""


def samples(size: int, generator: torch.Generator, useful: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what to name (-100: nothing), and classes, which matter if they are useful."""
    kind = torch.randint(CLASSES, (size,), generator=generator)
    symbols = torch.randint(SYMBOLS, (size, LENGTH), generator=generator)
    tokens = torch.cat([SYMBOLS + kind[:, None], symbols], dim=1)
    back = 1 + kind if useful else torch.ones_like(kind)
    places = torch.arange(LENGTH + 1) - back[:, None]
    wanted = tokens.gather(1, places.clamp(min=0))
    return tokens, wanted.masked_fill(torch.arange(LENGTH + 1) <= CLASSES, -100), kind


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.attention = MixtureOfHeads(DIM, heads=HEADS, shared=SHARED, active=ACTIVE, head_dim=4)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, loss, gates = self.attention(self.norms[0](x))
        x = x + output
        return x + self.mlp(self.norms[1](x)), loss, gates


class Namer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS + CLASSES, DIM)
        self.places = nn.Parameter(0.5 * torch.randn(LENGTH + 1, DIM))
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.out = nn.Linear(DIM, SYMBOLS)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        x = self.symbols(tokens) + self.places
        losses, gates = [], []
        for layer in self.layers:
            x, loss, gate = layer(x)
            losses.append(loss)
            gates.append(gate)
        return self.out(x), torch.stack(losses).mean(), gates


def trained(seed: int, *, useful: bool, steps: int = 600) -> Namer:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Namer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens, wanted, _ = samples(64, generator, useful)
        named, balance, _ = model(tokens)
        loss = F.cross_entropy(named.flatten(0, 1), wanted.flatten()) + 0.01 * balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: Namer, *, useful: bool) -> float:
    tokens, wanted, _ = samples(SAMPLES, torch.Generator().manual_seed(99), useful)
    return float((model(tokens)[0].argmax(-1) == wanted)[wanted >= 0].float().mean())


@torch.no_grad()
def loads(model: Namer) -> list[Tensor]:
    """Of each layer: how often tokens of a class take each routed head first, (classes, heads)."""
    tokens, _, kind = samples(SAMPLES, torch.Generator().manual_seed(99), True)
    generator = torch.Generator().manual_seed(7)
    place = torch.randint(CLASSES + 1, LENGTH + 1, (SAMPLES,), generator=generator)
    tables = []
    for gates in model(tokens)[2]:
        first = gates[torch.arange(SAMPLES), place, SHARED:].argmax(-1)
        table = torch.zeros(CLASSES, HEADS - SHARED, dtype=torch.float64)
        tables.append(table.index_put((kind, first), table.new_ones(()), accumulate=True))
    return tables


def chi_square(table: Tensor) -> tuple[float, float]:
    """Of independence of rows and columns: the statistic, and how likely a larger one is."""
    table = table[:, table.sum(0) > 0]
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = torch.tensor((table.shape[0] - 1) * (table.shape[1] - 1), dtype=torch.float64)
    return float(statistic), float(torch.special.gammaincc(freedom / 2, statistic / 2))


def test_chi_square_of_a_table_by_hand() -> None:
    """20 30 / 30 20: 4 * 5^2 / 25 = 4, which is exceeded with probability 0.0455 (2 sigma)."""
    statistic, likely = chi_square(torch.tensor([[20.0, 30.0, 0.0], [30.0, 20.0, 0.0]]).double())
    assert statistic == pytest.approx(4.0)
    assert likely == pytest.approx(0.0455, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_classes_that_need_other_heads_use_other_heads(seed: int) -> None:
    """Not so in the first layer, which cannot know the class, nor before training."""
    torch.manual_seed(seed)
    before = chi_square(loads(Namer())[1])
    model = trained(seed, useful=True)
    first, second = (chi_square(table) for table in loads(model))
    idle = chi_square(loads(trained(seed, useful=False))[1])
    seen = f"before {before}, first layer {first}, second layer {second}, useless classes {idle}"
    assert accuracy(model, useful=True) >= 0.95, seen
    assert second[1] < 0.01, seen
    assert min(before[1], first[1]) > 0.01, seen
    assert second[0] > 2 * idle[0], seen
