"""IVGN learns sixteen pictures by heart, and what it writes comes from the pictures."""

import pytest
import torch
from torch import Tensor

from heed_medical.ivgn import Ivgn, IvgnConfig, report_loss
from heed_medical.reports.metrics import bleu
from heed_medical.reports.words import Vocabulary

pytestmark = pytest.mark.slow

SENTENCES = (
    "there is a mass in the left upper lobe .",
    "the right upper lobe holds a small nodule .",
    "a large effusion lies at the left base .",
    "dense consolidation fills all of the right lower lobe .",
)
"""By the quarter of the picture that holds a bright square."""


def squares() -> tuple[Tensor, list[str]]:
    """Sixteen noisy pictures (16, 1, 3, 32, 32) and what is to be written of each."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.rand(16, 1, 1, 32, 32, generator=generator)
    for number, image in enumerate(images):
        row, column = divmod(number % 4, 2)
        top, left = torch.randint(1, 8, (2,), generator=generator).tolist()
        image[
            ..., 16 * row + top : 16 * row + top + 8, 16 * column + left : 16 * column + left + 8
        ] = 1
    return images.expand(-1, -1, 3, -1, -1), [SENTENCES[number % 4] for number in range(16)]


def test_sixteen_pictures_are_learnt_by_heart():
    images, reports = squares()
    vocabulary = Vocabulary.of(reports, threshold=1)
    numbers = [torch.tensor(vocabulary.encode(report, most=14)) for report in reports]
    tokens = torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True)
    lengths = torch.tensor([len(row) - 1 for row in numbers])
    torch.manual_seed(0)
    config = IvgnConfig(
        words=len(vocabulary), backbone="conv", dim=32, heads=4, hidden=32, depth=1,
        dropout=0.0, patch_dropout=0.0, patch_positions="sine",
    )  # fmt: skip
    model = Ivgn(config).train()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        adam.zero_grad()
        report_loss(model(images, tokens[:, :-1]), tokens[:, 1:], lengths).backward()
        adam.step()
    model.eval()

    def written(shown: Tensor) -> list[str]:
        rows = model.generate(shown, beam=1, most=14).tokens.tolist()
        return [vocabulary.decode(row) for row in rows]

    seen, blank = written(images), written(torch.zeros_like(images))
    references = [[report] for report in reports]
    assert bleu(references, seen).corpus[3] > 1 - 1e-9
    assert len(set(blank)) == 1
    assert bleu(references, blank).corpus[3] < 0.6
