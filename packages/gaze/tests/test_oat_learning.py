"""What OAT learns: twenty trials by heart, and a rule from few shelves (slow)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from heed_gaze.metrics.behaviour import behaviours, delta
from heed_gaze.metrics.sequences import sequence_score
from heed_gaze.oat.baselines import learn_reference, markov_paths
from heed_gaze.oat.decoding import decode_greedy
from heed_gaze.oat.losses import scanpath_loss
from heed_gaze.oat.network import Oat, OatConfig
from heed_gaze.oat.pictures import CropOptions, CropStore, Sample, TrialBatch, make_batch
from heed_gaze.oat.sample import SampleOptions, write_sample
from heed_gaze.oat.shelves import Shelves, Trial

CONFIG = OatConfig(
    dim=96, hidden=192, encoder_depth=2, decoder_depth=2, crop=(45, 30), table_rows=9
)
CENTRE_ROW = SampleOptions(
    rows=3, columns=9, layouts=32, targets=9, viewers=1, strategies=("centre-row",), noise=False,
    cell_px=(60, 40),
)  # fmt: skip


def batch_of(trials: list[Trial], shelves: Shelves, store: CropStore) -> TrialBatch:
    layouts = [shelves.layout_of(trial) for trial in trials]
    return make_batch(
        [Sample(layout, store.crops(layout), t) for layout, t in zip(layouts, trials, strict=True)]
    )


def loss_of(model: Oat, batch: TrialBatch) -> Tensor:
    logits = model.score(batch.scenes, batch.scene, batch.target, batch.scanpath)
    return scanpath_loss(logits, batch.wanted)


def learn(model: Oat, batches: list[TrialBatch]) -> None:
    """One step of Adam for each batch."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in batches:
        optimiser.zero_grad()
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


@pytest.mark.slow
def test_twenty_trials_are_learned_by_heart(tmp_path: Path):
    """Paths of viewers who are guided by colour and look again follow no rule that is known."""
    options = SampleOptions(layouts=4, targets=5, viewers=1, strategies=("guided",))
    shelves = write_sample(tmp_path, options, seed=2)
    assert len(shelves.trials) == 20
    store = CropStore(CropOptions(size=CONFIG.crop))
    batch = batch_of(list(shelves.trials), shelves, store)
    torch.manual_seed(0)
    model = Oat(CONFIG)
    learn(model, [batch] * 450)
    model.eval()
    with torch.no_grad():
        assert float(loss_of(model, batch)) < 0.05
        decoded = decode_greedy(
            model, model.read(batch.scenes, batch.scene, batch.target), max_len=20
        )
    wrong = [
        trial.name
        for path, trial in zip(decoded, shelves.trials, strict=True)
        if path.objects != tuple(trial.objects.tolist())
    ]
    assert len(wrong) <= 2, wrong


@pytest.mark.slow
@pytest.mark.parametrize("target_pos", ["true", "none"])
def test_a_searcher_who_reads_from_the_centre_row_is_learned(tmp_path: Path, target_pos: str):
    """On shelves and targets that training did not show; a Markov chain cannot see the target.

    With the target's place hidden from the encoder the decoder still knows which of the fixated
    objects is the target, and that is enough to stop.
    """
    shelves = write_sample(tmp_path, CENTRE_ROW, seed=0)
    store = CropStore(CropOptions(size=CONFIG.crop))
    train = [trial for trial in shelves.trials if trial.split == "train"]
    test = [trial for trial in shelves.trials if trial.split != "train"]
    torch.manual_seed(0)
    model = Oat(replace(CONFIG, target_pos=target_pos))
    order = torch.cat([torch.randperm(len(train)) for _ in range(12)])
    learn(
        model,
        [batch_of([train[i] for i in part.tolist()], shelves, store) for part in order.split(16)],
    )
    batch = batch_of(test, shelves, store)
    model.eval()
    with torch.no_grad():
        memory = model.read(batch.scenes, batch.scene, batch.target)
    humans, targets = [trial.objects for trial in test], [trial.target for trial in test]
    human = behaviours(humans, targets).mean(axis=0)

    def scores(paths: list[np.ndarray]) -> tuple[float, float]:
        alike = float(sequence_score(paths, humans).mean())
        return alike, delta(behaviours(paths, targets).mean(axis=0), human)[0]

    decoded = decode_greedy(model, memory, max_len=27)
    ss, difference = scores([np.array(path.objects) for path in decoded])
    chain = learn_reference(train, shelves.layouts).chain(shelves.layout_of(test[0]))
    assert chain is not None
    drawn = markov_paths(chain, samples=len(test), max_len=27, rng=np.random.default_rng(0))
    markov_ss, markov_difference = scores(drawn)
    assert ss > 0.9
    assert difference < 0.1
    assert markov_ss < ss - 0.1
    assert markov_difference > difference
