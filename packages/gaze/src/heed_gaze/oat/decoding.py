"""From logits to scanpaths: greedy, sampled and beam decoding.

The first step may not stop; padding is never chosen; a path ends with STOP or at `max_len` objects.
All paths of a call are decoded together, token by token with cached keys and values: what the
encoder made is computed once, a path that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from heed_gaze.oat.network import BOS, PAD, STOP, Memory, Oat

Choose = Callable[[Tensor, Tensor], Tensor]
"""(log probabilities (r, ids), which path each row is) -> chosen ids (r,)."""


@dataclass(frozen=True, kw_only=True)
class Path:
    """One decoded scanpath."""

    objects: tuple[int, ...]
    """Fixated objects, in order."""
    log_probability: float
    """Of all choices, stopping included."""
    stopped: bool
    """Whether the viewer stopped; False: the path was cut at `max_len`."""


def permitted(
    logits: Float[Tensor, "r ids"], *, objects: int, first: bool
) -> Float[Tensor, "r ids"]:
    """Log probabilities of what may follow: no padding, and no stopping at the first step."""
    barred = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    barred[objects + PAD] = True
    barred[objects + STOP] = first
    return logits.float().masked_fill(barred, -torch.inf).log_softmax(dim=-1)


@torch.no_grad()
def decode_greedy(model: Oat, memory: Memory, *, max_len: int) -> list[Path]:
    """The most probable object at every step, for each trial.

    Args:
        model: In eval mode.
        memory: Of the trials.
        max_len: Most objects of a path.
    """
    paths = _decode(model, memory, lambda logp, _: logp.argmax(dim=-1), max_len=max_len, copies=1)
    return [path for (path,) in paths]


@torch.no_grad()
def decode_samples(
    model: Oat,
    memory: Memory,
    *,
    max_len: int,
    samples: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[Path]]:
    """Paths drawn from the model, several for each trial, all decoded together.

    Args:
        model: In eval mode.
        memory: Of the trials.
        max_len: Most objects of a path.
        samples: Paths per trial.
        temperature: Divides the logits; 1 is the model's own distribution.
        seed: Of the draws.
    """
    if samples < 1 or temperature <= 0:
        raise ValueError(
            f"samples must be at least 1 and temperature above 0, got {samples, temperature}"
        )
    generator = torch.Generator(memory.tokens.device).manual_seed(seed)
    count = memory.tokens.shape[0] * samples

    def draw(logp: Tensor, rows: Tensor) -> Tensor:
        # One number per path whether it goes on or not: a path does not depend on the others.
        uniform = torch.rand(count, 1, generator=generator, device=logp.device)[rows]
        probabilities = (logp / temperature).softmax(dim=-1)
        chosen = (probabilities.cumsum(dim=-1) <= uniform * probabilities.sum(-1, True)).sum(-1)
        last = (probabilities > 0).long().cumsum(-1).argmax(-1)
        return torch.minimum(chosen, last)

    return _decode(model, memory, draw, max_len=max_len, copies=samples)


class _Rows:
    """The paths that are being decoded, a row each: their caches and whose trial they are."""

    def __init__(self, model: Oat, memory: Memory, max_len: int) -> None:
        trials, device = memory.tokens.shape[0], memory.tokens.device
        self.model, self.memory = model, memory
        self.owner = torch.arange(trials, device=device)
        self.cache = model.decoder.new_cache(trials, max_len, dtype=_cache_type(device))

    def begin(self) -> Float[Tensor, "r ids"]:
        """Logits of the first objects."""
        return self.advance(torch.full_like(self.owner, self.memory.objects + BOS))

    def advance(self, ids: Int64[Tensor, " r"]) -> Float[Tensor, "r ids"]:
        """Logits of what follows these ids."""
        model, memory, owner = self.model, self.memory, self.owner
        first = self.cache.length == 0
        decoded = model.decoder(
            model.steps(memory.table[owner, ids][:, None], offset=self.cache.length),
            memory.tokens[owner] if first else None,
            context_padding_mask=memory.there if len(memory.there) == 1 else memory.there[owner],
            cache=self.cache,
        )
        return self._choose(decoded[:, 0])

    def keep(self, rows: Int64[Tensor, " r"]) -> None:
        """Go on with these rows, in any order and number."""
        self.owner = self.owner[rows]
        if self.memory.tokens.shape[0] > 1:
            self.cache.reorder(rows)
            return
        for layer in self.cache.layers:  # all rows share the keys of the one trial
            layer.own.reorder(rows)

    def _choose(self, decoded: Tensor) -> Tensor:
        """Rows of one trial share its keys: they are put side by side as tokens."""
        counts = torch.bincount(self.owner, minlength=self.memory.tokens.shape[0])
        if int(counts.max()) == 1:
            memory = self.memory.rows(self.owner)
            return self.model.choose(memory, decoded[:, None])[:, 0]
        parts, start = [], 0
        for trial in counts.nonzero():
            end = start + int(counts[trial])
            memory = self.memory.rows(trial)
            parts.append(self.model.choose(memory, decoded[None, start:end])[0])
            start = end
        return torch.cat(parts)


def _decode(
    model: Oat, memory: Memory, choose: Choose, *, max_len: int, copies: int
) -> list[list[Path]]:
    """Decode `copies` paths of each trial at once."""
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    rows = _Rows(model, memory, max_len)
    logits = rows.begin()
    count, device = logits.shape[0] * copies, logits.device
    if copies > 1:  # up to here all copies of a trial are alike
        owner = rows.owner.repeat_interleave(copies)
        rows.keep(owner)
        logits = logits[owner]
    stop = memory.objects + STOP
    chosen = torch.full((count, max_len), stop, device=device)
    total = torch.zeros(count, device=device)
    going = torch.arange(count, device=device)
    for step in range(max_len):
        logp = permitted(logits, objects=memory.objects, first=step == 0)
        ids = choose(logp, going)
        total[going] += logp.gather(1, ids[:, None])[:, 0]
        chosen[going, step] = ids
        on = (ids != stop).nonzero()[:, 0]
        if step + 1 == max_len or len(on) == 0:
            break
        if len(on) < len(ids):
            rows.keep(on)
            going, ids = going[on], ids[on]
        logits = rows.advance(ids)
    return _paths(chosen, total, stop=stop, copies=copies)


def _paths(chosen: Tensor, total: Tensor, *, stop: int, copies: int) -> list[list[Path]]:
    found = [
        Path(
            objects=tuple(number for number in row if number != stop),
            log_probability=logp,
            stopped=stop in row,
        )
        for row, logp in zip(chosen.tolist(), total.tolist(), strict=True)
    ]
    return [found[start : start + copies] for start in range(0, len(found), copies)]


@torch.no_grad()
def decode_beam(
    model: Oat, memory: Memory, *, max_len: int, width: int, length_power: float = 0.0
) -> list[list[Path]]:
    """The best paths that a beam search finds, best first, for each trial.

    Args:
        model: In eval mode.
        memory: Of the trials.
        max_len: Most objects of a path.
        width: Paths kept at every step, and given back.
        length_power: Log probabilities are divided by length ** length_power when finished paths
            are compared; 0 compares them as they are.
    """
    if max_len < 1 or width < 1:
        raise ValueError(f"max_len and width must be at least 1, got {max_len, width}")
    each = torch.arange(memory.tokens.shape[0], device=memory.tokens.device)
    return [_beam(model, memory.rows(row[None]), max_len, width, length_power) for row in each]


def _beam(model: Oat, memory: Memory, max_len: int, width: int, length_power: float) -> list[Path]:
    """Beam search of one trial."""
    objects = memory.objects
    rows = _Rows(model, memory, max_len)
    logits = rows.begin()
    prefixes: list[tuple[int, ...]] = [()]
    scores = logits.new_zeros(1, dtype=torch.float32)
    done: list[Path] = []
    for step in range(max_len):
        total = scores[:, None] + permitted(logits, objects=objects, first=step == 0)
        done += [
            Path(objects=prefix, log_probability=value, stopped=True)
            for prefix, value in zip(prefixes, total[:, objects + STOP].tolist(), strict=True)
            if value > -torch.inf
        ]
        flat = total[:, :objects].flatten()
        best = flat.topk(min(width, int(flat.isfinite().sum())))
        parents, ids, scores = best.indices // objects, best.indices % objects, best.values
        prefixes = [(*prefixes[p], o) for p, o in zip(parents.tolist(), ids.tolist(), strict=True)]
        if _settled(done, scores, width, length_power, max_len):
            prefixes = []
        if step + 1 == max_len or not prefixes:
            break
        rows.keep(parents)
        logits = rows.advance(ids)
    done += [
        Path(objects=prefix, log_probability=value, stopped=False)
        for prefix, value in zip(prefixes, scores.tolist(), strict=False)
    ]
    return sorted(done, key=lambda path: -_value(path, length_power))[:width]


def _settled(
    done: list[Path], scores: Tensor, width: int, length_power: float, max_len: int
) -> bool:
    """Whether no path that goes on can come among the best `width` that have ended."""
    if len(done) < width:
        return False
    worst = sorted((_value(path, length_power) for path in done), reverse=True)[width - 1]
    return bool(float(scores.max()) / max_len**length_power <= worst)


def _value(path: Path, length_power: float) -> float:
    return path.log_probability / float((len(path.objects) or 1) ** length_power)


def _cache_type(device: torch.device) -> torch.dtype | None:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def next_probabilities(
    logits: Float[Tensor, "t ids"], scanpath: Int64[Tensor, " t"]
) -> Float[Tensor, " t"]:
    """The probability that teacher-forced logits give to what a viewer really did at each step."""
    return F.softmax(logits.float(), dim=-1).gather(1, scanpath[:, None])[:, 0]
