"""Dynamic mask attention recalls what a window of as many keys has lost."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed_core.attention.dynamic_mask import DynamicMaskAttention
from heed_core.attention.multi_head import MultiHeadAttention

KEYS, VALUES, PAIRS, LENGTH, DIM = 30, 32, 8, 64, 64
BLANK = KEYS + VALUES
KEPT, STEPS = 16, 300


def samples(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of a key and its value, then the keys again at places by chance: recall the values."""
    tokens = torch.full((size, LENGTH), BLANK)
    keys = torch.rand(size, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (size, PAIRS), generator=generator)
    tokens[:, 0 : 2 * PAIRS : 2] = keys
    tokens[:, 1 : 2 * PAIRS : 2] = KEYS + values
    later = torch.rand(size, LENGTH - 2 * PAIRS, generator=generator).argsort(1)[:, :PAIRS]
    tokens.scatter_(1, 2 * PAIRS + later, keys)
    wanted = torch.full((size, LENGTH), -100).scatter(1, 2 * PAIRS + later, values)
    return tokens, wanted


class Layer(nn.Module):
    """A token sees its two neighbours before it attends: a value knows the key that it follows."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(DIM), nn.RMSNorm(DIM)])
        self.neighbours = nn.Conv1d(DIM, DIM, 3, groups=DIM)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.neighbours(F.pad(self.norms[0](x).mT, (2, 0))).mT
        x = x + self.attention(mixed)
        return x + self.mlp(self.norms[1](x))


def attention(kind: str) -> nn.Module:
    """Nothing tells them apart but the keys that a query sees, and the scores as a bias."""
    if kind == "dynamic":
        return DynamicMaskAttention(DIM, heads=2, keep=KEPT)
    options = {"qkv_bias": False, "out_bias": False, "qk_norm": "rms", "norm_eps": 1e-6}
    window = KEPT if kind == "window" else None
    return MultiHeadAttention(DIM, heads=2, causal=True, window=window, **options)


def accuracy_after_training(kind: str, seed: int) -> float:
    """Of values, in new samples."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layers = [Layer(attention(kind)) for _ in range(2)]
    model = nn.Sequential(
        nn.Embedding(BLANK + 1, DIM), *layers, nn.RMSNorm(DIM), nn.Linear(DIM, VALUES)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        tokens, wanted = samples(64, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, wanted = samples(500, torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((model(tokens).argmax(-1) == wanted)[wanted >= 0].float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_chosen_keys_recall_what_a_window_has_lost(seed: int) -> None:
    """The three have the same steps, which are enough for full attention or prove nothing."""
    full, dynamic, window = (
        accuracy_after_training(kind, seed) for kind in ("full", "dynamic", "window")
    )
    assert full >= 0.95, "full attention did not learn the task: the comparison is not valid"
    assert dynamic >= full - 0.05, (full, dynamic, window)
    assert window < dynamic - 0.2, (full, dynamic, window)
