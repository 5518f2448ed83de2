"""Layers of attention that have learnt to recall, put through schedules of conditioning.

A layer of each kind is trained on random association recall: keys are Gaussian, values +-1, every
pair comes several times, with noise on its value; before each pair the layer answers to the key.
Then a schedule is fed to it, a token [k; v] per trial, and what it answers to a cue is its
response. Nothing in the training is about conditioning: which of its phenomena appear is a
prediction of the learning theory that each attention stands for (arXiv 2508.08289).

| kind | layer | theory |
|---|---|---|
| hebb | linear attention, no decay | contiguity |
| trace | linear attention, a decay per token | fading associations |
| delta | delta rule, keys of length 1, a rate per token | Rescorla and Wagner |
| gated-delta | the same with a decay per token | the same, and forgetting |
| softmax | softmax attention | exemplars |

Queries are made of keys alone, and a token is answered before it is written: an answer is a
prediction. As published, the delta layers scale keys to length 1, compounds too; so a compound of
two cues is predicted by (V_A + V_B) / sqrt(2), and effects differ from those of unscaled cues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core import Attend
from heed_core.attention.delta_rule import delta_rule, delta_rule_weights, gated_delta_rule
from heed_core.attention.linear import linear_attention, linear_attention_weights
from heed_core.recurrence import Form
from heed_core.sites import Probe
from heed_neuro.conditioning.conditioner import Conditioner, outcome_values, trial_steps
from heed_neuro.conditioning.designs import Design
from heed_neuro.conditioning.phenomena import PHENOMENA, Phenomenon
from heed_neuro.conditioning.schedules import NewValue, Schedule

Kind = Literal["hebb", "trace", "delta", "gated-delta", "softmax"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Strengths = Mapping[str, Mapping[str, Tensor]]
"""Group -> kind -> strengths (trials, cues)."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """All that is needed to rebuild the layers."""

    kinds: tuple[Kind, ...] = KINDS
    """Which layers are trained, beside each other."""
    d_k: int = 16
    """Channels of a token's key."""
    d_v: int = 4
    """Channels of a token's value."""
    head_dim: int = 16
    """Channels of queries and keys in a layer."""
    form: Form = "chunked"
    """How the linear layers are computed; the numbers are the same."""

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be different kinds, at least one, got {self.kinds}")
        for name in ("d_k", "d_v", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """How pairs are drawn."""

    pairs: int = 12
    """Different pairs of a sequence."""
    repeats: int = 4
    """How often each comes."""
    noise: float = 0.5
    """Standard deviation of the noise on a value that a layer is told; not on what it is asked."""

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.repeats < 2:
            raise ValueError("pairs must be at least 1 and repeats at least 2")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must not be negative, got {self.noise}")

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.pairs * self.repeats


@dataclass(frozen=True)
class Episode:
    """One sequence of recall, or a batch of them."""

    keys: Float[Tensor, "*b n d_k"]
    told: Float[Tensor, "*b n d_v"]
    """Values with noise."""
    values: Float[Tensor, "*b n d_v"]
    """What an answer should be."""
    known: Bool[Tensor, "*b n"]
    """Whether the pair came before, so that it can be recalled."""

    def to(self, device: torch.device | str, **_: object) -> Episode:
        """On another device."""
        return Episode(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def draw_episode(task: RecallTask, d_k: int, d_v: int, *, seed: int) -> Episode:
    """Draw one sequence; keys have length 1 on average."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(task.pairs, d_k, generator=generator) * d_k**-0.5
    signs = 2.0 * torch.randint(0, 2, (task.pairs, d_v), generator=generator).float() - 1.0
    order = torch.arange(task.pairs).repeat(task.repeats)
    order = order[torch.randperm(task.length, generator=generator)]
    noise = task.noise * torch.randn(task.length, d_v, generator=generator)
    earlier = (order[:, None] == order).tril(-1).any(1)
    values = signs[order]
    return Episode(pool[order], values + noise, values, earlier)


def stack_episodes(episodes: Sequence[Episode]) -> Episode:
    """A batch."""
    names = Episode.__dataclass_fields__
    return Episode(*(torch.stack([getattr(one, name) for one in episodes]) for name in names))


def recall_error(answers: Float[Tensor, "b n d_v"], episode: Episode) -> Float[Tensor, ""]:
    """Mean squared error of answers about pairs that came before; 1 is what silence has."""
    wrong = (answers - episode.values).square().mean(-1)
    return (wrong * episode.known).sum() / episode.known.sum().clamp(min=1)


class RecallLayer(nn.Module):
    """One layer with its projections, one head."""

    def __init__(self, kind: Kind, config: ProbeConfig) -> None:
        super().__init__()
        self.kind, self.form, self.head_dim = kind, config.form, config.head_dim
        self.query = nn.Linear(config.d_k, config.head_dim, bias=False)
        self.key = nn.Linear(config.d_k, config.head_dim, bias=False)
        self.value = nn.Linear(config.d_v, config.d_v, bias=False)
        self.out = nn.Linear(config.d_v, config.d_v, bias=False)
        fading, correcting = kind in ("trace", "gated-delta"), kind in ("delta", "gated-delta")
        self.decay = nn.Linear(config.d_k, 1) if fading else None
        self.rate = nn.Linear(config.d_k, 1) if correcting else None
        if kind == "softmax":
            self.attend = Attend()
        else:
            self.probe = Probe()
        self._init_weights()

    def _init_weights(self) -> None:
        """Queries begin as keys do, which recall needs; memories begin by fading little."""
        nn.init.orthogonal_(self.key.weight)
        self.query.load_state_dict(self.key.state_dict())
        for layer in (self.value, self.out):
            nn.init.eye_(layer.weight)
        for gate, bias in ((self.decay, 4.0), (self.rate, 0.0)):
            if gate is not None:
                nn.init.zeros_(gate.weight)
                nn.init.constant_(gate.bias, bias)

    def forward(
        self, keys: Float[Tensor, "b n d_k"], values: Float[Tensor, "b n d_v"]
    ) -> Float[Tensor, "b n d_v"]:
        """What each key calls up before its value is seen."""
        query, key, value = (x[:, None] for x in (self.query(keys), self.key(keys), values))
        value = self.value(value)
        if self.kind == "softmax":
            n = keys.shape[1]
            earlier = torch.ones(n, n, dtype=torch.bool, device=keys.device).tril(-1)
            mixed: Tensor = self.attend(query, key, value, mask=earlier)
        else:
            mixed = self._linear(query, key, value, keys)
        answers: Tensor = self.out(mixed[:, 0])
        return answers

    def _linear(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor) -> Tensor:
        # A token reads its own writing too: the token before it reads in its place.
        query = torch.cat([query[:, :, 1:], torch.zeros_like(query[:, :, :1])], dim=2)
        decay = None if self.decay is None else F.logsigmoid(self.decay(keys)).transpose(1, 2)
        rate = None if self.rate is None else self.rate(keys).sigmoid().transpose(1, 2)
        scale = self.head_dim**-0.5 if rate is None else 1.0
        if rate is not None:
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        if rate is None:
            read, _ = linear_attention(
                query, key, value, log_decay=decay, causal=True, scale=scale, form=self.form
            )
        elif decay is None:
            read, _ = delta_rule(query, key, value, rate, scale=scale, form=self.form)
        else:
            read, _ = gated_delta_rule(query, key, value, rate, decay, scale=scale, form=self.form)
        self.probe(lambda: _earlier(_weights(query, key, rate, decay, scale)))
        return torch.cat([torch.zeros_like(read[:, :, :1]), read[:, :, :-1]], dim=2)


def _weights(
    query: Tensor, key: Tensor, rate: Tensor | None, decay: Tensor | None, scale: float
) -> Tensor:
    if rate is None:
        return linear_attention_weights(query, key, log_decay=decay, causal=True, scale=scale)
    return delta_rule_weights(query, key, rate, log_decay=decay, scale=scale)


def _earlier(weights: Tensor) -> Tensor:
    """Row t of what the token before it reads."""
    return F.pad(weights[:, :, :-1], (0, 0, 1, 0))


class RecallProbe(nn.Module):
    """Layers of all kinds, trained beside each other.

    Example:
        >>> probe = RecallProbe(ProbeConfig(kinds=("hebb", "delta")))
        >>> [x.shape for x in probe(torch.randn(1, 7, 16), torch.randn(1, 7, 4))]
        [torch.Size([1, 7, 4]), torch.Size([1, 7, 4])]
    """

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({kind: RecallLayer(kind, config) for kind in config.kinds})

    def forward(
        self, keys: Float[Tensor, "b n d_k"], values: Float[Tensor, "b n d_v"]
    ) -> tuple[Float[Tensor, "b n d_v"], ...]:
        """The answers of each kind, in order."""
        return tuple(self.layers[kind](keys, values) for kind in self.config.kinds)


@dataclass(frozen=True)
class TokenSequence:
    """A schedule as tokens, and where its trials are."""

    keys: Float[Tensor, "n d_k"]
    values: Float[Tensor, "n d_v"]
    first: tuple[int, ...]
    """The first token of each trial that is learnt; tests have none."""


def us_vector(d_v: int) -> Float[Tensor, " d_v"]:
    """The value of a US: +1 and -1 in turn, as the values of the training."""
    return 1.0 - 2.0 * (torch.arange(d_v) % 2).float()


def schedule_tokens(
    schedule: Schedule, cues: Sequence[str], vectors: Float[Tensor, "c d_k"], d_v: int, *, seed: int
) -> TokenSequence:
    """Tokens [k; v] of the trials that are learnt; a delay is a token without cue or US.

    A new value of a US changes what later trials show, and nothing of the past.
    """
    worth = dict.fromkeys((*schedule.us_names, *outcome_values(None, 1)), 1.0)
    keys: list[Tensor] = []
    amounts: list[float] = []
    first: list[int] = []
    for placed in schedule.placed(seed=seed):
        event = placed.event
        if isinstance(event, NewValue):
            worth[event.us] = event.value
        elif not event.is_test:
            first.append(len(keys))
            for present, amount in trial_steps(event):
                shown = [float(cue in present) for cue in cues]
                keys.append(torch.tensor(shown, dtype=vectors.dtype) @ vectors)
                amounts.append(amount * worth[event.us])
    if not keys:
        empty = vectors.new_zeros(0, vectors.shape[1])
        return TokenSequence(empty, vectors.new_zeros(0, d_v), ())
    strength = torch.tensor(amounts, dtype=vectors.dtype)
    return TokenSequence(torch.stack(keys), strength[:, None] * us_vector(d_v), tuple(first))


def probe_vectors(config: ProbeConfig, conditioner: Conditioner, cues: Sequence[str]) -> Tensor:
    """The cues' vectors in the width of the layers."""
    return replace(conditioner, d_k=config.d_k).vectors(cues).float()


@torch.no_grad()
def probe_strengths(
    probe: RecallProbe,
    schedule: Schedule,
    cues: Sequence[str],
    vectors: Float[Tensor, "c d_k"],
    *,
    seed: int = 0,
    every_trial: bool = False,
) -> dict[str, Float[Tensor, "t c"]]:
    """How far each layer's answer to each cue goes along the US, after trials.

    Args:
        probe: The layers.
        schedule: What they are shown.
        cues: Their names, in the order of `vectors`.
        vectors: A key per cue.
        seed: Of shuffled phases.
        every_trial: After each trial that is learnt, with a row of zeros for before; else at the
            end only.

    Returns:
        Kind -> strengths, 1 for the US itself.
    """
    d_v, device = probe.config.d_v, next(probe.parameters()).device
    tokens = schedule_tokens(schedule, cues, vectors, d_v, seed=seed)
    stops = [*tokens.first[1:], len(tokens.keys)] if tokens.first else []
    shown = [0, *stops] if every_trial else [len(tokens.keys)]
    rows: dict[str, list[Tensor]] = {kind: [] for kind in probe.config.kinds}
    for stop in shown:
        keys = torch.cat(
            [tokens.keys[:stop].expand(len(cues), -1, -1), vectors[:, None]], dim=1
        ).to(device)
        values = F.pad(tokens.values[:stop], (0, 0, 0, 1)).expand(len(cues), -1, -1).to(device)
        for kind, answers in zip(probe.config.kinds, probe(keys, values), strict=True):
            rows[kind].append(answers[:, -1].cpu() @ us_vector(d_v) / d_v)
    return {kind: torch.stack(found) for kind, found in rows.items()}


def in_tokens(item: Phenomenon) -> bool:
    """Whether tokens can show a phenomenon: salience and a US's own worth are no part of them."""
    return item.shown is not None and not (
        item.layers > 1 or item.salience or item.name.startswith("revaluation")
    )


def probe_effects(
    probe: RecallProbe, *, conditioner: Conditioner | None = None
) -> list[dict[str, str | float | None]]:
    """The effect of every phenomenon of one layer in every trained layer."""
    conditioner = conditioner or Conditioner(d_k=probe.config.d_k)
    rows: list[dict[str, str | float | None]] = []
    for item in PHENOMENA.values():
        if not in_tokens(item):
            continue
        strengths = design_strengths(probe, item.design, conditioner)
        row: dict[str, str | float | None] = {"phenomenon": item.name}
        for kind in probe.config.kinds:
            row[kind] = item.effect_of(partial(_at_end, strengths, item.design.all_cues, kind))
        rows.append(row)
    return rows


def _at_end(strengths: Strengths, cues: Sequence[str], kind: str, group: str, cue: str) -> float:
    return float(strengths[group][kind][-1, cues.index(cue)])


def design_strengths(
    probe: RecallProbe, design: Design, conditioner: Conditioner, *, every_trial: bool = False
) -> Strengths:
    """`probe_strengths` of each group of a design."""
    vectors = probe_vectors(probe.config, conditioner, design.all_cues)
    return {
        group: probe_strengths(
            probe,
            schedule,
            design.all_cues,
            vectors,
            seed=conditioner.seed,
            every_trial=every_trial,
        )
        for group, schedule in design.schedules.items()
    }


def mean_error(task: RecallTask) -> float:
    """Recall error of answering the mean of what was told of a pair so far.

    Told j times with noise it is noise^2 / j, and j is 1 ... repeats - 1, each as often.
    """
    told = range(1, task.repeats)
    return math.fsum(task.noise**2 / j for j in told) / len(told)
