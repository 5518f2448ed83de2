"""Closed forms of classical learning theory, for cues of length 1 that are at right angles.

Strengths after n trials at the rate eta with a US of 1. Rescorla and Wagner 1972 is the delta rule.
"""

from __future__ import annotations

import numpy as np


def acquired(eta: float, trials: int, *, cues: int = 1) -> float:
    """Strength of each of the cues that are trained together: (1 - (1 - cues eta)^n) / cues."""
    return (1 - (1 - cues * eta) ** trials) / cues


def extinguished(eta: float, trials: int, strength: float) -> float:
    """What is left of a strength without the US."""
    return float(strength * (1 - eta) ** trials)


def compound_gain(eta: float, trials: int, predicted: float, *, cues: int = 2) -> float:
    """What each cue of a compound gains where the cues together predict so much at the start."""
    return (1 - predicted) * acquired(eta, trials, cues=cues)


def unequal(eta: float, salience: tuple[float, ...], trials: int) -> tuple[float, ...]:
    """Strengths of cues that are trained together and learn at different rates."""
    total = sum(salience)
    reached = 1 - (1 - eta * total) ** trials
    return tuple(reached * part / total for part in salience)


def inhibition(eta: float, pairs: int) -> tuple[float, float]:
    """Strengths (A, X) after pairs of A+ and AX-: an affine map, applied so many times."""
    reinforced = np.array([[1 - eta, 0, eta], [0, 1, 0], [0, 0, 1.0]])
    withheld = np.array([[1 - eta, -eta, 0], [-eta, 1 - eta, 0], [0, 0, 1.0]])
    found = np.linalg.matrix_power(withheld @ reinforced, pairs)[:2, 2]
    return float(found[0]), float(found[1])


def hebbian(eta: float, trials: int) -> float:
    """Strength under the Hebbian rule: it grows with every US and has no asymptote."""
    return eta * trials


def traced(eta: float, decay: float, delay: int, trials: int) -> float:
    """Strength under the rule trace, when the US comes so many steps after the cue."""
    return eta * decay**delay * trials


def second_order(eta: float, trials: int) -> float:
    """Strength of B after A+ and B>A, so many trials of each, in two layers."""
    return acquired(eta, trials) ** 2


def partial_variance(eta: float, chance: float) -> float:
    """Variance around the asymptote `chance` under partial reinforcement by chance."""
    return eta * chance * (1 - chance) / (2 - eta)
