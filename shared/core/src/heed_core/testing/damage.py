"""Files with wrong bytes in them, for the tests of readers."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from heed_core.errors import InputError, MissingExtra

CUT, CHANGED = 10, 40


def damaged(data: bytes, *, seed: int, changed: int = CHANGED) -> Iterator[bytes]:
    """Copies cut short, and copies with 1 to 30 bytes replaced: near the start or anywhere."""
    rng = random.Random(seed)
    for _ in range(CUT):
        yield data[: rng.randrange(len(data))]
    for _ in range(changed):
        copy = bytearray(data)
        reach = min(len(data), rng.choice([64, 600, len(data)]))
        for _ in range(rng.choice([1, 4, 30])):
            copy[rng.randrange(reach)] = rng.randrange(256)
        yield bytes(copy)


def check_readers(
    path: Path,
    readers: Sequence[Callable[[Path], object]],
    *,
    seed: int = 0,
    changed: int = CHANGED,
    refused: int = CUT,
) -> None:
    """Each reader reads the file, and each damaged copy in its place or says why not.

    It says so with an InputError (or the name of a missing library) of one line that names the
    file; anything else that it raises is a fault. The file is whole again at the end.

    Args:
        path: The file.
        readers: They take the path.
        seed: Of the damages.
        changed: How many copies have bytes replaced; 10 others are cut short.
        refused: How many copies must be refused at least, for the readers to have been tried.

    Raises:
        AssertionError: A line is not as it should be, or hardly any copy was refused.
    """
    for reader in readers:
        reader(path)
    whole, lines = path.read_bytes(), list[str]()
    for copy in damaged(whole, seed=seed, changed=changed):
        path.write_bytes(copy)
        for reader in readers:
            try:
                reader(path)
            except (InputError, MissingExtra) as error:
                lines.append(str(error))
    path.write_bytes(whole)
    for line in lines:
        assert path.stem in line, line
        assert len(line.splitlines()) == 1, line
        assert len(line) < 500, line
    assert len(lines) >= refused, f"only {len(lines)} of {CUT + changed} were refused"
