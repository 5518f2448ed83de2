"""Reports as words and numbers, exactly as in R2Gen (Chen et al., EMNLP 2020, arXiv 2010.16056).

Scores of generated reports depend on every step here, quirks included: pieces that become empty
are kept, and a deleted `___` leaves two spaces.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Dialect = Literal["iu", "mimic"]
"""Whose reports: IU X-Ray (Open-i) or MIMIC-CXR; only MIMIC's have line breaks and `___`."""

END = 0
"""The number that begins and ends a report and fills up a batch."""
UNKNOWN = "<unk>"

_QUOTES = str.maketrans("", "", "\"/\\'")
_DELETED = re.compile(r"[.,?;*!%^&_+():-\[\]{}]")
"""Characters that are deleted; `:-\\[` is the range of code points, so `< = > @` are too."""
_FOLDS = {"iu": (0, 0, 3), "mimic": (7, 7, 8)}
"""Times that `__`, two spaces and `..` are halved."""


def clean_report(text: str, dialect: Dialect = "iu") -> str:
    """Lower-case sentences without punctuation, joined and ended by ` . `.

    Example:
        >>> clean_report("1. Heart size normal. 2. No x-ray evidence of TB.")
        'heart size normal . no x-ray evidence of tb .'
    """
    if dialect == "mimic":
        text = text.replace("\n", " ")
    for pair, times in zip(("__", "  ", ".."), _FOLDS[dialect], strict=True):
        for _ in range(times):
            text = text.replace(pair, pair[0])
    text = text.replace("1. ", "")
    for number in "2345":
        text = text.replace(f". {number}. ", ". ")
    for number in "2345":
        text = text.replace(f" {number}. ", ". ")
    pieces = text.strip().lower().split(". ")
    kept = [_DELETED.sub("", piece.translate(_QUOTES).strip()) for piece in pieces]
    return " . ".join(kept) + " ."


@dataclass(frozen=True)
class Vocabulary:
    """Words and their numbers, from 1 on; 0 is begin, end and filling.

    Example:
        >>> words = Vocabulary((".", "<unk>", "clear", "lungs"))
        >>> words.encode("lungs are clear .", most=60)
        [0, 4, 2, 3, 1, 0]
        >>> words.decode([4, 2, 3, 1, 0, 3])
        'lungs <unk> clear .'
    """

    words: tuple[str, ...]
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if UNKNOWN not in self.words:
            raise ValueError(f"words must hold {UNKNOWN!r}, got {len(self.words)} without it")
        if len(set(self.words)) < len(self.words):
            twice = Counter(self.words).most_common(1)[0][0]
            raise ValueError(f"words must differ, got {twice!r} twice")
        numbers = {word: number for number, word in enumerate(self.words, start=1)}
        object.__setattr__(self, "_numbers", numbers)

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, cleaned: Iterable[str], *, threshold: int) -> "Vocabulary":
        """The words that occur at least `threshold` times, and `<unk>`, by code point.

        Args:
            cleaned: The TRAINING reports, cleaned.
            threshold: 3 in the recipe for IU X-Ray, 10 in that for MIMIC-CXR.
        """
        if threshold < 1:
            raise ValueError(f"threshold must be at least 1, got {threshold}")
        counts = Counter(word for report in cleaned for word in report.split())
        kept = {word for word, count in counts.items() if count >= threshold}
        return cls(tuple(sorted(kept | {UNKNOWN})))

    def encode(self, cleaned: str, *, most: int) -> list[int]:
        """Numbers of the words between two zeros, cut to `most` numbers, zeros included.

        A report that is too long loses its last zero.
        """
        unknown = self._numbers[UNKNOWN]
        numbers = [self._numbers.get(word, unknown) for word in cleaned.split()]
        return [END, *numbers, END][:most]

    def decode(self, numbers: Sequence[int]) -> str:
        """Words up to the first 0, which must not be the one that begins a report."""
        return " ".join(self.word_list(numbers))

    def word_list(self, numbers: Sequence[int]) -> list[str]:
        """As `decode`, word by word."""
        found = []
        for number in numbers:
            if number == END:
                break
            found.append(self.words[number - 1])
        return found
