"""The names of the back-ends, for programs that offer them before torch is loaded."""

from typing import Literal

Impl = Literal["auto", "reference", "sdpa", "flex"]
"""The name of a back-end, or "auto"."""
