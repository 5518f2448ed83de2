"""The network: published counts, wiring, sizes, ablations, sites."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from heed_core.sites import observe, sites, steer, use_impl
from heed_medical.msga import GuidedPyramid, Msga, MsgaConfig, MsgaOutput, msga_loss
from heed_medical.msga.network import AttentionBranch, SemanticAutoencoder, _mirror

SMALL = MsgaConfig(backbone="resnet18", width=8, classes=3)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small(**changes: object) -> Msga:
    return Msga(dataclasses.replace(SMALL, **changes))


def awake(model: Msga) -> Msga:
    """Let all terms show: the attention's scalars start at 0, a fresh network's logits are tiny.

    One batch settles the statistics of the normalisations, so that the logits are of order one.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.7)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(torch.rand(4, model.config.in_channels, 64, 64))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
        assert model.eval()(torch.rand(1, model.config.in_channels, 64, 64)).std() > 0.05
    return model


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def full() -> Msga:
    with torch.device("meta"):
        return Msga(MsgaConfig())


def test_parameters_of_every_module(full: Msga) -> None:
    assert count(full) == 103_556_063
    assert count(full.backbone) == 86_736_064
    pyramid = full.pyramid
    assert [count(pyramid.lateral[s]) for s in "1234"] == [16_577, 32_961, 65_729, 131_265]
    assert count(pyramid.fuse) == 188_995
    for step in (pyramid.first, pyramid.second):
        assert {count(step.position[s]) for s in "1234"} == {116_179}
        assert {count(step.channel[s]) for s in "1234"} == {110_979}
        assert {count(step.semantic[s]) for s in "1234"} == {73_792}
        assert {count(step.project[s]) for s in "1234"} == {4_160}
        assert step.autoencoder is not None
        assert count(step.autoencoder) == 6_970_496
    for heads in (pyramid.predict_first, pyramid.predict_refined):
        assert {count(heads[s]) for s in "1234"} == {325}


def test_a_class_costs_520_parameters(full: Msga) -> None:
    with torch.device("meta"):
        assert count(Msga(MsgaConfig(classes=6))) - count(full) == 520


def test_operations_at_128() -> None:
    with FakeTensorMode():
        model = Msga(MsgaConfig()).eval()
        use_impl(model, "reference")
        image = torch.zeros(1, 1, 128, 128)
        with torch.no_grad(), FlopCounterMode(display=False) as everything:
            model.outputs(image)
        with torch.no_grad(), FlopCounterMode(display=False) as prediction:
            model(image)
    assert everything.get_total_flops() == 2 * 25_298_731_008
    first_read_outs = 4 * (32 * 32) * 64 * 5
    assert prediction.get_total_flops() == 2 * (25_298_731_008 - first_read_outs)


def test_the_scratch_recipe_reaches_every_layer() -> None:
    model = small()
    normalisations = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
            spread = module.weight.std() * math.sqrt((fan_in + fan_out) / 2)
            if module.weight.numel() > 5000:
                assert spread.item() == pytest.approx(1, abs=0.05)
            if module.bias is not None:
                assert module.bias.count_nonzero() == 0
        elif isinstance(module, nn.BatchNorm2d):
            normalisations.append(module.weight)
            assert module.bias.count_nonzero() == 0
    scales = torch.cat(normalisations)
    assert scales.mean().item() == pytest.approx(1, abs=0.002)
    assert scales.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("size", [(64, 72), (72, 64), (50, 37), (12, 30), (250, 16), (3, 1)])
def test_logits_have_the_size_of_the_image(size: tuple[int, int]) -> None:
    model = small().eval()
    with torch.no_grad():
        assert model(torch.rand(2, 1, *size)).shape == (2, 3, *size)
        assert all(
            maps.shape[-2:] == size for maps in model.outputs(torch.rand(1, 1, *size)).logits_first
        )


@given(side=st.integers(8, 40), before=st.integers(0, 7), after=st.integers(0, 7))
def test_the_border_is_a_mirror(side: int, before: int, after: int) -> None:
    image = torch.arange(side * 3.0).reshape(1, 1, side, 3)
    wanted = F.pad(image, (0, 0, before, after), mode="reflect")
    torch.testing.assert_close(_mirror(image, -2, before, after), wanted, rtol=0, atol=0)


_TINY = Msga(MsgaConfig(backbone="resnet18", width=8, scales=(1,)))


@settings(max_examples=200)
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_margins_reach_the_next_multiple_of_eight_on_both_sides(height: int, width: int) -> None:
    margins = _TINY.margins(height, width)
    for side, (before, after) in zip((height, width), margins, strict=True):
        whole = side + before + after
        assert whole % 8 == 0
        assert whole == max(16, 8 * math.ceil(side / 8))
        assert 0 <= after - before <= 1


def test_an_odd_size_is_the_mirrored_image_cut_back() -> None:
    model = small().eval()
    image = torch.rand(1, 1, 43, 64)
    mirrored = F.pad(image, (0, 0, 2, 3), mode="reflect")
    with torch.no_grad():
        torch.testing.assert_close(model(image), model(mirrored)[:, :, 2:45], rtol=0, atol=0)


def test_a_sample_alone_equals_the_sample_in_a_batch() -> None:
    model = awake(small()).double().eval()
    images = torch.rand(3, 1, 40, 24, dtype=torch.float64)
    with torch.no_grad():
        together, again = model(images), model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.equal(together, again)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_attention_is_the_identity_at_the_start() -> None:
    pyramid = GuidedPyramid([8, 8, 8, 8], width=8)
    x = torch.randn(2, 8, 5, 7)
    branches = [module for module in pyramid.modules() if isinstance(module, AttentionBranch)]
    assert len(branches) == 16
    for branch in branches:
        assert torch.equal(branch.attention(x), x)


def test_the_scales_of_a_step_share_one_autoencoder() -> None:
    pyramid = GuidedPyramid([4, 4, 4, 4], width=8, classes=3).train()
    calls: dict[nn.Module, int] = {}
    for module in pyramid.modules():
        if isinstance(module, SemanticAutoencoder):
            module.register_forward_hook(
                lambda module, *_: calls.update({module: calls.get(module, 0) + 1})
            )
    output = pyramid([torch.randn(2, 4, 16 >> s, 12 >> s) for s in range(4)], (64, 48))
    assert isinstance(output, MsgaOutput)
    assert calls == {pyramid.first.autoencoder: 4, pyramid.second.autoencoder: 4}
    assert [len(output.ae_inputs), len(output.ae_outputs)] == [8, 8]


def test_the_prediction_is_the_mean_of_the_refined_maps_alone() -> None:
    model = awake(small()).double()
    image = torch.rand(2, 1, 48, 40, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 48, 40))
    model.eval()
    with torch.no_grad():
        before, trained_before = model(image), msga_loss(model.outputs(image), labels)
        torch.testing.assert_close(before, model.outputs(image).logits)
        for head in model.pyramid.predict_first.values():
            for parameter in head.parameters():
                parameter.zero_()
        assert torch.equal(model(image), before)
        assert msga_loss(model.outputs(image), labels).total != trained_before.total
        for head in model.pyramid.predict_refined.values():
            head.bias += 1
        torch.testing.assert_close(model(image), before + 1)


def test_train_gives_what_the_losses_need() -> None:
    output = small().train()(torch.rand(2, 1, 64, 48))
    assert isinstance(output, MsgaOutput)
    assert {maps.shape for maps in output.logits_first} == {(2, 3, 64, 48)}
    assert {maps.shape for maps in output.logits_refined} == {(2, 3, 64, 48)}
    assert {code.shape for code in (*output.codes_first, *output.codes_refined)} == {(2, 64, 4, 3)}
    assert {x.shape for x in (*output.ae_inputs, *output.ae_outputs)} == {(2, 16, 16, 12)}


ABLATIONS = [
    {},
    {"attention": "position"},
    {"attention": "channel"},
    {"attention": "none"},
    {"scales": (1,)},
    {"scales": (4,)},
    {"scales": (2, 3), "attention": "none"},
    {"in_channels": 3},
    {"backbone": "resnet34"},
]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_every_parameter_gets_a_gradient(changes: dict[str, object]) -> None:
    model = awake(small(**changes)).train()
    output = model(torch.rand(2, model.config.in_channels, 64, 48))
    msga_loss(output, torch.randint(0, 3, (2, 64, 48))).total.backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert lost == []
    with torch.no_grad():
        assert model.eval()(torch.rand(1, model.config.in_channels, 33, 20)).isfinite().all()


def test_ablations_leave_out_what_they_say() -> None:
    def kinds(model: Msga) -> set[str]:
        return {name.split(".")[2] for name in sites(model)}

    assert kinds(small()) == {"position", "channel"}
    assert kinds(small(attention="position")) == {"position"}
    assert kinds(small(attention="channel")) == {"channel"}
    plain = small(attention="none")
    assert plain.pyramid.first.autoencoder is None
    assert not any(isinstance(module, AttentionBranch) for module in plain.modules())
    finest = small(scales=(1,))
    assert finest.backbone.stage_names == ("layer1",)
    assert len(sites(finest)) == 4
    assert list(small(scales=(4,)).pyramid.lateral) == ["4"]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"classes": 1}, "classes"),
        ({"backbone": "resnet19"}, "resnet18"),
        ({"width": 12}, "width"),
        ({"attention": "all"}, "attention"),
        ({"scales": ()}, "scales"),
        ({"scales": (2, 1)}, "scales"),
        ({"scales": (0, 1)}, "scales"),
        ({"scales": (1, 1)}, "scales"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_the_settings_survive_json() -> None:
    stored = json.loads(json.dumps(dataclasses.asdict(SMALL)))
    assert MsgaConfig(**{**stored, "scales": tuple(stored["scales"])}) == SMALL


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 3, 32, 32), (1, 1, 8, 32, 32)])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 1, height, width\)"):
        small()(torch.zeros(shape))


def test_autocast_stays_finite() -> None:
    model = awake(small()).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.rand(2, 1, 48, 40))
        loss = msga_loss(output, torch.randint(0, 3, (2, 48, 40)))
    loss.total.backward()
    assert loss.total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def site(step: str, kind: str, scale: int) -> str:
    return f"pyramid.{step}.{kind}.{scale}.attention.attend"


def test_observe_gives_a_map_per_step_kind_and_scale() -> None:
    model = awake(small()).eval()
    expected = {
        site(step, kind, scale)
        for step in ("first", "second")
        for kind in ("position", "channel")
        for scale in (1, 2, 3, 4)
    }
    assert set(sites(model)) == expected
    with torch.no_grad(), observe(model) as record:
        model(torch.rand(2, 1, 50, 37))
    rows, columns = model.grid(50, 37)
    assert (rows, columns) == (56 // 4, 40 // 4)
    for name in expected:
        tokens = rows * columns if ".position." in name else 8
        assert record[name].shape == (2, 1, tokens, tokens)
        torch.testing.assert_close(record[name].sum(-1), torch.ones(2, 1, tokens))


def test_observed_weights_reproduce_the_attention() -> None:
    model = awake(small()).double().eval()
    position = model.pyramid.first.position["2"].attention
    channel = model.pyramid.second.channel["3"].attention
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for module in (position, channel):
        module.register_forward_hook(
            lambda module, args, result: seen.update({module: (args[0], result)})
        )
    with torch.no_grad(), observe(model) as record:
        model(torch.rand(1, 1, 32, 40, dtype=torch.float64))
        x, result = seen[position]
        weights = record[site("first", "position", 2)][:, 0]
        values = position.value(x.flatten(2).mT)
        mixed = torch.einsum("bij,bjc->bci", weights, values)
        torch.testing.assert_close(result, 0.7 * mixed.reshape(x.shape) + x)
        x, result = seen[channel]
        weights = record[site("second", "channel", 3)][:, 0]
        mixed = torch.einsum("bij,bjn->bin", weights, x.flatten(2))
        torch.testing.assert_close(result, 0.7 * mixed.reshape(x.shape) + x)


def test_steering_a_site_changes_that_site() -> None:
    model = awake(small()).double().eval()
    image = torch.rand(1, 1, 40, 24, dtype=torch.float64)
    name = site("first", "position", 1)
    with torch.no_grad():
        plain = model(image)
        with steer(model, lambda weights, _call: weights, name):
            torch.testing.assert_close(model(image), plain)
        with steer(model, lambda weights, _call: weights * 0, name):
            silenced = model(image)
        assert torch.equal(model(image), plain)
        model.pyramid.first.position["1"].attention.gamma.zero_()
        torch.testing.assert_close(silenced, model(image))
    assert (silenced - plain).abs().max() > 1e-4


@pytest.mark.compile
@pytest.mark.slow
def test_export_serves_other_sizes() -> None:
    model = awake(small()).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model, (torch.rand(2, 1, 50, 44),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    ).module()
    for shape in [(2, 1, 50, 44), (1, 1, 64, 64), (3, 1, 33, 90)]:
        image = torch.rand(shape)
        with torch.no_grad():
            torch.testing.assert_close(program(image), model(image), rtol=1e-5, atol=1e-5)


@pytest.mark.compile
@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model = awake(small()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = torch.rand(2, 1, 40, 37)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-5, atol=1e-5)


def test_zoom_enlarges_the_image_and_brings_the_logits_back() -> None:
    config = MsgaConfig(backbone="resnet18", width=8, classes=3, scales=(1, 2))
    plain = Msga(config).eval()
    zoomed = Msga(replace(config, zoom=2)).eval()
    zoomed.load_state_dict(plain.state_dict())
    image = torch.rand(1, 1, 21, 34)
    large = F.interpolate(image, size=(42, 68), mode="bilinear", align_corners=False)
    wanted = F.interpolate(plain(large), size=(21, 34), mode="bilinear", align_corners=False)
    torch.testing.assert_close(zoomed(image), wanted, rtol=1e-5, atol=1e-6)
    assert zoomed.grid(21, 34) == plain.grid(42, 68)
    assert zoomed.outputs(image).logits_first[0].shape == (1, 3, 21, 34)
    with pytest.raises(ValueError, match="zoom"):
        replace(config, zoom=0)
