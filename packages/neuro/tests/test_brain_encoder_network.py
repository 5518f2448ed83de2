"""The encoder: parameter counts, isolation of regions, symmetries, equality with simpler forms."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from heed_core import observe, steer
from heed_core.attention.query_readout import factorised_pool
from heed_neuro.brain_encoder.network import (
    PAPER_GROUPS,
    BrainEncoder,
    BrainEncoderConfig,
    Group,
    RegionReadout,
    count_live,
    encoding_loss,
)
from heed_neuro.brain_encoder.regions import Regions, places, reported, whole, with_rest

VERTICES = 19004 + 20544
READOUT = 768 * VERTICES + VERTICES
DECODER = 4 * (768 * 768 + 768) + 2 * 768 * 1024 + 768 + 1024 + 3 * 2 * 768


def masks(overlapping: bool) -> tuple[Regions, Regions]:
    rng = np.random.default_rng(1)
    left = {"A": rng.random(11) < 0.4, "B": rng.random(11) < 0.5}
    right = {"A": rng.random(9) < 0.4, "B": rng.random(9) < 0.5}
    if not overlapping:
        left["B"] &= ~left["A"]
        right["B"] &= ~right["A"]
    return with_rest(left, 11), with_rest(right, 9)


def small(overlapping: bool = True, **settings) -> tuple[BrainEncoder, tuple[Regions, Regions]]:
    torch.manual_seed(0)
    regions = masks(overlapping)
    groups = tuple(Group.of(name, r) for name, r in zip(("lh", "rh"), regions, strict=True))
    sizes = {"channels": 16, "dim": 16, "heads": 2, "ffn": 24, "grid": (3, 5)}
    model = BrainEncoder(BrainEncoderConfig(groups=groups, **(sizes | settings)))
    model.settle(regions)
    for own in model.parameters():
        nn.init.normal_(own, std=0.4)
    return model.double().eval(), regions


def features(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 5, 16, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, 50 * 768 + DECODER + READOUT),
        ({"readout": "voxels"}, VERTICES * 768 + DECODER + READOUT),
        ({"kind": "factorised"}, 50 * 961 + READOUT),
        ({"kind": "factorised", "readout": "voxels"}, VERTICES * 961 + READOUT),
        ({"kind": "pooled"}, READOUT),
        (
            {"kind": "conv"},
            768 * 256 * 9 + 256 + 256 * 11 * 11 * VERTICES + VERTICES,
        ),
        ({"channels": 2048, "grid": (14, 14)}, 2048 * 768 + 768 + 50 * 768 + DECODER + READOUT),
    ],
)
def test_parameters_of_the_published_sizes(settings, wanted: int):
    assert count_live(BrainEncoderConfig(**settings)) == wanted


def test_published_totals():
    dead = {"convolution": 49_216, "self-attention": 2_362_368, "norm": 1_536}
    assert count_live(BrainEncoderConfig()) == 34_392_444 == 36_805_564 - sum(dead.values())
    voxels = count_live(BrainEncoderConfig(readout="voxels"))
    assert voxels == 67_140_028 - sum(dead.values())
    fixed = BrainEncoderConfig(kind="factorised")
    assert count_live(fixed) == 30_460_462
    assert count_live(BrainEncoderConfig(kind="factorised", readout="voxels")) == 68_418_040
    assert count_live(BrainEncoderConfig(kind="conv")) == 1_226_848_124
    assert sum(len(group.regions) for group in PAPER_GROUPS) == 50


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("overlap", ["mean", "sum"])
def test_a_response_is_the_masked_sum_of_its_regions(overlapping: bool, overlap: str):
    model, regions = small(overlapping, overlap=overlap)
    x = features().requires_grad_()
    found = model(x)
    tokens = model.region_tokens(x).split([3, 3], dim=1)
    parameters = list(model.parameters())
    wanted = []
    for own, readout, mine in zip(regions, model.readouts, tokens, strict=True):
        mask = torch.from_numpy(own.members).double()
        if overlap == "mean":
            mask = mask / mask.sum(0)
        everything = readout.linear(mine)  # (b, r, v): what the grouped read-out never holds
        wanted.append((mask * everything).sum(1))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(
            sum(y.sin().sum() for y in outputs), [x, *parameters], allow_unused=True
        )
        for outputs in (found, wanted)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_disjoint_regions_cost_one_product_per_vertex():
    readout = RegionReadout(
        Group(name="lh", vertices=9, regions=("a", "b"), sizes=(4, 5)), 8, "mean"
    )
    shapes: list[tuple[int, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is nn.functional.linear:
                shapes.append(tuple(result.shape))
            return result

    with Watch():
        readout(torch.randn(3, 2, 8))
    assert shapes == [(3, 4), (3, 5)]


def test_only_its_own_regions_speak_for_a_vertex():
    model, regions = small()
    found = model(features())
    for group, (own, output) in enumerate(zip(regions, found, strict=True)):
        for vertex in range(own.vertices):
            (gradient,) = torch.autograd.grad(
                output[:, vertex].sum(), model.decoder.codes, retain_graph=True
            )
            speaks = gradient.abs().sum(1) > 0
            expected = np.zeros(6, dtype=bool)
            expected[3 * group : 3 * group + 3] = own.members[:, vertex]
            assert speaks.tolist() == expected.tolist()


def test_the_order_of_the_tokens_is_told_by_their_codes_alone():
    model, _ = small()
    x, order = features(), torch.randperm(15, generator=torch.Generator().manual_seed(1))
    codes = model._positions(x, None).flatten(0, 1)
    tokens = x.flatten(1, 2)
    plain = model.decoder(tokens, positions=codes)
    together = model.decoder(tokens[:, order], positions=codes[order])
    torch.testing.assert_close(plain, together, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(plain, model.decoder(tokens[:, order], positions=codes))


def test_with_constant_scores_it_is_the_factorised_encoder():
    model, regions = small(heads=1)
    logits = torch.randn(6, 15).double()
    fixed = BrainEncoder(
        BrainEncoderConfig(kind="factorised", channels=16, grid=(3, 5), groups=model.config.groups)
    ).double()
    fixed.settle(regions)
    fixed.maps.logits.data = logits
    # The same linear read-out, of the values that the attention's output layer gives; what follows
    # the attention (feed-forward, norms) is put aside.
    attention = model.decoder.attention
    for own, other in zip(fixed.readouts, model.readouts, strict=True):
        weight = other.linear.weight @ attention.out.weight @ attention.value.weight
        shift = attention.out.weight @ attention.value.bias + attention.out.bias
        own.linear.weight.data = weight
        own.linear.bias.data = other.linear.bias + other.linear.weight @ shift
    model.decoder.feed = nn.Module()
    model.decoder.feed.forward = torch.zeros_like
    model.decoder.final_norm = nn.Identity()

    def constant(scores: torch.Tensor, call) -> torch.Tensor:
        return logits.expand_as(scores)

    with steer(model, constant, at="scores"):
        found = model(features())
    for ours, theirs in zip(found, fixed(features()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["transformer", "factorised"])
def test_maps_sum_to_one(kind: str):
    model, _ = small(kind=kind)
    with observe(model) as record:
        model(features())
    (weights,) = (record[name] for name in record)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_pooled_and_saliency_agree_for_even_saliency():
    model, _ = small(kind="pooled")
    other, _ = small(kind="saliency")
    other.load_state_dict(model.state_dict())
    even = torch.full((2, 3, 5), 0.2).double()
    for ours, theirs in zip(model(features()), other(features(), even), strict=True):
        torch.testing.assert_close(ours, theirs)
    peaked = torch.zeros(2, 3, 5).double()
    peaked[:, 1, 2] = 7.0
    pooled = other.region_tokens(features(), peaked)
    torch.testing.assert_close(pooled[:, 0], features()[:, 1, 2])


def test_values_with_the_position_code_are_another_model():
    plain, _ = small()
    other, _ = small(value_pos=True)
    other.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(features())[0], other(features())[0])


def test_a_query_per_vertex_reads_the_diagonal():
    model, _ = small(readout="voxels")
    tokens = model.region_tokens(features())
    left = model.readouts[0].linear(tokens[:, :11])  # (b, v, v)
    torch.testing.assert_close(model(features())[0], left.diagonal(dim1=1, dim2=2))


def test_every_parameter_but_the_weight_on_zero_gets_a_gradient():
    for kind in ("transformer", "factorised", "pooled", "conv"):
        model, _ = small(kind=kind)
        loss = encoding_loss(
            model(features()), [torch.zeros(2, 11).double(), torch.ones(2, 9).double()]
        )
        loss.backward()
        silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        # A bias of keys moves all scores of a row alike; the norm of zero is its shift.
        assert silent <= {"decoder.query_norm.weight", "decoder.attention.key.bias"}, kind


def test_the_loss_is_a_mean_per_hemisphere_and_skips_gaps():
    predicted = [torch.zeros(2, 4), torch.zeros(2, 2)]
    measured = [torch.full((2, 4), 2.0), torch.full((2, 2), 3.0)]
    assert encoding_loss(predicted, measured).item() == pytest.approx(4 + 9)
    measured[0][0, 0] = torch.nan
    assert encoding_loss(predicted, measured).item() == pytest.approx(4 + 9)


def test_a_network_with_its_masks_is_rebuilt_from_its_state():
    model, _ = small()
    again = BrainEncoder(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(features()), model(features()), rtol=0, atol=0)


def test_pairs_are_found_again():
    regions = with_rest({"a": np.array([1, 1, 0, 0], bool), "b": np.array([0, 1, 1, 0], bool)}, 4)
    vertex, place = places(regions)
    for column in range(4):
        own = [pair for pair in place[:, column] if pair < len(vertex)]
        assert [vertex[pair] for pair in own] == [column] * int(regions.members[:, column].sum())
    names = json.dumps(sorted(reported(regions, {"both": ("a", "b")})))
    assert names == '["a", "b", "cluster both", "rest"]'


@pytest.mark.bad_input
def test_wrong_sizes_are_refused():
    model, regions = small()
    with pytest.raises(ValueError, match="features must be"):
        model(features()[:, :2])
    with pytest.raises(ValueError, match="other sizes"):
        model.settle((whole(11), regions[1]))
    names, everywhere = ("all", "b", "c"), np.ones(4, dtype=bool)
    one, two = np.eye(4, dtype=bool)[:2]
    built, given = (
        Regions(names=names, members=np.stack([everywhere, one, c])) for c in (one, two)
    )
    readout = RegionReadout(Group.of("lh", built), 3, "mean")
    with pytest.raises(ValueError, match="overlap than those"):  # of equal sizes
        readout.settle(given)
    with pytest.raises(ValueError, match="needs the saliency"):
        small(kind="saliency")[0](features())
    with pytest.raises(ValueError, match="dim must be a multiple"):
        BrainEncoderConfig(dim=18, heads=3)
    with pytest.raises(ValueError, match="no effect"):
        BrainEncoderConfig(kind="pooled", readout="voxels")
    with pytest.raises(ValueError, match="every vertex"):
        Regions(names=("a",), members=np.zeros((1, 3), dtype=bool))
    assert factorised_pool(torch.ones(1, 3, 2), torch.ones(1, 3)).shape == (1, 1, 2)
