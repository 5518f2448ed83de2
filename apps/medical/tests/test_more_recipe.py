"""The recipe of MoRE: every verb on its sample and on layouts that users have."""

from pathlib import Path

import pytest

from heed_runtime.app import App
from heed_runtime.testing.contract import check_recipe

APP = App(
    name="heed-medical", about="MoRE alone.", systems={"more": "heed_medical_cli.more:RECIPE"}
)


@pytest.mark.slow
def test_every_verb_works_on_the_sample(tmp_path: Path):
    check_recipe(APP, "more", tmp_path)
