"""Which samples share a batch, and how long a training waits for them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heed_runtime import callbacks, data
from heed_runtime.draws import Draws, global_batch, most_batches
from heed_runtime.errors import UsageError
from heed_runtime.testing import APP
from heed_runtime.testing.contract import call
from heed_runtime.testing.tokens import Samples, TokenModule

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def draws(size, *, rank=0, world=1, **options):
    return Draws(size, rank=rank, world=world, **({"batch": 4, "seed": 0} | options))


def items(one, epoch=0):
    one.set_epoch(epoch)
    return [draw.item for draw in one]


def dealt(counts, batch):
    """How many batches there are when each takes one of the largest heaps that are left."""
    heaps, found = sorted(counts, reverse=True), 0
    while sum(heap > 0 for heap in heaps) >= batch:
        heaps = sorted([heap - (n < batch) for n, heap in enumerate(heaps)], reverse=True)
        found += 1
    return found


@given(COUNTS, st.integers(1, 6))
def test_as_many_batches_as_dealing_from_the_largest_heaps(counts, batch):
    assert most_batches(np.array(counts), batch) == dealt(counts, batch)


@given(COUNTS, st.integers(1, 6), st.integers(0, 50))
def test_no_batch_holds_a_name_twice(counts, batch, epoch):
    names = [f"p{number}" for number, count in enumerate(counts) for _ in range(count)]
    if len(counts) < batch:
        with pytest.raises(ValueError, match="names for a batch"):
            draws(len(names), batch=batch, apart=names)
        return
    found = np.array(items(draws(len(names), batch=batch, apart=names), epoch))
    assert len(found) == most_batches(np.array(counts), batch) * batch
    assert len(set(found)) == len(found)
    for step in found.reshape(-1, batch):
        assert len({names[item] for item in step}) == batch


def test_every_sample_has_its_turn_and_epochs_differ():
    names = ["a"] * 7 + ["b", "c", "d", "e", "f"]
    one = draws(12, batch=2, apart=names)
    assert one.steps == 5  # a is in each, with one of five others
    orders = [items(one, epoch) for epoch in range(12)]
    assert len({tuple(order) for order in orders}) == 12
    assert set(range(12)) == {item for order in orders for item in order}
    assert items(draws(12, batch=2, apart=names), 3) == orders[3]


def test_processes_share_a_batch_and_a_later_start_goes_on():
    names = [str(number // 3) for number in range(30)]
    whole = np.array(items(draws(30, apart=names))).reshape(-1, 4)
    parts = [
        np.array(items(draws(30, apart=names, rank=r, world=2))).reshape(-1, 2) for r in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    late = draws(30, apart=names)
    late.first_step = 2
    assert items(late) == whole[2:].ravel().tolist()


def test_names_that_are_all_different_change_nothing():
    assert items(draws(9, apart=list("abcdefghi"))) == items(draws(9))
    with pytest.raises(ValueError, match="a name for each of 9"):
        draws(9, apart=["a"])


def test_a_batch_is_as_large_as_there_are_groups(caplog):
    assert global_batch(5, batch=8, world=2, what="groups") == 4
    assert "has 5 groups, fewer than batch=8: the batch is 4" in caplog.text
    with pytest.raises(UsageError, match="multiple of the 2"):
        global_batch(5, batch=3, world=2)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "tokens"
    call(APP, "sample", "tokens", root)
    return root


def test_a_data_set_says_which_samples_never_meet(tokens, tmp_path, monkeypatch):
    """The training files are of two kinds, by turns: a batch has one of each."""
    seen = []
    monkeypatch.setattr(Samples, "apart", [str(n % 2) for n in range(24)], raising=False)
    read = Samples.__getitem__
    monkeypatch.setattr(Samples, "__getitem__", lambda self, n: seen.append(n) or read(self, n))
    words = ("--data", tokens, "--out", tmp_path / "run", "--trainer.max-epochs", 1)
    assert call(APP, "train", "tokens", *words)["steps"] == 12
    assert sorted(seen) == list(range(24))
    assert all(sum(pair) % 2 for pair in np.array(seen).reshape(-1, 2))


def test_training_tells_how_long_it_waited_for_data(tokens, tmp_path, monkeypatch, capsys):
    """Reading takes 1 s a sample, a step of 4 samples 12 s; validation does not count."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def slowed(method, seconds):
        def slow(*arguments, **named):
            clock.now += seconds
            return method(*arguments, **named)

        return slow

    for module in (data, callbacks):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Samples, "__getitem__", slowed(Samples.__getitem__, 1.0))
    for name, seconds in (("training_step", 12.0), ("validation_step", 1000.0)):
        monkeypatch.setattr(TokenModule, name, slowed(getattr(TokenModule, name), seconds))
    run = tmp_path / "run"
    words = ("--data", tokens, "--trainer.max-epochs", "2", "--trainer.batch", "4")
    code = APP.call(["train", "tokens", "--out", str(run), *map(str, words), "--json"])
    assert code == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["training_s"] == 2 * 6 * (4 + 12)
    assert json.loads(out)["waiting_for_data"] == 0.25
    assert "192.0 s of training, 25.0 % of them waiting for data; more --workers may help" in err
    assert json.loads((run / "metrics.json").read_text())["waiting_for_data"] == 0.25
    assert call(APP, "train", "tokens", "--resume", run)["waiting_for_data"] is None
