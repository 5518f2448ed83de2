"""Losses over rows: published numbers, closed forms, and what counts for nothing."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from heed_lidar.losses import (
    ClassBalance,
    ace_loss,
    class_balance,
    cross_entropy,
    focal_loss,
    lovasz_gradient,
    lovasz_softmax,
    segmentation_loss,
)

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
COUNTS = (0, 180, 5200, 2300, 9000)


def rows_of(dense):
    """(B, C, *spatial) to (cells, C)."""
    return dense.movedim(1, -1).reshape(-1, dense.shape[1])


@pytest.fixture(scope="module")
def lovasz():
    return load_file(GOLDEN / "lovasz" / "fixture.safetensors")


@pytest.fixture(scope="module")
def curbnet():
    return load_file(GOLDEN / "curbnet_msca" / "fixture.safetensors")


def assert_near(got, wanted, tolerance):
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max()
    assert error <= tolerance * max(1.0, wanted.abs().max()), f"off by {error:.3g}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lovasz_and_cross_entropy_are_the_published_ones(lovasz, dtype):
    logits = rows_of(lovasz["input.logits"].to(dtype))
    labels = lovasz["input.labels"].flatten()
    probabilities = logits.softmax(1)
    tolerance = TOLERANCE[dtype]
    for name, got in {
        "softmax.present_ignore0": lovasz_softmax(probabilities, labels),
        "softmax.present_no_ignore": lovasz_softmax(probabilities, labels, ignore=None),
        "ce_ignore0": cross_entropy(logits, labels),
        "cylinder3d_loss": segmentation_loss(logits, labels, voxel="cross-entropy").total,
    }.items():
        assert_near(got, lovasz[f"output64.{name}"], tolerance)


@pytest.mark.parametrize("label", [1, 2, 4])
def test_lovasz_of_one_class_is_the_published_one(lovasz, label):
    probabilities = rows_of(lovasz["input.logits"].double()).softmax(1)
    labels = lovasz["input.labels"].flatten()
    kept = labels != 0
    # Of two classes, the other has the same errors: the mean over both is the class's own loss.
    p = probabilities[kept, label]
    pair = torch.stack([1 - p, p], dim=1)
    got = lovasz_softmax(pair, (labels[kept] == label).long(), ignore=None)
    of_rest = lovasz_softmax(pair[:, [1, 0]], (labels[kept] != label).long(), ignore=None)
    assert_near(got, of_rest, 1e-12)
    errors = ((labels[kept] == label).double() - p).abs()
    errors, order = errors.sort(descending=True)
    alone = errors @ lovasz_gradient((labels[kept] == label).double()[order])
    assert_near(alone, lovasz[f"output64.softmax.class{label}_ignore0"], 1e-10)


def test_lovasz_gradients_are_the_published_ones(lovasz):
    logits = lovasz["input.logits"].double().requires_grad_()
    labels = lovasz["input.labels"]
    whole = lovasz_softmax(rows_of(logits).softmax(1), labels.flatten())
    each = torch.stack(
        [
            lovasz_softmax(rows_of(image[None]).softmax(1), label.flatten())
            for image, label in zip(logits, labels, strict=True)
        ]
    ).mean()
    assert_near(each, lovasz["output64.softmax.per_image_ignore0"], 1e-10)
    (gradient,) = torch.autograd.grad(10 * (whole + 0.5 * each), logits)
    assert_near(gradient, lovasz["grad.logits"], 1e-7)  # stored in float32


def test_the_lovasz_gradient_of_an_example(lovasz):
    found = lovasz_gradient(torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.float64))
    assert_near(found, lovasz["output64.lovasz_gradient_example"], 1e-10)
    assert float(found.sum()) == pytest.approx(1.0)


def jaccard_loss(predicted, labels):
    losses = []
    for label in labels.unique():
        a, b = predicted == label, labels == label
        losses.append(1 - (a & b).sum() / (a | b).sum())
    return torch.stack(losses).mean()


@given(st.integers(0, 10_000), st.integers(1, 40))
def test_lovasz_of_hard_predictions_is_one_minus_iou(seed, count):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 4, (count,), generator=generator)
    predicted = torch.randint(1, 4, (count,), generator=generator)
    hard = F.one_hot(predicted, 4).double()
    assert_near(lovasz_softmax(hard, labels), jaccard_loss(predicted, labels).double(), 1e-6)
    assert float(lovasz_softmax(F.one_hot(labels, 4).double(), labels)) == 0.0


def test_one_row_alone_has_one_minus_its_probability():
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.2, 0.3]], dtype=torch.float64)
    labels = torch.tensor([0, 2])
    assert float(lovasz_softmax(probabilities, labels)) == pytest.approx(0.7)


def test_nothing_to_count_is_zero_with_a_graph():
    logits = torch.randn(5, 4, requires_grad=True)
    labels = torch.zeros(5, dtype=torch.long)
    for loss in (
        cross_entropy(logits, labels),
        focal_loss(logits, labels),
        ace_loss(logits, labels, class_balance((1, 2, 3, 4))),
        segmentation_loss(logits, labels, voxel="cross-entropy").total,
    ):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert float(loss.detach()) == 0.0
        assert not gradient.any()
    empty = segmentation_loss(logits[:0], labels[:0], voxel="focal").total
    assert float(empty.detach()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ace_is_the_reference(curbnet, dtype):
    logits = rows_of(curbnet["input.loss_logits"].to(dtype))
    labels = curbnet["input.loss_labels"].flatten()
    balance = class_balance(curbnet["input.loss_class_counts"].tolist())
    tolerance = TOLERANCE[dtype]
    weight, gamma = (torch.tensor(x, dtype=torch.float64) for x in (balance.weight, balance.gamma))
    kept = slice(1, None)  # of the ignored class there is nothing to compare
    assert_near(weight[kept], curbnet["output64.loss.ace_w"][kept], 1e-10)
    assert_near(gamma[kept], curbnet["output64.loss.ace_gamma"][kept], 1e-10)
    assert_near(ace_loss(logits, labels, balance), curbnet["output64.loss.ace"], tolerance)
    assert_near(cross_entropy(logits, labels), curbnet["output64.loss.ce_ignore0"], tolerance)
    region = lovasz_softmax(logits.softmax(1), labels)
    assert_near(region, curbnet["output64.loss.lovasz"], tolerance)
    each = torch.stack(
        [ace_loss(logits[i : i + 1], labels[i : i + 1], balance) for i in labels.nonzero()[:, 0]]
    )
    assert_near(each, curbnet["output64.loss.ace_per_voxel"], tolerance)


def test_gradients_of_ace_and_lovasz_are_the_reference(curbnet):
    dense = curbnet["input.loss_logits"].double().requires_grad_()
    balance = class_balance(curbnet["input.loss_class_counts"].tolist())
    labels = curbnet["input.loss_labels"].flatten()
    total = segmentation_loss(rows_of(dense), labels, balance=balance).total
    (gradient,) = torch.autograd.grad(total, dense)
    assert_near(gradient, curbnet["grad.loss.logits(ace+lovasz)"], 1e-7)


def test_the_loss_of_occupied_rows_is_that_of_the_dense_grid(curbnet):
    logits = rows_of(curbnet["input.loss_logits"].double())
    labels = curbnet["input.loss_labels"].flatten()
    balance = class_balance(COUNTS)
    kept = labels != 0
    assert 0 < int(kept.sum()) < len(kept)
    dense = segmentation_loss(logits, labels, balance=balance)
    occupied = segmentation_loss(logits[kept], labels[kept], balance=balance)
    assert_near(dense.total, occupied.total, 1e-12)


def test_ace_without_balance_is_cross_entropy():
    logits, labels = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 4
    plain = ClassBalance(weight=(0.0, 1.0, 1.0, 1.0), gamma=(0.0,) * 4)
    expected = F.cross_entropy(logits, labels, ignore_index=0)
    assert_near(ace_loss(logits, labels, plain), expected, 1e-12)
    focused = ClassBalance(weight=(0.0, 1.0, 1.0, 1.0), gamma=(2.0,) * 4)
    assert_near(ace_loss(logits, labels, focused), focal_loss(logits, labels), 1e-12)
    assert float(focal_loss(logits, labels)) < float(expected)


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=8), st.floats(1.001, 5.0))
def test_rarer_classes_weigh_more_and_never_negative(counts, delta):
    counts = [7, *counts]
    if not sum(counts[1:]):
        counts[1] = 1
    balance = class_balance(counts, delta=delta)
    assert (balance.weight[0], balance.gamma[0]) == (0.0, 0.0)
    assert min(balance.weight[1:]) > 0.0
    assert sum(balance.weight[1:]) / len(counts[1:]) == pytest.approx(1.0)
    by_count = sorted(range(1, len(counts)), key=lambda i: counts[i])
    for part in (balance.weight, balance.gamma):
        falling = [part[i] for i in by_count]
        assert falling == sorted(falling, reverse=True)


def test_the_weights_of_enet():
    # 1 / log(1.02 + eta): 50.5 for a class that hardly occurs, 1.42 for one that is everything.
    rare, common = 1 / math.log(1.02), 1 / math.log(2.02)
    balance = class_balance((0, 0, 5))
    assert balance.weight[1] / balance.weight[2] == pytest.approx(rare / common)
    assert (rare, common) == (pytest.approx(50.5, abs=0.01), pytest.approx(1.42, abs=0.01))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_sure_rows_have_finite_gradients(scale):
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * scale
    logits.requires_grad_()
    labels = logits.argmax(1)
    total = segmentation_loss(logits, labels, balance=class_balance(COUNTS)).total
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient.isfinite().all()


def test_half_precision_is_computed_in_single():
    logits, labels = torch.randn(40, 5).bfloat16(), torch.arange(40) % 5
    half = segmentation_loss(logits, labels, balance=class_balance(COUNTS)).total
    single = segmentation_loss(logits.float(), labels, balance=class_balance(COUNTS)).total
    assert half.dtype == torch.float32
    assert torch.equal(half, single)


@pytest.mark.parametrize("region", ["lovasz", "none"])
@pytest.mark.parametrize("voxel", ["ace", "cross-entropy", "focal", "none"])
def test_terms_can_be_left_out(voxel, region):
    logits, labels = torch.randn(20, 5), torch.arange(20) % 5
    balance = class_balance(COUNTS) if voxel == "ace" else None
    if voxel == region == "none":
        with pytest.raises(ValueError, match="nothing to learn"):
            segmentation_loss(logits, labels, voxel=voxel, region=region)
        return
    loss = segmentation_loss(logits, labels, voxel=voxel, region=region, balance=balance)
    assert (float(loss.voxel) == 0.0) == (voxel == "none")
    assert (float(loss.region) == 0.0) == (region == "none")
    assert_near(loss.total, loss.voxel + loss.region, 1e-7)


@pytest.mark.bad_input
def test_bad_arguments_are_named():
    logits, labels = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="delta must be above 1"):
        class_balance((0, 1, 2), delta=0.5)
    with pytest.raises(ValueError, match="no class but 0 occurs"):
        class_balance((5, 0, 0))
    with pytest.raises(ValueError, match="must not be negative"):
        class_balance((5, -1, 2))
    with pytest.raises(ValueError, match="gamma and slope"):
        class_balance((5, 1, 2), slope=-1.0)
    with pytest.raises(ValueError, match="4 classes, the logits of 3"):
        ace_loss(logits, labels, class_balance((0, 1, 2, 3)))
    with pytest.raises(ValueError, match=r"rows must be .*\(4, 3\) and \(3,\)"):
        lovasz_softmax(logits, labels[:3])
    with pytest.raises(ValueError, match="got 'dice'"):
        segmentation_loss(logits, labels, voxel="dice")
    with pytest.raises(ValueError, match="balance belongs to voxel='ace'"):
        segmentation_loss(logits, labels, voxel="ace")
    with pytest.raises(ValueError, match="balance belongs to voxel='ace'"):
        segmentation_loss(logits, labels, voxel="focal", balance=class_balance((0, 1, 2)))
