"""METEOR of reports: our fallback on exact words and stems, and the original program.

METEOR 1.5 (Denkowski and Lavie, WMT 2014) also matches synonyms and paraphrases, with tables that
come with its Java program. `meteor_es` has the same formula without them, and is another score: it
must not be called METEOR.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from heed_core.errors import InputError
from heed_medical.reports.metrics import Scores, check_pairs
from heed_medical.reports.stems import stem

_ALPHA, _BETA, _GAMMA = 0.85, 0.2, 0.6
_STEM_WEIGHT = 0.6


def meteor_es(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Scores:
    """METEOR-es: weighted F of exact and stem matches with a penalty for fragments.

    F = P R / (alpha P + (1 - alpha) R) with alpha 0.85; a stem match counts 0.6 of an exact one.
    The score is F (1 - 0.6 (chunks / matches)^0.2), the best over the references; the corpus score
    is the mean. Words are matched in order of the hypothesis, each to the free place that best
    continues the chunk, exact ones first.
    """
    check_pairs(references, hypotheses)
    pairs = np.array(
        [
            max(_meteor(text.split(), hypothesis.split()) for text in texts)
            for texts, hypothesis in zip(references, hypotheses, strict=True)
        ]
    )
    return Scores(float(pairs.mean()), pairs)


def _meteor(reference: Sequence[str], hypothesis: Sequence[str]) -> float:
    places, weight = _align(reference, hypothesis)
    matched = [place for place in places if place is not None]
    if not matched:
        return 0.0
    precision, recall = weight / len(hypothesis), weight / len(reference)
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    pairs = zip([None, *places], places, strict=False)
    chunks = sum(b is not None and (a is None or b != a + 1) for a, b in pairs)
    whole = len(matched) == len(reference) == len(hypothesis) and chunks == 1
    penalty = 0.0 if whole else _GAMMA * (chunks / len(matched)) ** _BETA
    return mean * (1 - penalty)


def _align(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[list[int | None], float]:
    """The place in the reference of each word of the hypothesis, and the weight of the matches."""
    places: list[int | None] = [None] * len(hypothesis)
    free = set(range(len(reference)))
    weight = 0.0
    forms = ((list(reference), list(hypothesis), 1.0),)
    stems = ([stem(w) for w in reference], [stem(w) for w in hypothesis], _STEM_WEIGHT)
    for theirs, ours, value in (*forms, stems):
        for index, word in enumerate(ours):
            found = [place for place in free if theirs[place] == word]
            if places[index] is not None or not found:
                continue
            before = places[index - 1] if index else None
            near = index if before is None else before + 1
            place = min(found, key=lambda p: (abs(p - near), p))
            places[index] = place
            free.remove(place)
            weight += value
    return places, weight


def meteor_by_program(
    references: Sequence[str], hypotheses: Sequence[str], jar: Path, *, java: str = "java"
) -> float:
    """METEOR 1.5 of a corpus, computed by its own program.

    Args:
        references: One per hypothesis.
        hypotheses: Words separated by spaces.
        jar: `meteor-1.5.jar`, with its `data` folder beside it.
        java: The Java program.

    Raises:
        InputError: The jar or Java is missing, or the program fails.
    """
    if not jar.is_file():
        raise InputError("no such file", path=jar, remedy="give the path of meteor-1.5.jar")
    with TemporaryDirectory() as folder:
        files = Path(folder) / "hypotheses", Path(folder) / "references"
        for path, texts in zip(files, (hypotheses, references), strict=True):
            path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        command = [java, "-Xmx2G", "-jar", str(jar), *map(str, files), "-l", "en", "-norm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise InputError(
                f"needs {java}, which is not installed", path=jar, remedy="install a Java runtime"
            ) from None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"failed: {reason}", path=jar) from None
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("Final score:"):
            return float(line.partition(":")[2])
    raise InputError("gave no final score", path=jar, remedy="use METEOR 1.5")
