"""Scores of generated reports against their references, as the COCO caption evaluation has them.

Texts are words separated by single spaces. Every function takes a list of references per pair;
reports have one. Sources: BLEU (Papineni et al., ACL 2002), ROUGE-L (Lin, 2004), CIDEr-D (Vedantam
et al., arXiv 1411.5726), with the constants of the COCO evaluation (arXiv 1504.00325).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

_TINY, _SMALL = 1e-15, 1e-9  # keep a product of precisions above 0, and a quotient finite
_BETA = 1.2
_SIGMA = 6.0
ORDERS = 4

Ngrams = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class Scores:
    """A score of the corpus, and of each pair."""

    corpus: float
    pairs: Float64[np.ndarray, " n"]


@dataclass(frozen=True)
class BleuScores:
    """BLEU-1 to BLEU-4 of the corpus, and of each pair."""

    corpus: Float64[np.ndarray, " 4"]
    pairs: Float64[np.ndarray, "n 4"]


def check_pairs(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> None:
    """Refuse what cannot be scored.

    Raises:
        ValueError: No hypothesis, other numbers of them than lists of references, or an empty list.
    """
    if len(references) != len(hypotheses) or not hypotheses:
        raise ValueError(
            f"there must be as many lists of references as hypotheses, and one or more, got "
            f"{len(references)} and {len(hypotheses)}"
        )
    if not all(references):
        raise ValueError("every hypothesis must have a reference")


def _ngrams(words: Sequence[str]) -> Ngrams:
    counts: Ngrams = Counter()
    for order in range(1, ORDERS + 1):
        for start in range(len(words) - order + 1):
            counts[tuple(words[start : start + order])] += 1
    return counts


def bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> BleuScores:
    """BLEU-1 to BLEU-4: clipped precisions of n-grams, their geometric mean, brevity penalty.

    The corpus score divides sums over the corpus; the reference length of a pair is the one
    closest to the hypothesis (the shorter of two). Identical texts score a little below 1, texts
    without a common 4-gram a little above 0, because of the constants of the COCO evaluation.
    """
    check_pairs(references, hypotheses)
    correct = np.zeros((len(hypotheses), ORDERS))
    guessed = np.zeros((len(hypotheses), ORDERS))
    lengths = np.zeros((len(hypotheses), 2))  # of hypothesis and reference
    for row, (texts, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        words = hypothesis.split()
        best: Ngrams = Counter()
        for text in texts:
            best |= _ngrams(text.split())
        for ngram, count in (_ngrams(words) & best).items():
            correct[row, len(ngram) - 1] += count
        guessed[row] = np.maximum(len(words) - np.arange(ORDERS), 0)
        sizes = [len(text.split()) for text in texts]
        lengths[row] = len(words), min(sizes, key=lambda n: (abs(n - len(words)), n))
    return BleuScores(
        _bleu(correct.sum(0), guessed.sum(0), lengths.sum(0)), _bleu(correct, guessed, lengths)
    )


def _bleu(correct: np.ndarray, guessed: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    precision = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=-1)
    mean = precision ** (1.0 / np.arange(1, ORDERS + 1))
    ratio = (lengths[..., 0] + _TINY) / (lengths[..., 1] + _SMALL)
    # no word at all: the exponent runs to minus infinity, the penalty to 0
    penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return np.asarray(mean * penalty[..., None], dtype=np.float64)


def rouge_l(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Scores:
    """ROUGE-L: F of the longest common subsequence with beta 1.2, averaged over the pairs.

    Precision and recall are each the best over the references.
    """
    check_pairs(references, hypotheses)
    found = []
    for texts, hypothesis in zip(references, hypotheses, strict=True):
        words = hypothesis.split(" ")
        common = [(_common(text.split(" "), words), len(text.split(" "))) for text in texts]
        precision = max(length / len(words) for length, _ in common)
        recall = max(length / size for length, size in common)
        square = _BETA**2
        both = recall + square * precision
        score = (1 + square) * precision * recall / both if precision and recall else 0.0
        found.append(score)
    pairs = np.array(found)
    return Scores(float(pairs.mean()), pairs)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    last = [0] * (len(second) + 1)
    for word in first:
        row = [0]
        for column, other in enumerate(second):
            row.append(last[column] + 1 if word == other else max(last[column + 1], row[-1]))
        last = row
    return last[-1]


def cider(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Scores:
    """CIDEr-D: cosine of tf-idf over n-grams, clipped, with a Gaussian penalty of the length.

    Document frequencies are those of the references given here, so the score of a pair depends on
    the set. Lengths are counted in bigrams. Ten is the best.
    """
    check_pairs(references, hypotheses)
    counted = [[_ngrams(text.split()) for text in texts] for texts in references]
    documents: Ngrams = Counter()
    for each in counted:
        documents.update({ngram for ngrams in each for ngram in ngrams})
    total = math.log(len(references))

    def weigh(counts: Ngrams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for ngram, count in counts.items():
            rarity = total - math.log(max(1.0, documents[ngram]))
            vectors[len(ngram) - 1][ngram] = count * rarity
        return vectors

    found = []
    for each, hypothesis in zip(counted, hypotheses, strict=True):
        counts = _ngrams(hypothesis.split())
        vectors = weigh(counts)
        scores = [
            _similarity(vectors, weigh(other), _bigrams(counts) - _bigrams(other)) for other in each
        ]
        found.append(10.0 * float(np.mean(scores)))
    pairs = np.array(found)
    return Scores(float(pairs.mean()), pairs)


def _bigrams(counts: Ngrams) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(
    hypothesis: Sequence[dict[tuple[str, ...], float]],
    reference: Sequence[dict[tuple[str, ...], float]],
    longer: int,
) -> float:
    values = []
    for ours, theirs in zip(hypothesis, reference, strict=True):
        value = sum(
            min(x, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0) for ngram, x in ours.items()
        )
        norms = math.sqrt(sum(x * x for x in ours.values())) * math.sqrt(
            sum(x * x for x in theirs.values())
        )
        values.append(value / norms if norms else value)
    return float(np.mean(values)) * math.exp(-(longer**2) / (2 * _SIGMA**2))
