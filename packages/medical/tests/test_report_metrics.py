"""Words and scores of reports: equality with the numbers of the official evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from heed_core.errors import InputError
from heed_medical.reports.efficacy import FINDINGS, clinical_efficacy, match_findings, read_findings
from heed_medical.reports.meteor import meteor_by_program, meteor_es
from heed_medical.reports.metrics import bleu, cider, rouge_l
from heed_medical.reports.stems import stem
from heed_medical.reports.words import Vocabulary, clean_report

GOLDEN = Path(__file__).parent / "golden" / "report_metrics"
SETS = pytest.mark.parametrize("name", ["spec_three_pairs", "reports"])
DIALECTS = pytest.mark.parametrize(("key", "dialect"), [("iu_xray", "iu"), ("mimic_cxr", "mimic")])


@pytest.fixture(scope="module")
def cases() -> dict:
    return json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "fixture.safetensors")


@SETS
def test_corpus_scores_are_those_of_the_official_code(cases, golden, name):
    texts = cases["text_metrics"][name]
    pair = texts["references"], texts["hypotheses"]
    got = [*bleu(*pair).corpus, rouge_l(*pair).corpus, cider(*pair).corpus]
    np.testing.assert_allclose(got, golden[f"output.{name}.corpus"][:6], rtol=0, atol=1e-10)


@SETS
def test_pair_scores_are_those_of_the_official_code(cases, golden, name):
    texts = cases["text_metrics"][name]
    pair = texts["references"], texts["hypotheses"]
    got = {"bleu": bleu(*pair).pairs, "rouge": rouge_l(*pair).pairs, "cider": cider(*pair).pairs}
    for metric, scores in got.items():
        wanted = golden[f"output.{name}.per_pair.{metric}"]
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-10, err_msg=metric)


@SETS
def test_meteor_es_is_near_meteor_and_ranks_pairs_alike(cases, golden, name):
    texts = cases["text_metrics"][name]
    got = meteor_es(texts["references"], texts["hypotheses"])
    wanted = golden[f"output.{name}.per_pair.meteor"]
    assert abs(got.corpus - golden[f"output.{name}.corpus"][6]) < 0.06
    assert np.abs(got.pairs - wanted).max() < 0.15


def test_unit_values():
    references = [
        ["the heart size is normal . the lungs are clear ."],
        ["there is a small left pleural effusion ."],
        ["no pneumothorax . the lungs are clear ."],
    ]
    hypotheses = [
        "the heart is normal in size . the lungs are clear .",
        "there is no pleural effusion .",
        "no pneumothorax or pleural effusion .",
    ]
    wanted = [0.698643, 0.568291, 0.429389, 0.343814]
    assert bleu(references, hypotheses).corpus == pytest.approx(wanted, abs=1e-6)
    assert rouge_l(references, hypotheses).corpus == pytest.approx(0.663531, abs=1e-6)
    assert cider(references, hypotheses).corpus == pytest.approx(2.934387, abs=1e-6)


def test_identical_texts():
    texts = ["one two three four .", "five six seven eight nine", "ten eleven twelve thirteen"]
    same = bleu([[t] for t in texts], texts).corpus[3]
    assert 1 - 1e-9 < same < 1
    assert cider([[t] for t in texts], texts).corpus == pytest.approx(10.0, abs=1e-12)
    assert rouge_l([[t] for t in texts], texts).corpus == 1
    assert meteor_es([[t] for t in texts], texts).corpus == pytest.approx(1.0)


def test_an_empty_hypothesis_scores_zero_and_warns_of_nothing():
    pair = [["the lungs are clear ."], ["no effusion ."]], ["", "no effusion ."]
    assert bleu(*pair).pairs[0].max() < 1e-6
    assert rouge_l(*pair).pairs[0] == 0
    assert cider(*pair).pairs[0] == 0
    assert meteor_es(*pair).pairs[0] == 0
    assert bleu([["a b"]], [""]).corpus.max() < 1e-6


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider, meteor_es])
def test_texts_that_do_not_pair_are_refused(metric):
    with pytest.raises(ValueError, match="as many"):
        metric([["a"]], ["a", "b"])
    with pytest.raises(ValueError, match="must have a reference"):
        metric([[]], ["a"])


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("caresses", "caress"), ("ponies", "poni"), ("cats", "cat"), ("agreed", "agre"),
        ("plastered", "plaster"), ("bled", "bled"), ("motoring", "motor"), ("sing", "sing"),
        ("conflated", "conflat"), ("hopping", "hop"), ("falling", "fall"), ("filing", "file"),
        ("happy", "happi"), ("sky", "sky"), ("relational", "relat"), ("conditional", "condit"),
        ("triplicate", "triplic"), ("hopefulness", "hope"), ("adjustment", "adjust"),
        ("adoption", "adopt"), ("probate", "probat"), ("rate", "rate"), ("controlling", "control"),
        ("roll", "roll"),
    ],
)  # fmt: skip
def test_stems_are_porters(word, wanted):  # the examples of Porter's paper
    assert stem(word) == wanted


@DIALECTS
def test_cleaned_reports_are_the_official_ones(cases, key, dialect):
    wanted = cases["tokenizer"][key]
    assert [clean_report(t, dialect) for t in wanted["train"]] == wanted["cleaned_train"]
    if "cleaned_probe" in wanted:
        assert [clean_report(t, dialect) for t in wanted["probe"]] == wanted["cleaned_probe"]


@DIALECTS
def test_numbers_are_the_official_ones(cases, key, dialect):
    wanted = cases["tokenizer"][key]
    train = [clean_report(text, dialect) for text in wanted["train"]]
    words = Vocabulary.of(train, threshold=wanted["threshold"])
    assert {word: words.words.index(word) + 1 for word in words.words} == wanted["token2idx"]
    ids = [words.encode(clean_report(text, dialect), most=60) for text in wanted["probe"]]
    assert ids == wanted["probe_ids"]
    assert [words.decode(each[1:]) for each in ids] == wanted["probe_decoded_after_bos"]


def test_decoding_gives_back_what_was_encoded():
    text = clean_report("The lungs are clear. The heart is big.")
    words = Vocabulary.of([text], threshold=1)
    assert words.decode(words.encode(text, most=60)[1:]) == text
    assert words.encode(text, most=4) == words.encode(text, most=60)[:4]
    assert words.encode(text, most=4)[-1] != 0


def test_hyphens_and_digits_stay_and_the_range_of_signs_goes():
    assert clean_report("X-ray <5> mm = big @ [L3]: {a}") == "x-ray 5 mm  big  l3 a ."


def test_vocabularies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="<unk>"):
        Vocabulary(("a",))
    with pytest.raises(ValueError, match="'a' twice"):
        Vocabulary(("<unk>", "a", "a"))
    with pytest.raises(ValueError, match="threshold"):
        Vocabulary.of(["a"], threshold=0)


def test_clinical_efficacy_is_that_of_the_official_code(cases, golden):
    got = clinical_efficacy(golden["input.ce_truth"], golden["input.ce_prediction"])
    wanted = cases["clinical_efficacy"]
    for kind, scores in (("MACRO", got.macro), ("MICRO", got.micro)):
        for name, score in zip(("PRECISION", "RECALL", "F1"), scores, strict=True):
            assert score == pytest.approx(wanted[f"{name}_{kind}"], abs=1e-10)
    areas = [wanted[f"AUCROC_{name}"] for name in FINDINGS]
    np.testing.assert_allclose(got.findings[:, 3], areas, rtol=0, atol=1e-10)
    assert got.auroc == pytest.approx(wanted["AVG_AUCROC"], abs=1e-10)


def write_findings(path: Path, rows: dict[str, list[str]], names=FINDINGS) -> Path:
    lines = [",".join(["id", *names]), *(",".join([key, *row]) for key, row in rows.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_findings_are_matched_by_name_in_any_order(tmp_path):
    first = write_findings(tmp_path / "a.csv", {"x": ["1"] * 14, "y": ["-1"] + [""] * 13})
    second = write_findings(
        tmp_path / "b.csv", {"y": ["0"] * 14, "x": ["1"] * 13 + ["0"]}, names=sorted(FINDINGS)
    )
    truth, predicted = match_findings(first, second)
    assert truth[0].tolist() == [1.0] * 14
    assert predicted[0].tolist() == [1.0] * 13 + [0.0]  # Support Devices is last in both orders
    assert np.isnan(truth[1, 1:]).all()


def test_findings_that_cannot_be_used_are_refused(tmp_path):
    good = write_findings(tmp_path / "good.csv", {"x": ["1"] * 14})
    with pytest.raises(InputError, match=r"row 2, No Finding: is 'yes'"):
        read_findings(write_findings(tmp_path / "word.csv", {"x": ["yes"] + ["1"] * 13}))
    with pytest.raises(InputError, match="no column 'Support Devices'"):
        read_findings(write_findings(tmp_path / "few.csv", {"x": ["1"] * 13}, names=FINDINGS[:-1]))
    with pytest.raises(InputError, match="has no row of x, which"):
        match_findings(good, write_findings(tmp_path / "other.csv", {"z": ["1"] * 14}))
    with pytest.raises(InputError, match="no such file"):
        read_findings(tmp_path / "none.csv")
    good.write_bytes(good.read_bytes().replace(b"x", "caf\xe9".encode("latin-1")))
    with pytest.raises(InputError, match=r"good\.csv: cannot be read as text .*save it as UTF-8"):
        read_findings(good)


def test_reports_that_name_findings_may_have_several_lines(tmp_path):
    path = write_findings(tmp_path / "lines.csv", {'"Clear\nlungs."': ["1"] * 14})
    assert read_findings(path)[0] == ["Clear\nlungs."]


def test_the_meteor_program_is_asked_and_missed(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        meteor_by_program(["a"], ["a"], tmp_path / "meteor.jar")
    jar = tmp_path / "meteor.jar"
    jar.touch()
    with pytest.raises(InputError, match="not installed"):
        meteor_by_program(["a"], ["a"], jar, java="no-such-java")
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho Segment 1 score: 1\necho 'Final score:   0.25'\n")
    java.chmod(0o755)
    assert meteor_by_program(["a"], ["a"], jar, java=str(java)) == 0.25
