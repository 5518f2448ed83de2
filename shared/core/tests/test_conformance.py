import pytest

from heed_core.testing.conformance import Clause, conformance_clauses
from heed_core.testing.mechanisms import MECHANISMS

CLAUSES = [clause for mechanism in MECHANISMS for clause in conformance_clauses(mechanism)]


def marks(clause: Clause) -> list[pytest.MarkDecorator]:
    bad_input = [pytest.mark.bad_input] if clause.name == "wrong-shape" else []
    return [*bad_input, *([pytest.mark.compile] if clause.compiles else [])]


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
