import pytest

from heed_core.testing.conformance import Clause, Mechanism, conformance_clauses
from heed_core.testing.mechanisms import MECHANISMS

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
