"""The recipe of IVGN: every verb on its sample and on layouts that users have."""

from pathlib import Path

import pytest

from heed_runtime.app import App
from heed_runtime.testing.contract import check_recipe

APP = App(
    name="heed-medical", about="IVGN alone.", systems={"ivgn": "heed_medical_cli.ivgn:RECIPE"}
)
TINY = (
    *("--model.dim", "16", "--model.heads", "2", "--model.hidden", "16", "--model.depth", "1"),
    *("--data.size", "32", "--data.resize", "36", "--data.most-words", "12", "--data.beam", "2"),
)


@pytest.mark.slow
def test_every_verb_works_on_the_sample(tmp_path: Path):
    check_recipe(APP, "ivgn", tmp_path, flags=TINY)
