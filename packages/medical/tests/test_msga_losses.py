"""The losses against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from heed_medical.msga import MsgaOutput, msga_loss


def output(
    *,
    logits: list[Tensor] | None = None,
    codes: list[Tensor] | None = None,
    features: list[Tensor] | None = None,
) -> MsgaOutput:
    logits = logits or [torch.zeros(2, 5, 4, 6)] * 8
    batch = logits[0].shape[0]
    codes = codes or [torch.zeros(batch, 3, 1, 2)] * 8
    features = features or [torch.zeros(batch, 3, 2, 4)] * 16
    return MsgaOutput(
        logits_first=tuple(logits[: len(logits) // 2]),
        logits_refined=tuple(logits[len(logits) // 2 :]),
        codes_first=tuple(codes[: len(codes) // 2]),
        codes_refined=tuple(codes[len(codes) // 2 :]),
        ae_inputs=tuple(features[: len(features) // 2]),
        ae_outputs=tuple(features[len(features) // 2 :]),
    )


def test_eight_uniform_guesses_cost_eight_logarithms() -> None:
    loss = msga_loss(output(), torch.randint(0, 5, (2, 4, 6)))
    assert loss.segmentation.item() == pytest.approx(8 * math.log(5), rel=1e-6)
    assert loss.total.item() == pytest.approx(8 * math.log(5), rel=1e-6)


def test_the_terms_and_their_weights() -> None:
    codes = [torch.zeros(1, 2, 2, 2)] * 4 + [
        torch.full((1, 2, 2, 2), c) for c in (1.0, 2.0, 3.0, 4.0)
    ]
    features = [torch.zeros(1, 2, 2, 2)] * 8 + [torch.full((1, 2, 2, 2), 0.5)] * 8
    zeros = [torch.zeros(1, 2, 2, 2)] * 8
    loss = msga_loss(
        output(logits=zeros, codes=codes, features=features), torch.zeros(1, 2, 2).long()
    )
    assert loss.guide.item() == 1 + 4 + 9 + 16
    assert loss.reconstruction.item() == 8 * 0.25
    expected = 8 * math.log(2) + 0.25 * 30 + 0.1 * 2
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    other = msga_loss(
        output(logits=zeros, codes=codes, features=features),
        torch.zeros(1, 2, 2).long(),
        guide_weight=1.0,
        reconstruction_weight=0.0,
    )
    assert other.total.item() == pytest.approx(8 * math.log(2) + 30, rel=1e-6)


def test_each_term_is_a_mean_over_pixels() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(8)]
    labels = torch.randint(0, 3, (2, 4, 5))
    expected = 0.0
    for maps in logits:
        for b in range(2):
            for y in range(4):
                for x in range(5):
                    scores = [math.exp(v) for v in maps[b, :, y, x].tolist()]
                    expected -= math.log(scores[labels[b, y, x]] / sum(scores)) / 40
    assert msga_loss(output(logits=logits), labels).segmentation.item() == pytest.approx(expected)


def test_ignored_pixels_count_for_nothing() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, 4, 5).requires_grad_() for _ in range(8)]
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[:, :, 3:] = 255
    loss = msga_loss(output(logits=logits), labels, ignore_index=255).segmentation
    kept = [maps[..., :3] for maps in logits]
    torch.testing.assert_close(loss, msga_loss(output(logits=kept), labels[..., :3]).segmentation)
    loss.backward()
    for maps in logits:
        assert maps.grad is not None
        assert maps.grad[..., 3:].count_nonzero() == 0
        assert maps.grad[..., :3].count_nonzero() > 0


def test_a_batch_without_any_counted_pixel_costs_nothing() -> None:
    logits = [torch.randn(1, 3, 2, 2).requires_grad_() for _ in range(8)]
    loss = msga_loss(output(logits=logits), torch.full((1, 2, 2), -100)).segmentation
    loss.backward()
    assert loss.item() == 0
    assert logits[0].grad is not None
    assert logits[0].grad.count_nonzero() == 0


def test_both_sides_of_the_squared_errors_are_pulled() -> None:
    codes = [torch.randn(1, 2, 2, 2).requires_grad_() for _ in range(8)]
    features = [torch.randn(1, 2, 2, 2).requires_grad_() for _ in range(16)]
    result = output(logits=[torch.zeros(1, 2, 2, 2)] * 8, codes=codes, features=features)
    msga_loss(result, torch.zeros(1, 2, 2).long()).total.backward()
    for left, right in [
        *zip(codes[:4], codes[4:], strict=True),
        *zip(features[:8], features[8:], strict=True),
    ]:
        assert left.grad is not None
        assert right.grad is not None
        torch.testing.assert_close(left.grad, -right.grad)
        assert left.grad.count_nonzero() > 0


def test_without_an_autoencoder_only_the_segmentation_is_left() -> None:
    bare = MsgaOutput(
        logits_first=(torch.zeros(1, 2, 2, 2),),
        logits_refined=(torch.zeros(1, 2, 2, 2),),
        codes_first=(),
        codes_refined=(),
        ae_inputs=(),
        ae_outputs=(),
    )
    loss = msga_loss(bare, torch.zeros(1, 2, 2, dtype=torch.uint8))
    assert loss.guide == loss.reconstruction == 0
    assert loss.total.item() == pytest.approx(2 * math.log(2))


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (2, 4, 5), (1, 4, 6)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"labels must be .*\(2, 4, 6\)"):
        msga_loss(output(), torch.zeros(shape).long())


@pytest.mark.bad_input
def test_labels_that_are_no_whole_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="class ids"):
        msga_loss(output(), torch.zeros(2, 4, 6))
