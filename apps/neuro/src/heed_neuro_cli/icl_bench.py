"""The same network in its plain forms, for the benchmark: peers, not for use."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from heed_neuro.icl.regressor import RegressorConfig


class Projections(nn.Module):
    """Queries, keys and values of all heads by one linear layer each, then explicit softmax."""

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__()
        self.heads, width = config.heads, config.width
        self.query, self.key, self.value = (
            nn.Linear(width, self.heads * width, bias=False) for _ in range(3)
        )
        self.out = nn.Linear(self.heads * width, config.outputs, bias=False)

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        """Predict."""
        asks = self._by_head(self.query(query))
        keys, values = self._by_head(self.key(context)), self._by_head(self.value(context))
        weights = (asks @ keys.mT * keys.shape[-1] ** -0.5).softmax(-1)
        return cast(Tensor, self.out((weights @ values).transpose(1, 2).flatten(2)))

    def _by_head(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        return tokens.view(batch, length, self.heads, -1).transpose(1, 2)


class HeadLoop(nn.Module):
    """A module per head, their outputs summed."""

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__()
        single = RegressorConfig(dim=config.dim, outputs=config.outputs, heads=1)
        self.heads = nn.ModuleList(Projections(single) for _ in range(config.heads))

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        """Predict."""
        parts = [cast(Tensor, head(context, query)) for head in self.heads]
        return sum(parts[1:], parts[0])
