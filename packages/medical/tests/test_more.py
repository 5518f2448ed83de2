"""Identities of MoRE's parts: dropped keys, losses, text, retrieval, maps, studies."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from heed_core import observe
from heed_core.errors import InputError
from heed_medical.more import (
    More,
    MoreClassifier,
    MoreConfig,
    TextConfig,
    TextTower,
    TowerConfig,
    drop_schedule,
    info_nce,
    kept_keys,
    pair_losses,
    small_config,
)
from heed_medical.more.attribution import join_words, rollout, row_of_mean, tokens_to_samples
from heed_medical.more.batches import (
    Augmentation,
    join,
    permute_segments,
    rows_to_encode,
    warp_time,
)
from heed_medical.more.checking import check_studies
from heed_medical.more.probes import fit_probe
from heed_medical.more.retrieval import EmbeddingIndex, label_precision, retrieval_scores
from heed_medical.more.settings import MoreData
from heed_medical.more.studies import (
    StudySet,
    broken_inputs,
    broken_rows,
    clean_report,
    find_inputs,
    find_studies,
    plan_studies,
    prepare_xray,
    subjects_in_several_splits,
)
from heed_medical.more.towers import ImageStem, Tower

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
TINY_TEXT = TextConfig(
    vocabulary=260, dim=16, depth=2, heads=2, hidden=32, positions=66, max_tokens=64, lora_rank=4
)


def test_schedule_falls_linearly():
    shares = drop_schedule(0.3, 12)
    assert shares[0] == 0.3
    assert shares[1] == pytest.approx(0.3 * 10 / 11)
    assert shares[-1] == 0
    assert drop_schedule(0.3, 4, "constant") == [0.3] * 4


def test_share_of_dropped_keys():
    kept = kept_keys((40, 12, 50, 50), 0.3)
    off = ~torch.eye(50, dtype=torch.bool)
    assert (~kept[:, :, off]).float().mean().item() == pytest.approx(0.3, abs=0.003)
    assert kept.diagonal(dim1=2, dim2=3).all()


def test_no_dropping_changes_nothing():
    assert kept_keys((2, 3, 5, 5), 0.0).all()
    torch.manual_seed(0)
    config = TowerConfig(dim=16, depth=2, heads=2, hidden=32, key_drop=0.0)
    tower = Tower(config, ImageStem(16, patch=4), tokens=4)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(tower.train()(x), tower.eval()(x))


def tower_of_three(share: float, **sizes: object) -> Tower:
    """A tower of 3 tokens and the class token."""
    config = TowerConfig(dim=16, heads=2, hidden=32, key_drop=share, **sizes)  # type: ignore[arg-type]
    return Tower(config, ImageStem(16, patch=4), tokens=3)


def test_rows_of_attention_sum_to_one_however_many_keys_are_dropped():
    torch.manual_seed(0)
    tower = tower_of_three(0.99, depth=2, schedule="constant").train()
    with observe(tower, keep="all") as record:
        tower(torch.randn(50, 3, 4, 12))
    assert len(list(record)) == 2
    for name in record:
        weights = record.calls(name)[0]
        assert weights.shape == (50, 2, 4, 4)
        assert torch.allclose(weights.sum(dim=-1), torch.ones(50, 2, 4), atol=1e-6)
        assert (weights == 0).float().mean() > 0.7


def test_each_block_drops_its_share_of_keys():
    torch.manual_seed(0)
    tower = tower_of_three(0.3, depth=4).train()
    with observe(tower, keep="all") as record:
        tower(torch.randn(2000, 3, 4, 12))
    off = ~torch.eye(4, dtype=torch.bool)
    shares = [(record.calls(name)[0][..., off] == 0).float().mean().item() for name in record]
    assert shares == pytest.approx([0.3, 0.2, 0.1, 0.0], abs=0.006)


@pytest.mark.parametrize(("given", "used"), [(0.001, 0.005), (0.02, 0.02), (3.0, 0.5)])
def test_the_temperature_stays_in_its_range(given: float, used: float):
    with torch.device("meta"):
        model = More(small_config())
    model.log_temperature = torch.nn.Parameter(torch.tensor(math.log(given)))
    assert model.temperature.item() == pytest.approx(used, rel=1e-5)
    with pytest.raises(ValueError, match=r"temperature must be in \[0.005, 0.5\], got 0.6"):
        MoreConfig(temperature=0.6)


def test_tower_drops_keys_in_training_only():
    torch.manual_seed(0)
    config = TowerConfig(dim=16, depth=2, heads=2, hidden=32, key_drop=0.9)
    tower = Tower(config, ImageStem(16, patch=4), tokens=4)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(tower.eval()(x), tower(x))
    trained = tower.train()(x)
    assert not torch.equal(trained, tower.eval()(x))
    assert torch.isfinite(trained).all()
    with pytest.raises(ValueError, match="must give 4 tokens"):
        tower(torch.zeros(1, 3, 8, 12))


def naive_info_nce(a: Tensor, b: Tensor, temperature: float) -> float:
    total = 0.0
    for i in range(len(a)):
        scores = [
            float(torch.cosine_similarity(a[i], b[j], dim=0)) / temperature for j in range(len(b))
        ]
        total += math.log(sum(math.exp(s - max(scores)) for s in scores)) + max(scores) - scores[i]
    return total / len(a)


def test_info_nce_is_its_formula():
    a, b = torch.randn(2, 7, 5, dtype=torch.float64)
    assert float(info_nce(a, b, 0.1)) == pytest.approx(naive_info_nce(a, b, 0.1), rel=1e-9)
    same = torch.ones(6, 4)
    assert float(info_nce(same, same, 0.02)) == pytest.approx(math.log(6), rel=1e-5)
    apart = torch.eye(6)
    assert float(info_nce(apart, apart, 0.02)) < 1e-3
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    info_nce(a, b, temperature).backward()
    assert temperature.grad is not None
    assert temperature.grad != 0


def test_info_nce_leaves_rows_and_groups_out():
    a, b = torch.randn(2, 6, 5)
    valid = torch.tensor([True, False, True, True, False, True])
    assert torch.equal(info_nce(a, b, 0.1, valid=valid), info_nce(a[valid], b[valid], 0.1))
    assert info_nce(a, b, 0.1, valid=torch.zeros(6, dtype=torch.bool)) == 0
    groups = torch.tensor([[0, 0, -1, -1, -1, -1]])
    found = info_nce(a, b, 0.1, groups=groups)
    logits = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T / 0.1
    logits[0, 1] = logits[1, 0] = -torch.inf
    wanted = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    assert torch.allclose(found, wanted)


def test_missing_ecgs_count_only_where_they_are():
    rows = {name: torch.randn(5, 4) for name in ("xray", "ecg", "text")}
    valid = {name: torch.ones(5, dtype=torch.bool) for name in rows}
    valid["ecg"][2:] = False
    found = pair_losses(rows, valid, 0.1)
    assert set(found) == {("text", "xray"), ("text", "ecg")}
    rows["ecg"][3] = 100.0
    again = pair_losses(rows, valid, 0.1)
    assert all(torch.equal(found[pair], again[pair]) for pair in found)
    swapped = pair_losses({**rows, "text": rows["xray"], "xray": rows["text"]}, valid, 0.1)
    assert torch.allclose(swapped["text", "xray"], found["text", "xray"])
    there, back = (info_nce(rows[a], rows[b], 0.1) for a, b in (("text", "xray"), ("xray", "text")))
    assert torch.allclose(found["text", "xray"], (there + back) / 2)
    assert not torch.allclose(there, back)
    both = pair_losses({n: rows[n] for n in ("xray", "ecg")}, valid, 0.1)
    assert set(both) == {("xray", "ecg")}
    with pytest.raises(ValueError, match="two modalities"):
        pair_losses({"text": rows["text"]}, valid, 0.1)


GATHERED = """
import sys, torch, torch.distributed as dist
from heed_medical.more import gather_rows, info_nce
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
layer = torch.nn.Linear(3, 4).double()
a, b = torch.randn(2, 6, 3, dtype=torch.float64).chunk(2, dim=1)[rank]
loss = info_nce(gather_rows(layer(a)), gather_rows(layer(b)), 0.5)
loss.backward()
dist.all_reduce(layer.weight.grad)
torch.save((loss.detach(), layer.weight.grad / 2), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path: Path):
    words = [sys.executable, "-c", GATHERED]
    started = [subprocess.Popen([*words, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4).double()
    a, b = torch.randn(2, 6, 3, dtype=torch.float64)
    loss = info_nce(layer(a), layer(b), 0.5)
    loss.backward()
    assert layer.weight.grad is not None
    for rank in range(2):
        found, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(found, loss, rtol=1e-12)
        assert torch.allclose(gradient, layer.weight.grad, rtol=1e-10)


def test_adapters_change_nothing_at_first():
    torch.manual_seed(0)
    tower = TextTower(TINY_TEXT).eval()
    ids, mask, _ = tower.tokens([("clear lungs", "sinus rhythm"), ("edema", "")])
    before = tower(ids, mask)
    adapters = [p for n, p in tower.named_parameters() if "lora_" in n]
    assert len(adapters) == 8
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "lora_A" in name:
                parameter.normal_()
    assert torch.equal(before, tower(ids, mask))
    frozen = {n for n, p in tower.named_parameters() if not p.requires_grad}
    assert all("lora_" not in n and not n.endswith("bias") for n in frozen)


def test_padding_does_not_count():
    torch.manual_seed(0)
    tower = TextTower(TINY_TEXT).eval()
    ids, mask, _ = tower.tokens([("edema", "")])
    padded = torch.nn.functional.pad(ids, (0, 40), value=1)
    wide = torch.nn.functional.pad(mask, (0, 40))
    assert torch.allclose(tower(ids, mask), tower(padded, wide), atol=1e-5)
    official = TextTower(TextConfig(**{**vars(TINY_TEXT), "pool": "mean-all"})).eval()
    official.load_state_dict(tower.state_dict())
    assert official.tokens([("edema", "")])[0].shape[1] == TINY_TEXT.max_tokens
    assert not torch.allclose(official(padded, wide), tower(ids, mask), atol=1e-5)


def test_pairs_of_reports_are_cut_at_the_longer():
    tower = TextTower(TINY_TEXT)
    row = tower.encode(("a" * 200, "bc"))
    assert len(row) == TINY_TEXT.max_tokens
    assert row[0] == 0
    assert row[-4:] == [2, 4 + ord("b"), 4 + ord("c"), 2]
    assert tower.encode(("", "bc")) == [0, 4 + ord("b"), 4 + ord("c"), 2]


def test_classifier_starts_from_a_pretrained_model():
    torch.manual_seed(0)
    config = small_config()
    model, classifier = More(config).eval(), MoreClassifier(config, classes=3).eval()
    classifier.start_from(model)
    xray, ecg = torch.randn(2, 3, 64, 64), torch.randn(2, 12, 500)
    with torch.no_grad():
        classifier.head.weight[:, : config.projection] = 0
        a = classifier(xray=xray, ecg=ecg)
        b = classifier(xray=torch.randn_like(xray), ecg=ecg)
    assert torch.allclose(a, b, atol=1e-6)
    classifier.train_only_last(1)
    trained = {n.split(".")[0] for n, p in classifier.named_parameters() if p.requires_grad}
    assert trained == {"xray", "ecg", "projectors", "head"}
    kept = [n for n, p in classifier.xray.named_parameters() if p.requires_grad]
    assert kept == [f"blocks.3.attention.{n}.weight" for n in ("query", "key", "value")]


def test_recall_counts_equal_items_once():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 4)).astype(np.float32)
    perfect = retrieval_scores(a, a, query_ids=range(6), gallery_ids=range(6), ks=(1,))
    norms = np.linalg.norm(a, axis=1, keepdims=True)
    unit = a / norms
    perfect = retrieval_scores(unit, unit, query_ids=range(6), gallery_ids=range(6), ks=(1,))
    assert perfect.recall[1] == 1
    assert perfect.median_rank == 1
    twice = np.repeat(unit[:3], 2, axis=0)
    found = retrieval_scores(
        unit, twice, query_ids=range(6), gallery_ids=[0, 0, 1, 1, 2, 2], ks=(1, 3)
    )
    assert (found.queries, found.gallery) == (6, 3)
    constant = np.ones((5, 2), dtype=np.float32)
    worst = retrieval_scores(
        constant, constant, query_ids=range(5), gallery_ids=range(5), ks=(1, 5)
    )
    assert worst.recall == {1: 0.0, 5: 1.0}


def test_precision_by_finding():
    rows = np.eye(4, dtype=np.float32)
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 0]], dtype=bool)
    shifted = np.roll(rows, 1, axis=0)
    names = range(4)
    found = label_precision(
        rows, shifted, query_labels=labels, gallery_labels=labels,
        query_ids=names, gallery_ids=names,
    )  # fmt: skip
    assert found == pytest.approx(1 / 3)


def test_index_on_disk(tmp_path: Path):
    rng = np.random.default_rng(0)
    vectors = {m: rng.normal(size=(7, 4)).astype(np.float32) for m in ("xray", "text")}
    names = {m: [f"{m}{i}" for i in range(7)] for m in vectors}
    index = EmbeddingIndex(vectors=vectors, names=names)
    index.save(tmp_path / "a.safetensors")
    loaded = EmbeddingIndex.load(tmp_path / "a.safetensors")
    cosines, rows = loaded.search(vectors["xray"][:2], "text", 3)
    every = vectors["xray"][:2] @ vectors["text"].T
    assert np.array_equal(rows, np.argsort(-every, axis=1)[:, :3])
    assert np.allclose(cosines, -np.sort(-every, axis=1)[:, :3])
    index.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"xray", "xray_names", "text", "text_names"}
        assert np.array_equal(arrays["text"], vectors["text"])
        assert arrays["text_names"].tolist() == names["text"]
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / "one.npz", xray=vectors["xray"][0])
    assert EmbeddingIndex.load(tmp_path / "b").names == {"xray": ["one"]}
    for path, match in ((tmp_path / "none", "does not exist"), (tmp_path, None)):
        if match:
            with pytest.raises(InputError, match=match):
                EmbeddingIndex.load(path)
    (tmp_path / "c.safetensors").write_bytes(b"12")
    with pytest.raises(InputError, match="no index"):
        EmbeddingIndex.load(tmp_path / "c.safetensors")


def test_large_indices_are_searched_alike(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 8)).astype(np.float32)
    index = EmbeddingIndex(vectors={"ecg": rows}, names={"ecg": [str(i) for i in range(50)]})
    plain = index.search(rows[:5], "ecg", 4)
    monkeypatch.setattr("heed_medical.more.retrieval.LARGE", 10)
    fast = index.search(rows[:5], "ecg", 4)
    assert np.array_equal(plain[1], fast[1])
    assert np.allclose(plain[0], fast[0], atol=1e-5)


def test_rollout():
    torch.manual_seed(0)
    maps = [torch.rand(2, 5, 5).softmax(-1) for _ in range(3)]
    nothing = rollout(maps, [torch.zeros_like(m) for m in maps])
    assert torch.equal(nothing, torch.eye(5))
    shared = rollout(maps, [torch.full_like(m, 3.0) for m in maps])
    assert torch.allclose(shared, torch.eye(5), atol=1e-5)
    scores = torch.randn(2, 5, 5, requires_grad=True)
    weights = scores.softmax(-1)
    values = torch.randn(2, 5, 5)
    by_weight, by_score = torch.autograd.grad((weights * values).sum(), [weights, scores])
    single = torch.eye(5) + by_score.clamp(min=0).mean(dim=0)
    single = single / single.sum(dim=1, keepdim=True)
    assert torch.allclose(rollout([weights.detach()], [by_weight]), single, atol=1e-6)
    plain = torch.eye(5) + (by_weight * weights.detach()).clamp(min=0).mean(dim=0)
    published = rollout([weights.detach()], [by_weight], relevance="published")
    assert torch.allclose(published, plain / plain.sum(dim=1, keepdim=True), atol=1e-6)
    assert not torch.allclose(published, single, atol=1e-3)
    found = rollout(maps, [torch.rand_like(m) for m in maps])
    assert torch.allclose(found.sum(dim=1), torch.ones(5))
    assert (found >= 0).all()


def test_a_mean_over_tokens_shows_what_they_took_from_others():
    assert torch.equal(row_of_mean(torch.eye(4)), torch.zeros(4))
    # all tokens look at the third, and keep ten times as much of themselves
    total = torch.eye(4) * 10
    total[:, 2] += 1
    assert torch.equal(row_of_mean(total), torch.tensor([0.0, 0.0, 1.0, 0.0]))
    even = row_of_mean(torch.full((4, 4), 0.25))
    assert torch.allclose(even, torch.full((4,), 0.25))


def test_relevance_of_tokens_is_kept_in_samples():
    tokens = torch.rand(196)
    samples = tokens_to_samples(tokens, 1000)
    assert samples.sum().item() == pytest.approx(tokens.sum().item(), rel=1e-5)
    one = torch.zeros(196)
    one[10] = 1
    assert tokens_to_samples(one, 1000).nonzero()[:, 0].tolist() == list(range(50, 75))


def test_pieces_are_joined_to_words():
    words, sums = join_words(["", " no", " ed", "ema", ".", ""], np.arange(6, dtype=np.float32))
    assert words == ["no", "edema."]
    assert sums.tolist() == [1, 9]


def test_augmentation_keeps_shapes_and_is_reproducible(tmp_path: Path):
    ecg = np.arange(12000, dtype=np.float32).reshape(12, 1000)
    rng = np.random.default_rng(0)
    assert warp_time(ecg, rng).shape == ecg.shape
    moved = permute_segments(ecg, rng)
    assert np.array_equal(np.sort(moved, axis=1), ecg)
    assert np.array_equal(np.diff(moved, axis=0), np.full((11, 1000), 1000, dtype=np.float32))
    apart = permute_segments(ecg, rng, each_lead=True)
    assert np.array_equal(np.sort(apart, axis=1), ecg)
    study = studies(tmp_path)[0]
    change = Augmentation(flip=0.5)
    a, b = (change(study, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(a.xray, b.xray)
    assert a.xray.shape == study.xray.shape


def write_manifest(folder: Path, text: str) -> Path:
    for name in ("a.png", "b.png"):
        Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(folder / name)
    path = folder / "manifest.csv"
    path.write_text(text)
    return path


MANIFEST = """xray_path,xray_report,subject_id,split,Edema
a.png,FINDINGS: Edema is present.,1,train,1
b.png,Clear.,2,train,-1
a.png,,3,validate,0
"""


def studies(folder: Path) -> StudySet:
    write_manifest(folder, MANIFEST)
    data = plan_studies(MoreData(), folder)
    return StudySet(find_studies(folder, data), data, small_config())


def test_manifest(tmp_path: Path):
    found = studies(tmp_path)
    assert found.data.modalities == ("xray", "text")
    assert found.data.labels == ("Edema",)
    assert found.names == ["a", "b", "a-2"]
    assert [f.split for f in found.files] == ["train", "train", "val"]
    assert [f.labels["Edema"] for f in found.files] == [1, None, 0]
    assert found[0].text == ("The report from Xray is: Edema is present.", "")
    assert found[2].text is None
    batch = join([found[0], found[2]])
    assert batch.valid["text"].tolist() == [True, False]
    assert batch.xray is not None
    assert batch.xray.shape == (2, 3, 64, 64)
    assert rows_to_encode(batch.valid["text"]).tolist() == [0, 1]
    for valid, rows in (([0, 0, 1], [2, 0]), ([0, 0, 0], [0, 1]), ([0, 1, 1], [1, 2]), ([0], [0])):
        assert rows_to_encode(torch.tensor(valid).bool()).tolist() == rows


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name,split\nx,train\n", "no column 'xray_path' or 'ecg_path'"),
        (MANIFEST.replace("Edema is present.,1,train,1", "Edema,1,train,yes"), "Edema = 'yes'"),
        (MANIFEST + ",,4,train,0\n", "row 5: has no X-ray"),
        (MANIFEST.replace("train", "test"), "no study of the split 'train'"),
        (MANIFEST.replace("FINDINGS: Edema is present.", "").replace("Clear.", ""), "two modal"),
    ],
)
def test_broken_manifests(tmp_path: Path, text: str, match: str):
    write_manifest(tmp_path, text)
    with pytest.raises(InputError, match=match):
        plan_studies(MoreData(), tmp_path)


def test_check_lists_everything(tmp_path: Path):
    write_manifest(tmp_path, MANIFEST.replace(",3,validate", ",1,validate") + "c.png,x,5,odd,0\n")
    found = check_studies(MoreData(), tmp_path)
    told = "\n".join(found.problems)
    assert len(found.problems) == 3
    assert "c.png: does not exist" in told
    assert "subject 1 is in the splits train and val" in told
    assert "split 'odd'" in told
    assert "empty report" in found.warnings[0]


def test_broken_rows_are_all_told_and_can_be_skipped(tmp_path: Path):
    write_manifest(tmp_path, MANIFEST + "b.png,x,7,train,odd\n,,8,train,0\n")
    found = check_studies(MoreData(), tmp_path)
    assert len([line for line in found.problems if "row" in line]) == 2
    with pytest.raises(InputError, match=r"row \d+: has Edema = 'odd'.*and 1 more such row"):
        find_studies(tmp_path, MoreData())
    sound = len(find_studies(tmp_path, MoreData(on_error="skip")))
    write_manifest(tmp_path, MANIFEST)
    assert len(find_studies(tmp_path, MoreData())) == sound


def test_what_is_left_out_is_listed(tmp_path: Path):
    write_manifest(tmp_path, MANIFEST + "b.png,x,7,train,2\n,,8,train,0\nb.png,x,9,holdout,0\n")
    lines = broken_rows(tmp_path, MoreData(on_error="skip"))
    assert [line.partition(": ")[2].split(",")[0] for line in lines] == [
        "has Edema = '2'", "has no X-ray", "split 'holdout' is none of train",
    ]  # fmt: skip
    inputs = broken_inputs([tmp_path], MoreData(on_error="skip"))
    assert inputs == lines[:2]  # what is predicted needs no split


def test_an_unknown_split_stops_a_training(tmp_path: Path):
    write_manifest(tmp_path, MANIFEST + "b.png,x,9,holdout,0\n")
    (line,) = [x for x in check_studies(MoreData(), tmp_path).problems if "holdout" in x]
    with pytest.raises(InputError) as stopped:
        find_studies(tmp_path, MoreData(), "train")
    assert str(stopped.value) == line
    assert "row 5: split 'holdout' is none of train, val, test" in line
    assert len(find_studies(tmp_path, MoreData(), None)) == 4


def test_a_report_of_several_lines_keeps_its_words_apart(tmp_path: Path):
    rows = 'file,text\na.png,"FINDINGS:\nThe heart\nis large."\n'
    write_manifest(tmp_path, rows)
    assert clean_report(find_studies(tmp_path, MoreData())[0].report[0]) == "The heart is large."


def test_a_validation_that_is_missing_is_drawn_by_subject(tmp_path: Path):
    rows = [f"a.png,report {n},{n // 2},{'train' if n < 40 else 'test'}" for n in range(44)]
    rows += ["a.png,late,0,test"]
    write_manifest(tmp_path, "\n".join(["file,text,patient_id,split", *rows]) + "\n")
    studies = find_studies(tmp_path, MoreData())
    assert [sum(s.split == split for s in studies) for split in ("train", "val", "test")] == [
        36, 4, 5,
    ]  # fmt: skip
    assert set(subjects_in_several_splits(studies)) == {"0"}  # as the table has it
    other = find_studies(tmp_path, MoreData(split_seed=1, val_share=0.2))
    assert sum(s.split == "val" for s in other) == 8
    found = check_studies(MoreData(), tmp_path)
    assert any("gives no val split; it is drawn by subject" in line for line in found.warnings)
    write_manifest(tmp_path, "file,text,patient_id,split\na.png,one,0,train\na.png,two,0,train\n")
    assert "no study of the split 'val'" in check_studies(MoreData(), tmp_path).problems[-1]


def test_splits_are_drawn_by_subject_where_there_are_none(tmp_path: Path):
    rows = [f"a.png,report {n},{n // 2},0" for n in range(40)]
    text = "file,text,patient_id,Edema\n" + "\n".join(rows) + "\n"
    (tmp_path / "manifest.csv").write_text(text)
    studies = find_studies(tmp_path, MoreData())
    assert [sum(s.split == split for s in studies) for split in ("train", "val", "test")] == [
        28, 4, 8,
    ]  # fmt: skip
    assert not subjects_in_several_splits(studies)
    other = find_studies(tmp_path, MoreData(split_seed=1))
    assert [s.split for s in other] != [s.split for s in studies]


def test_inputs_of_all_kinds(tmp_path: Path):
    studies(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "note.txt").write_text("IMPRESSION: edema")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "in" / "x.png")
    found = find_inputs([tmp_path / "in", tmp_path / "manifest.csv"], MoreData())
    assert [(f.name, f.modalities) for f in found] == [
        ("note", ("text",)), ("x", ("xray",)), ("a", ("xray", "text")), ("b", ("xray", "text")),
        ("a-2", ("xray",)),
    ]  # fmt: skip
    (tmp_path / "in" / "note.txt").write_text("  ___ ")
    with pytest.raises(InputError, match="empty report"):
        find_inputs([tmp_path / "in" / "note.txt"], MoreData())
    with pytest.raises(InputError, match="no picture"):
        find_inputs([Path(__file__)], MoreData())


def test_reports_are_cleaned():
    text = "FINAL REPORT FINDINGS: Clear lungs. Seen at 10:45 by Dr. ___. IMPRESSION: No effusion."
    assert clean_report(text) == "Clear lungs. No effusion."


def test_xrays_are_standardised():
    grey = np.full((30, 40), 0.5, dtype=np.float32)
    found = prepare_xray(grey, (64, 64), equalise=False)
    assert found.shape == (64, 64)
    assert found == pytest.approx((0.5 - 0.499) / 0.293, abs=1e-5)


def test_probe_is_a_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6))
    labels = (x[:, :2] + 0.5 * rng.normal(size=(200, 2)) > 0).astype(float)
    labels[:20, 0] = np.nan
    probe = fit_probe(x, labels, penalty=2.0)
    scaled = (x - x.mean(0)) / x.std(0)
    for column in range(2):
        known = np.isfinite(labels[:, column])
        peer = linear_model.LogisticRegression(C=0.5, tol=1e-8, max_iter=500)
        peer.fit(scaled[known], labels[known, column])
        wanted = peer.predict_proba(scaled)[:, 1]
        assert np.abs(probe.probabilities(x)[:, column] - wanted).max() < 1e-3
    with pytest.raises(ValueError, match="known label"):
        fit_probe(x, np.full((200, 1), np.nan))


def test_real_notes():
    root = DATA / "restricted" / "cxr-notes"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    data = plan_studies(MoreData(), root)
    assert data.modalities == ("xray", "text")
    counts = [len(find_studies(root, data, split)) for split in ("train", "val", "test")]
    assert counts == [144, 21, 41]
