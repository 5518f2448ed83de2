"""One attention call for every model, which can be watched and steered.

`attend` is the call, `Attend` the same call as a named site of a model, `observe` reads the weights
of sites, `steer` edits them, `explain_dispatch` says which back-end runs a call and why. The names
load torch on first use only, so that a program can answer `--help` without it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heed_core.attend import attend, explain_dispatch
    from heed_core.sites import Attend, observe, steer

__version__ = "0.1.0"
__all__ = ["Attend", "attend", "explain_dispatch", "observe", "steer"]

_HOME = {
    "attend": "heed_core.attend",
    "explain_dispatch": "heed_core.attend",
    "Attend": "heed_core.sites",
    "observe": "heed_core.sites",
    "steer": "heed_core.sites",
}


class _Package(ModuleType):
    """Keeps `heed_core.attend` the function.

    Importing a sub-module binds it on its package; for `heed_core.attend` its function of that name
    is bound.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
