"""The claims of the OAT paper about its network, and how scanpaths come from it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heed_gaze.oat.crops import CropEncoder, pyramid_pool
from heed_gaze.oat.decoding import decode_beam, decode_greedy, decode_samples, permitted
from heed_gaze.oat.losses import scanpath_loss
from heed_gaze.oat.network import Memory, Oat, OatConfig, Scenes
from heed_gaze.oat.places import GridPlaces
from heed_gaze.oat.shelves import reading_order

TINY = OatConfig(dim=96, hidden=24, encoder_depth=1, decoder_depth=2, crop=(29, 29), dropout=0.1)


def tiny(**changes: object) -> Oat:
    torch.manual_seed(3)
    settings = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__} | changes
    model = Oat(OatConfig(**settings))
    with torch.no_grad():  # all terms at work, biases too
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def scene(rows: int = 2, columns: int = 4, batch: int = 2) -> tuple[Tensor, Tensor]:
    count = rows * columns
    cells = torch.from_numpy(reading_order(rows, columns, count)).expand(batch, -1, -1)
    return torch.rand(batch, count, 3, 29, 29), cells.contiguous()


@pytest.fixture
def trial() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (*scene(), torch.tensor([5, 2]), torch.tensor([[3, 3, 1, 5], [0, 6, 2, 4]]))


def test_live_parameters_are_those_of_the_paper_for_shelves_of_any_size():
    with torch.device("meta"):
        parts = Oat(OatConfig())  # of 22, 27 and 84 objects alike: nothing depends on their number
    assert sum(p.numel() for p in parts.parameters()) == 18_255_843
    for count, size in ((374_752, parts.crop_encoder), (6_311_936, parts.encoder)):
        assert sum(p.numel() for p in size.parameters()) == count
    assert sum(p.numel() for p in parts.decoder.parameters()) == 10_518_528


@pytest.mark.parametrize(("spp", "total"), [(2, 17_929_187), (3, 18_060_259), (4, 18_584_547)])
def test_pyramids_have_the_official_totals(spp: int, total: int):
    dead = 4 * 256  # a linear layer of 3 -> 256 that the official module carries along
    with torch.device("meta"):
        model = Oat(OatConfig(spp=spp))
    assert sum(p.numel() for p in model.parameters()) == total - dead


def test_the_same_weights_serve_22_27_and_84_objects():
    model = tiny()
    for rows, columns in ((2, 11), (3, 9), (6, 14)):
        crops, cells = scene(rows, columns, batch=1)
        logits = model(crops, cells, torch.tensor([7]), torch.tensor([[1, 2]]))
        assert logits.shape == (1, 3, rows * columns + 2)


def test_the_paper_sizes_of_the_crop_encoder():
    encoder = CropEncoder(256)
    sizes = []
    for layer in (encoder.conv1, encoder.conv2, encoder.project):
        layer.register_forward_hook(
            lambda _m, inputs, out: sizes.append((inputs[0].shape[1:], out.shape[1:]))
        )
    encoder(torch.rand(1, 3, 150, 93))
    assert sizes[0] == ((3, 150, 93), (16, 146, 89))
    assert sizes[1] == ((16, 29, 17), (32, 27, 15))
    assert sizes[2] == ((1440,), (256,))


def test_a_pyramid_takes_the_maximum_of_each_cell():
    x = torch.arange(30.0).view(1, 1, 5, 6)
    one, four = pyramid_pool(x, 2).split([1, 4], dim=1)
    assert one.item() == 29
    # 2 x 2 cells of 3 x 3 places; the row of padding stands below.
    assert four.tolist() == [[14, 17, 26, 29]]


def test_crops_of_other_sizes_need_a_pyramid(trial):
    encoder = CropEncoder(8, spp=3)
    assert encoder(torch.rand(1, 3, 60, 33)).shape == encoder(torch.rand(1, 3, 41, 77)).shape
    with pytest.raises(ValueError, match=r"crops must be \(29, 29\)"):
        tiny()(torch.rand(1, 8, 3, 30, 29), trial[1][:1], trial[2][:1], trial[3][:1])


def test_permuting_objects_permutes_their_logits_and_leaves_stop(trial):
    crops, cells, target, path = trial
    model = tiny()
    order = torch.randperm(8)
    place = order.argsort()  # where each object went
    shape = torch.tensor([[2, 4]] * 2)
    plain = model(crops, cells, target, path, shape)
    moved = model(crops[:, order], cells[:, order], place[target], place[path], shape)
    torch.testing.assert_close(moved[..., :8], plain[..., :8][..., order], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[..., 8:], plain[..., 8:], atol=1e-5, rtol=0)


def test_the_past_does_not_see_the_future(trial):
    crops, cells, target, path = trial
    model = tiny()
    changed = path.clone()
    changed[:, 2:] = torch.tensor([[7, 0], [1, 1]])
    before, after = (model(crops, cells, target, p) for p in (path, changed))
    torch.testing.assert_close(before[:, :3], after[:, :3], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_absent_objects_change_nothing_and_cannot_be_chosen(trial):
    crops, cells, target, path = trial
    for model in (tiny(), tiny(choice="linear", objects=10)):
        wider = F.pad(crops, (0, 0) * 3 + (0, 2), value=7.0)
        more = F.pad(cells, (0, 0, 0, 2))
        present = torch.tensor([[True] * 8 + [False] * 2] * 2)
        shape = torch.tensor([[2, 4]] * 2)
        logits = model(wider, more, target, path, shape, present)
        assert logits[..., 8:10].isneginf().all()
        if model.classify is None:
            plain = model(crops, cells, target, path, shape)
            kept = torch.cat([logits[..., :8], logits[..., 10:]], dim=-1)
            torch.testing.assert_close(kept, plain, atol=1e-5, rtol=0)


def test_layouts_of_different_sizes_in_one_batch_score_as_alone():
    torch.manual_seed(1)
    model = tiny(spp=2)
    few, many = torch.rand(4, 3, 40, 30), torch.rand(6, 3, 29, 35)
    cells = torch.zeros(2, 6, 2, dtype=torch.long)
    cells[0, :4] = torch.from_numpy(reading_order(2, 2, 4))
    cells[1] = torch.from_numpy(reading_order(2, 3, 6))
    shape = torch.tensor([[2, 2], [2, 3]])
    present = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    scenes = Scenes(crops=(few, many), cells=cells, shape=shape, present=present)
    target, path = torch.tensor([3, 3]), torch.tensor([[0, 3], [5, 3]])
    both = model.score(scenes, torch.arange(2), target, path)
    first = model(few[None], cells[:1, :4], target[:1], path[:1], shape[:1])
    second = model(many[None], cells[1:], target[1:], path[1:], shape[1:])
    torch.testing.assert_close(both[:1, :, [0, 1, 2, 3, 6]], first[..., :5], atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)


def test_a_searcher_who_is_not_told_the_place_does_not_know_it(trial):
    crops, cells, _, path = trial
    same = crops.clone()
    same[:, 6] = same[:, 1]  # the target's crop stands at two places
    asked = [torch.tensor([k, k]) for k in (1, 6)]
    for target_pos, told in (("true", True), ("none", False)):
        model = tiny(target_pos=target_pos)
        # Before anything was fixated only the encoder's token of the target can differ.
        first = [model(same, cells, target, path)[:, 0] for target in asked]
        assert torch.allclose(first[0], first[1], atol=1e-5) != told


def test_free_viewing_has_no_target(trial):
    crops, cells, _, path = trial
    nothing = torch.tensor([-1, -1])
    logits = tiny()(crops, cells, nothing, path)
    assert logits.isfinite().all()
    torch.testing.assert_close(
        logits[:1], tiny()(crops[:1], cells[:1], nothing[:1], path[:1]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("code", ["gaussian", "sinusoid", "fourier"])
def test_codes_of_places(code: str, trial):
    places = GridPlaces(32, code=code, rows=8)
    near, far, unknown = places(torch.tensor([[2, 3, 0], [2, 4, 0], [-1, -1, 0]])).detach()
    assert F.cosine_similarity(near, far, 0) > F.cosine_similarity(near, unknown, 0)
    assert tiny(places=code)(*trial).isfinite().all()


def test_gradients_reach_all_parameters_and_not_the_table(trial):
    crops, cells, target, path = trial
    model = tiny().train()
    loss = scanpath_loss(model(crops, cells, target, path), F.pad(path, (0, 1), value=8))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A shift of all logits changes no probability.
        assert bool(parameter.grad.abs().sum() > 0) == (name != "pointer.mix.bias") or (
            parameter.grad.abs().max() < 1e-6
        ), name
    assert not any(name.startswith("places") for name, _ in model.named_parameters())


def test_the_loss_is_the_mean_over_tokens_and_the_sum_over_groups():
    logits = torch.randn(3, 3, 6)
    wanted = torch.tensor([[0, 4, 5], [1, 2, 4], [4, 5, 5]])
    logp = logits.log_softmax(-1)
    first = -(logp[0, 0, 0] + logp[0, 1, 4] + logp[2, 0, 4]) / 3
    second = -(logp[1, 0, 1] + logp[1, 1, 2] + logp[1, 2, 4]) / 3
    group = torch.tensor([0, 1, 0])
    torch.testing.assert_close(scanpath_loss(logits, wanted, group), first + second)
    torch.testing.assert_close(scanpath_loss(logits, wanted), (3 * first + 3 * second) / 6)


def memory(model: Oat, batch: int = 2) -> Memory:
    torch.manual_seed(5)
    crops, cells = scene(batch=batch)
    shape = torch.tensor([[2, 4]] * batch)
    present = torch.ones(batch, 8, dtype=torch.bool)
    scenes = Scenes(crops=tuple(crops), cells=cells, shape=shape, present=present)
    with torch.no_grad():
        return model.read(scenes, torch.arange(batch), torch.tensor([5, 2][:batch]))


def log_probability(model: Oat, one: Memory, objects: tuple[int, ...], stopped: bool) -> float:
    """By one teacher-forced pass, without a cache."""
    with torch.no_grad():
        logits = model.follow(one, torch.tensor([objects], dtype=torch.long))[0]
    total = 0.0
    for step, chosen in enumerate([*objects, *([8] * stopped)]):
        total += float(permitted(logits[step : step + 1], objects=8, first=step == 0)[0, chosen])
    return total


def test_decoded_paths_have_the_probability_that_the_network_gives_them():
    model = tiny()
    both = memory(model)
    drawn = decode_samples(model, both, max_len=6, samples=7, seed=1)
    beams = decode_beam(model, both, max_len=6, width=3)
    greedy = [[path] for path in decode_greedy(model, both, max_len=6)]
    for number in range(2):
        one = both.rows(torch.tensor([number]))
        for path in drawn[number] + beams[number] + greedy[number]:
            assert 1 <= len(path.objects) <= 6
            assert all(0 <= k < 8 for k in path.objects)
            assert path.stopped or len(path.objects) == 6
            wanted = log_probability(model, one, path.objects, path.stopped)
            assert path.log_probability == pytest.approx(wanted, abs=1e-4)
    assert len({path.objects for path in drawn[0]}) > 1
    assert decode_samples(model, both, max_len=6, samples=7, seed=1) == drawn


def test_samples_follow_the_distribution_of_the_network():
    model = tiny()
    one = memory(model, batch=1)
    drawn = decode_samples(model, one, max_len=1, samples=20_000)[0]
    counts = np.bincount([path.objects[0] for path in drawn], minlength=8) / 20_000
    with torch.no_grad():
        logits = model.follow(one, torch.zeros(1, 0, dtype=torch.long))[0]
    wanted = permitted(logits, objects=8, first=True).exp()[0, :8].numpy()
    assert np.abs(counts - wanted).max() < 5 * np.sqrt(0.25 / 20_000)


def test_a_wide_beam_finds_the_best_of_all_paths():
    model = tiny()
    one = memory(model, batch=1)
    best = decode_beam(model, one, max_len=2, width=72)[0]
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    with torch.no_grad():
        logits = model.follow(one.rows(torch.zeros(64, dtype=torch.long)), pairs)
    first = permitted(logits[:, 0], objects=8, first=True).gather(1, pairs[:, :1])[:, 0]
    second = permitted(logits[:, 1], objects=8, first=False)
    both = first + second.gather(1, pairs[:, 1:])[:, 0]
    stopped = (first + second[:, 8])[::8]
    chances = {tuple(pair): float(p) for pair, p in zip(pairs.tolist(), both, strict=True)}
    chances |= {(k,): float(p) for k, p in enumerate(stopped)}
    assert best[0].objects == max(chances, key=chances.__getitem__)
    assert [path.log_probability for path in best] == pytest.approx(
        sorted(chances.values(), reverse=True), abs=1e-4
    )
    assert len(best) == 72


def test_many_samples_cost_one_pass_of_the_decoder_per_step():
    model = tiny()
    one = memory(model, batch=1)
    calls = []
    model.decoder.register_forward_hook(lambda _m, inputs, _o: calls.append(inputs[0].shape[:2]))
    decode_samples(model, one, max_len=6, samples=50)
    assert len(calls) <= 6
    assert calls[0] == (1, 1)
    assert calls[1] == (50, 1)
    assert [rows for rows, _ in calls[1:]] == sorted((rows for rows, _ in calls[1:]), reverse=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim": 30, "heads": 4}, "dim must be even"),
        ({"choice": "linear"}, "needs it"),
        ({"crop": (20, 20)}, "at least 29 x 29"),
        ({"table_rows": 1}, "table_rows"),
    ],
)
def test_configurations_that_cannot_be(changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        OatConfig(**changes)
