"""What findings are asked and denied with: by default, by settings, from a table."""

from pathlib import Path

import pytest

from heed_core.errors import InputError
from heed_medical.more.prompts import with_prompt_file
from heed_medical.more.settings import MoreData


def test_contrast_denies_findings_of_xrays():
    assert MoreData().denials_of("Edema") == ()
    data = MoreData(contrast=True)
    assert data.prompts_of("Edema") == ("Edema is present",)
    assert data.denials_of("Edema") == ("no Edema",)
    assert data.prompts_of("MI") == ("Myocardial Infarction",)
    assert data.denials_of("MI") == ()
    assert data.denials_of("No Finding") == ()


def test_own_prompts_are_denied_by_own_denials_alone():
    data = MoreData(
        prompts=("Edema=fluid | wet lungs",), denials=("Fracture=bones intact",), contrast=True
    )
    assert data.prompts_of("Edema") == ("fluid", "wet lungs")
    assert data.denials_of("Edema") == ()
    assert data.prompts_of("Fracture") == ("Fracture is present",)
    assert data.denials_of("Fracture") == ("bones intact",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"denials": ("Edema",)}, "denials must be FINDING=TEXT, got 'Edema'"),
        ({"prompts": ("Edema= | ",)}, "prompts must be FINDING=TEXT"),
        ({"prompts": ("Edema=a", "Edema=b")}, "prompts name 'Edema' twice"),
        ({"denials": ("Edema=a",), "labels": ("MI",)}, "must be of the findings MI, got 'Edema'"),
    ],
)
def test_prompts_that_cannot_be_are_refused(changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        MoreData(**changes)


TABLE = """finding,prompt,denial
Edema,fluid in the lungs,clear lungs
Edema,wet lungs,
MI,"infarction, old or new",
Edema,,no fluid
"""


def test_a_table_gives_several_prompts_per_finding(tmp_path: Path):
    path = tmp_path / "prompts.csv"
    path.write_text(TABLE)
    data = with_prompt_file(MoreData(prompt_file=path, prompts=("CD=block",)))
    assert data.prompt_file is None
    assert data.prompts_of("Edema") == ("fluid in the lungs", "wet lungs")
    assert data.denials_of("Edema") == ("clear lungs", "no fluid")
    assert data.prompts_of("MI") == ("infarction, old or new",)
    assert data.denials_of("MI") == ()
    assert data.prompts_of("CD") == ("block",)
    assert data.asked == {"Edema", "MI", "CD"}
    plain = MoreData()
    assert with_prompt_file(plain) is plain


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        (TABLE.replace("finding,", "label,"), {}, "has no column 'finding'"),
        (TABLE.replace("prompt,denial", "text,against"), {}, "has no column 'prompt'"),
        (TABLE + ",pus,\n", {}, "row 6: names no finding"),
        (TABLE + "Fracture,,\n", {}, "row 6: has no prompt"),
        (TABLE + "Fracture,a|b,\n", {}, r"row 6: has '\|' in a prompt"),
        (TABLE, {"labels": ("Edema",)}, "row 4: names 'MI', which is none of the findings Edema"),
        (TABLE, {"prompts": ("MI=x",)}, "row 4: names 'MI', which --data.prompts names too"),
        ("finding,prompt\n", {}, "holds no row"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    tmp_path: Path, text: str, changes: dict, said: str
):
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        with_prompt_file(MoreData(prompt_file=path, **changes))
