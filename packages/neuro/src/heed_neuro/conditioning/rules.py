"""The rules of learning: how one step changes the memory S (d_v, d_k), whose answer to q is S q.

| rule | update | as attention | as theory of learning |
|---|---|---|---|
| hebb | S + eta v k' | linear attention | contiguity |
| trace, mode memory | g S + eta v k' | retention, gated linear attention | associations fade |
| trace, mode cs | e <- g e + k, S + eta v e' | - | the trace of a cue fades |
| delta | S + eta (v - S k) k' | DeltaNet | Rescorla and Wagner 1972 |
| gated-delta | g S + eta (v - g S k) k' | gated DeltaNet | the same, and forgetting |
| oja | S + eta (v k' - diag(v^2) S) | - | contiguity with an asymptote |
| ph | delta, eta times the cue's associability a_c | - | Pearce and Hall 1980 |
| softmax | trials are stored | softmax attention | exemplars |

A step presents cues with intensities x: k = sum_c x_c c. Cues learn at rates of their own: what is
written goes along w = sum_c salience_c x_c c, in place of k. Compounds are sums, not scaled to
length 1: that would change blocking and overshadowing.

Oja's rule is taught: the outcome stands where the neuron's own output would; it neither lets cues
compete nor unlearns. Pearce and Hall: a_c starts at 1; after a step, for cues that are present,
a_c <- (1 - m) a_c + m |v - S k|, with the error from before the step; a_c may be above 1. A step of
the delta rules that would enlarge the error instead of lessening it is refused.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from heed_core import attend
from heed_core.errors import InputError

Rule = Literal["hebb", "trace", "delta", "gated-delta", "oja", "ph", "softmax"]
RULES: tuple[Rule, ...] = get_args(Rule)
TraceMode = Literal["cs", "memory"]
"""What fades with the rule `trace`: the trace of a cue, or the memory."""

FADING = ("trace", "gated-delta")
"""Rules with a decay."""

FAR = 1e6
"""An error at which the rule ph has diverged."""


class Memory:
    """A memory that learns step by step; its size does not depend on how many there were.

    With the rule softmax it keeps every step instead. Nothing is changed in place, so that
    gradients of what it answers reach what it was told.

    Args:
        cues: A vector per cue.
        d_v: Channels of outcomes.
        rule: See the module.
        eta: Rate of learning.
        decay: g, of the rules that fade.
        mode: Of the rule trace.
        mixing: m, of the rule ph.
        beta: Sharpness of the rule softmax.
        salience: A factor of the rate per cue; 1 if not given.

    Example:
        >>> cues = torch.eye(2, dtype=torch.float64)
        >>> memory = Memory(cues, 1, rule="delta", eta=0.5)
        >>> memory.step(cues[0], torch.ones(1, dtype=torch.float64))
        >>> memory.answer(cues[0]).item()
        0.5
    """

    def __init__(
        self,
        cues: Float[Tensor, "c d_k"],
        d_v: int,
        *,
        rule: Rule,
        eta: float = 0.1,
        decay: float = 1.0,
        mode: TraceMode = "cs",
        mixing: float = 0.3,
        beta: float = 8.0,
        salience: Float[Tensor, " c"] | None = None,
    ) -> None:
        self.cues, self.rule, self.eta, self.decay = cues, rule, eta, decay
        self.mode, self.mixing, self.beta = mode, mixing, beta
        self.salience = cues.new_ones(cues.shape[0]) if salience is None else salience
        self.S = cues.new_zeros(d_v, cues.shape[1])
        self.trace = cues.new_zeros(cues.shape[1])
        self.associability = cues.new_ones(cues.shape[0])
        self.stored: list[tuple[Tensor, Tensor]] = []

    def answer(self, query: Float[Tensor, "*n d_k"]) -> Float[Tensor, "*n d_v"]:
        """What queries call up."""
        if self.rule != "softmax":
            return query @ self.S.mT
        if not self.stored:
            return query.new_zeros(*query.shape[:-1], self.S.shape[0])
        keys, values = (torch.stack(rows)[None, None] for rows in zip(*self.stored, strict=True))
        asked = query.reshape(1, 1, -1, query.shape[-1])
        found = attend(asked, keys, values, scale=self.beta)
        return found.reshape(*query.shape[:-1], self.S.shape[0])

    def forget_trace(self) -> None:
        """Let no trace of cues reach the next step."""
        self.trace = torch.zeros_like(self.trace)

    def step(
        self,
        intensities: Float[Tensor, " c"],
        outcome: Float[Tensor, " d_v"],
        *,
        place: str | None = None,
    ) -> None:
        """Learn from one step.

        Args:
            intensities: How strong each cue is; 0 = absent.
            outcome: The US; zeros if there is none.
            place: Which step it is, for an error message.

        Raises:
            InputError: The error would grow.
        """
        key, along = intensities @ self.cues, (self.salience * intensities) @ self.cues
        if self.rule == "softmax":
            self.stored.append((key, outcome))
        elif self.rule in ("hebb", "trace"):
            self._contiguity(along, outcome)
        elif self.rule == "oja":
            self._oja(along, outcome, place)
        elif self.rule == "ph":
            self._pearce_hall(intensities, key, outcome, place)
        else:
            self._correct(key, along, outcome, place)

    def _contiguity(self, along: Tensor, outcome: Tensor) -> None:
        if self.rule == "trace" and self.mode == "cs":
            self.trace = along = self.decay * self.trace + along
        kept = self.decay * self.S if self.rule == "trace" and self.mode == "memory" else self.S
        self.S = kept + self.eta * torch.outer(outcome, along)

    def _oja(self, along: Tensor, outcome: Tensor, place: str | None) -> None:
        _refuse_growth(self.eta * outcome.square().max(), "eta v^2", self.eta, place)
        lost = outcome.square()[:, None] * self.S
        self.S = self.S + self.eta * (torch.outer(outcome, along) - lost)

    def _correct(self, key: Tensor, along: Tensor, outcome: Tensor, place: str | None) -> None:
        gain = self.eta * (key @ along)
        if self.rule == "gated-delta":
            shrink = (self.decay * (1 - gain)).abs()
            gain = torch.where(shrink > 1, gain, gain.clamp(max=2.0))
        _refuse_growth(gain, "eta |k|^2", self.eta, place)
        kept = self.decay * self.S if self.rule == "gated-delta" else self.S
        self.S = kept + self.eta * torch.outer(outcome - kept @ key, along)

    def _pearce_hall(
        self, intensities: Tensor, key: Tensor, outcome: Tensor, place: str | None
    ) -> None:
        along = (self.associability * self.salience * intensities) @ self.cues
        error = outcome - self.S @ key
        if not float(error.detach().norm()) < FAR:
            raise InputError(
                f"the error has grown beyond {FAR:g}: with such errors cues learn ever faster",
                place=place,
                remedy="choose a lower eta or mixing",
            )
        self.S = self.S + self.eta * torch.outer(error, along)
        mixed = (1 - self.mixing) * self.associability + self.mixing * error.norm()
        self.associability = torch.where(intensities != 0, mixed, self.associability)


def _refuse_growth(gain: Tensor, what: str, eta: float, place: str | None) -> None:
    found = float(gain.detach())
    if found > 2 + 1e-12:
        raise InputError(
            f"{what} = {found:.3g} is above 2: the memory overshoots ever farther",
            place=place,
            remedy=f"choose eta below {2 * eta / found:.3g}, or a lower salience",
        )
