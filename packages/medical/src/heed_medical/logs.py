"""Logs of libraries that read files: the fault that is raised says what matters."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def silenced(name: str) -> Iterator[None]:
    """Without what the logger of that name says."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
