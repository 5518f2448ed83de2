import pytest

from heed_core.testing.conformance import Clause, conformance_clauses
from heed_core.testing.mechanisms import MECHANISMS

CLAUSES = [clause for mechanism in MECHANISMS for clause in conformance_clauses(mechanism)]


@pytest.mark.parametrize(
    "clause",
    [
        pytest.param(clause, marks=pytest.mark.compile if clause.compiles else (), id=str(clause))
        for clause in CLAUSES
    ],
)
def test_conformance(clause: Clause) -> None:
    if clause.excuse is not None:
        pytest.skip(clause.excuse)
    clause.check()


def test_names_are_unique() -> None:
    names = [mechanism.name for mechanism in MECHANISMS]
    assert len(names) == len(set(names))
