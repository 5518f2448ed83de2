from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from torch import nn

from heed_core import attention
from heed_core.attention.pointer import PointerHead
from heed_core.testing.conformance import Clause, Mechanism, conformance_clauses
from heed_core.testing.mechanisms import MECHANISMS, OUTSIDE
from heed_core.tokens import Pattern

CLAUSES = [clause for mechanism in MECHANISMS for clause in conformance_clauses(mechanism)]


def kind(mechanism: Mechanism) -> type:
    """The class of the outermost module that is the core's own."""
    for module in mechanism.build(0.0).modules():
        home = type(module).__module__
        if home.startswith("heed_core.") and not home.startswith("heed_core.testing"):
            return type(module)
    raise AssertionError(f"{mechanism.name} is no module of heed_core")


def everyday() -> dict[str, Clause]:
    """What of the compiler's clauses runs by default: they take seconds, for every single row.

    Of the rows of a class, which differ in options, one is compiled and another, where there is
    one, exported, for any size; `tools/test --all` compiles all for any size and exports all.
    """
    chosen: dict[tuple[str, type], Clause] = {}
    for clause in CLAUSES:
        if clause.name in ("compile", "export") and clause.excuse is None:
            what = clause.name, kind(clause.mechanism)
            if clause.name == "export" or what not in chosen:
                chosen[what] = clause
    return {str(clause): clause for clause in chosen.values()}


EVERYDAY = everyday()


def marks(clause: Clause) -> list[pytest.MarkDecorator]:
    if clause.name in ("wrong-shape", "wrong-type"):
        return [pytest.mark.bad_input]
    if not clause.compiles:
        return []
    rare = clause.excuse is None and str(clause) not in EVERYDAY
    return [pytest.mark.compile, *([pytest.mark.slow] if rare else [])]


@pytest.mark.parametrize(
    "clause", [pytest.param(clause, marks=marks(clause), id=str(clause)) for clause in CLAUSES]
)
def test_conformance(clause: Clause) -> None:
    if clause.excuse is not None:
        pytest.skip(clause.excuse)
    clause.check()


def test_names_are_unique() -> None:
    names = [mechanism.name for mechanism in MECHANISMS]
    assert len(names) == len(set(names))


def test_every_class_is_compiled_and_exported_by_default_unless_excused() -> None:
    for name in ("compile", "export"):
        able = {kind(c.mechanism) for c in CLAUSES if c.name == name and c.excuse is None}
        assert {kind(c.mechanism) for c in EVERYDAY.values() if c.name == name} == able


def test_every_module_that_holds_weights_shows_its_options() -> None:
    for mechanism in MECHANISMS:
        for module in mechanism.build(0.0).modules():
            holds = any(True for _ in module.parameters(recurse=False))
            if holds and not any(True for _ in module.children()):
                assert module.extra_repr(), f"{type(module).__name__} of {mechanism.name}"


OF_OTHERS = {"context", "condition", "start"}
"""Inputs that make a row one of cross-attention: tokens attended to, or what asks."""


def core_module(mechanism: Mechanism) -> nn.Module:
    return next(m for m in mechanism.build(0.0).modules() if type(m) is kind(mechanism))


def run(mechanism: Mechanism) -> set[Pattern]:
    """The patterns of a row; in a cross-attention each output may depend on its own query alone."""
    module = core_module(mechanism)
    inputs = mechanism.inputs(1, mechanism.size)
    if OF_OTHERS & set(inputs):
        both: set[Pattern] = {"cross", "causal cross"}
        return both & module.patterns if asks_alone(mechanism) else {"cross"}
    hides = any(unseen.name == "future" for unseen in mechanism.unseen)
    return {"causal self" if getattr(module, "causal", hides) else "self"}


def asks_alone(mechanism: Mechanism) -> bool:
    """Whether the first outputs stay when the last query goes."""
    module, inputs = mechanism.build(0.0).eval(), mechanism.inputs(1, mechanism.size)
    if "context" not in inputs:
        return False
    whole, part = module(**inputs), module(**{**inputs, "x": inputs["x"][:, :-1]})
    return torch.allclose(part, whole[:, :-1], atol=1e-6)


def test_rows_run_the_patterns_that_mechanisms_state() -> None:
    found: dict[type, set[Pattern]] = {}
    for mechanism in MECHANISMS:
        if hasattr(kind(mechanism), "patterns"):
            found.setdefault(kind(mechanism), set()).update(run(mechanism))
    assert len(found) >= 25
    for build, patterns in found.items():
        assert patterns == build.patterns, build.__name__


def test_every_mechanism_of_tokens_states_its_patterns() -> None:
    for mechanism in MECHANISMS:
        of_tokens = any("x must be (batch, tokens" in said for _, said in mechanism.wrong)
        if of_tokens and kind(mechanism) is not PointerHead:  # which gives logits, it mixes nothing
            assert isinstance(kind(mechanism).patterns, frozenset), mechanism.name


def test_every_mechanism_has_rows_or_is_named_with_its_reason() -> None:
    checked = {type(module).__module__ for row in MECHANISMS for module in row.build(0.0).modules()}
    shared = "heed_core.attention.projected"  # a base, no mechanism
    found = {f"heed_core.attention.{name}" for _, name, _ in iter_modules(attention.__path__)}
    assert found - checked - {shared} == {name for name in OUTSIDE if name in found}
    assert not set(OUTSIDE) & checked
    for name in OUTSIDE:
        import_module(name)
