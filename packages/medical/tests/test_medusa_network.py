"""MEDUSA's network: published counts, identities of the gates, one body for all scales."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from heed_core.errors import InputError
from heed_medical.medusa import (
    Medusa,
    MedusaConfig,
    ScaleGate,
    UNetBody,
    body_loss,
    class_loss,
    load_backbone,
    load_body,
)
from heed_medical.medusa.inputs import standardise
from heed_medical.medusa.maps import enlarge, picture_maps
from heed_medical.medusa.network import to_size
from heed_medical.medusa.weights import without_gates

TINY = MedusaConfig(backbone="resnet18", body_widths=(4, 8), hidden=8)
PAPER_BODY = (24, 48, 96, 192, 384)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Of convolutions and linear layers."""
    total = 0

    def add(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            total += output.numel() * module.in_channels // module.groups * kernel
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features

    for module in model.modules():
        module.register_forward_hook(add)
    with torch.no_grad():
        model.eval()(*inputs)
    return total


def tiny(seed: int = 0, **changes: object) -> Medusa:
    """A small network in eval mode whose gates are not 1."""
    torch.manual_seed(seed)
    model = Medusa(replace(TINY, **changes)).eval()
    for gate in model.gates:
        if isinstance(gate, ScaleGate):
            nn.init.normal_(gate.score.weight, std=0.5)
    return model


def inputs(batch: int = 2, main: tuple[int, int] = (64, 96), body: tuple[int, int] = (32, 48)):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.rand((batch, 3, *main), generator=generator),
        torch.randn((batch, 1, *body), generator=generator),
    )


def test_the_reference_design_has_the_counts_it_was_chosen_for():
    model = Medusa(MedusaConfig())
    main, body = torch.zeros(1, 3, 480, 480), torch.zeros(1, 1, 256, 256)
    plain, body_alone = Medusa(MedusaConfig(attention="none")), UNetBody(1, PAPER_BODY)
    assert count(model) == 28_479_539
    assert model.body is not None
    assert count(model.body) == 4_416_241
    assert [count(gate) for gate in model.gates] == [46_976, 80_000, 146_048, 278_144]
    assert count(model.backbone) == 23_508_032 + 2048 * 2 + 2
    assert round(multiply_adds(model, main, body) / 1e9, 2) == 27.74
    assert round(multiply_adds(plain, main, body) / 1e9, 2) == 18.77
    assert round(multiply_adds(body_alone, body) / 1e9, 2) == 7.83


@pytest.mark.parametrize(
    ("backbone", "channels", "plain"),
    [
        ("resnet18", (64, 128, 256, 512), 11_176_512),
        ("resnet50", (256, 512, 1024, 2048), 23_508_032),
        ("densenet121", (256, 512, 1024, 1024), 6_953_856),
    ],
)
def test_every_variant_is_backbone_plus_body_plus_heads(backbone, channels, plain):
    classes, widths, hidden = 3, (8, 16, 32), 16
    config = MedusaConfig(backbone=backbone, classes=classes, body_widths=widths, hidden=hidden)
    with torch.device("meta"):
        model = Medusa(config)

    def block(i: int, o: int) -> int:
        return 9 * i * o + 2 * o + 9 * o * o + 2 * o

    levels = list(pairwise(widths))
    body = block(1, widths[0]) + widths[0] + 1
    body += sum(block(a, b) + block(a + b, a) for a, b in levels)
    heads = sum(9 * widths[0] * hidden + c * hidden + 2 * hidden + hidden * c + c for c in channels)
    last = channels[-1] * classes + classes
    assert count(model) == plain + last + body + heads


def test_fresh_gates_leave_a_backbone_as_it_is():
    torch.manual_seed(0)
    model = Medusa(TINY).eval()
    assert model.body is not None
    for parameter in model.body.parameters():
        nn.init.normal_(parameter)
    main, body = inputs()
    with torch.no_grad():
        difference = (model(main, body) - without_gates(model)(main, body)).abs().max()
        trained = tiny()
        assert (trained(main, body) - without_gates(trained)(main, body)).abs().max() > 1e-3
    assert difference < 1e-5


def test_the_body_runs_once_and_reaches_every_scale():
    model = tiny()
    assert model.body is not None
    calls = []
    model.body.register_forward_hook(lambda *_: calls.append(1))
    main, body = inputs()
    before = model.watch(main, body).gates
    assert len(calls) == 1
    with torch.no_grad():
        model.body.first[0].weight[0, 0, 1, 1] += 1.0
    after = model.watch(main, body).gates
    assert len(after) == 4
    for a, b in zip(before, after, strict=True):
        assert (a - b).abs().max() > 1e-4


def test_without_local_context_an_empty_body_gives_even_maps():
    model = tiny(local=False)
    assert model.body is not None
    nn.init.zeros_(model.body.up[-1][-2].weight)  # the last normalisation: G is 0
    nn.init.zeros_(model.body.up[-1][-2].bias)
    for gate in model.watch(*inputs()).gates:
        assert (gate - gate[:, :, :1, :1]).abs().max() == 0
    local = tiny()
    assert local.body is not None
    nn.init.zeros_(local.body.up[-1][-2].weight)
    nn.init.zeros_(local.body.up[-1][-2].bias)
    assert (local.watch(*inputs()).gates[0].std((2, 3))).max() > 1e-4


def test_the_next_stage_sees_the_gated_features():
    model = tiny()
    gate = model.gates[0]
    assert isinstance(gate, ScaleGate)
    nn.init.zeros_(gate.score.weight)
    nn.init.constant_(gate.score.bias, -1e9)  # A_1 = 0
    main, body = inputs()
    # later heads look at their stages, whose inputs no longer depend on the picture
    with torch.no_grad():
        assert torch.equal(model(main, body), model(torch.rand_like(main), body))
        assert not torch.equal(tiny()(main, body), tiny()(torch.rand_like(main), body))


@pytest.mark.parametrize(
    ("head", "gate", "shape", "high"),
    [("channel", "2sigmoid", 64, 2.0), ("spatial", "sigmoid", 1, 1.0)],
)
def test_maps_have_the_form_that_was_asked_for(head, gate, shape, high):
    model = tiny(head=head, gate=gate)
    view = model.watch(*inputs())
    assert [tuple(a.shape[2:]) for a in view.gates] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert view.gates[0].shape[1] == shape
    for attention in view.gates:
        assert 0 < attention.min() < attention.max() < high
    torch.testing.assert_close(view.logits, model(*inputs()))
    for gate_of_scale in model.gates:
        assert isinstance(gate_of_scale, ScaleGate)
        nn.init.constant_(gate_of_scale.score.bias, 100.0)
    assert all((a - high).abs().max() < 1e-4 for a in model.watch(*inputs()).gates)
    assert view.body_mask is not None
    assert view.body_mask.shape == (2, 1, 32, 48)


@pytest.mark.parametrize("attention", ["medusa", "se", "cbam", "none"])
@pytest.mark.parametrize("backbone", ["resnet18", "densenet121"])
def test_every_attention_trains_all_its_parameters(attention, backbone):
    torch.manual_seed(0)
    model = Medusa(replace(TINY, attention=attention, backbone=backbone)).train()
    for gate in model.gates:
        if isinstance(gate, ScaleGate):
            nn.init.normal_(gate.score.weight, std=0.1)
    view = model.watch(*inputs(batch=3))
    extra = 0.0 if view.body_mask is None else view.body_mask.mean()
    (view.logits.square().sum() + extra).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert (len(view.gates) == 0) == (attention == "none")


def test_a_picture_alone_is_the_picture_in_a_batch():
    model = tiny()
    main, body = inputs(batch=3)
    with torch.no_grad():
        together = model(main, body)
        alone = torch.cat([model(main[i : i + 1], body[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("main", "body", "said"),
    [((63, 80), (32, 32), "64 or more"), ((64, 64), (33, 32), "multiples of 2")],
)
def test_sizes_that_do_not_fit_are_refused(main, body, said):
    with pytest.raises(ValueError, match=said):
        tiny()(*inputs(main=main, body=body))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"classes": 1}, "classes"),
        ({"backbone": "resnet9"}, "backbone"),
        ({"body_widths": (8,)}, "body_widths"),
        ({"hidden": 0}, "hidden"),
        ({"normalise": "none"}, "normalise"),
        ({"attention": "se", "gate": "sigmoid"}, "gate has no effect"),
        ({"attention": "none", "local": False}, "local has no effect"),
    ],
)
@pytest.mark.bad_input
def test_networks_that_cannot_be_built_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        MedusaConfig(**settings)


def test_imagenet_normalisation_is_inside_the_network():
    main, body = inputs()
    unit, imagenet = tiny(), tiny(normalise="imagenet")
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(imagenet(main, body), unit((main - mean) / deviation, body))


def test_features_are_averaged_down_and_interpolated_up():
    features = torch.arange(16.0).reshape(1, 1, 4, 4)
    down = to_size(features, (2, 2))
    torch.testing.assert_close(down, torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    assert to_size(features, (8, 2)).shape == (1, 1, 8, 2)
    assert torch.equal(to_size(features, (4, 4)), features)


def test_standardisation_forgets_exposure_and_survives_constant_pictures():
    picture = torch.rand(2, 1, 20, 30)
    done = standardise(picture)
    torch.testing.assert_close(done, standardise(7.5 * picture + 3), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.mean((2, 3)), torch.zeros(2, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(done.std((2, 3), correction=0), torch.ones(2, 1))
    assert torch.equal(standardise(torch.full((1, 1, 8, 8), 0.3)), torch.zeros(1, 1, 8, 8))


def test_class_weights_multiply_and_do_not_normalise():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    each = nn.functional.cross_entropy(logits, labels, reduction="none")
    weighted = class_loss(logits, labels, (1.0, 2.0, 5.0))
    expected = (each * torch.tensor([1.0, 2, 5, 5, 2, 1])).mean()
    torch.testing.assert_close(weighted, expected)
    torch.testing.assert_close(class_loss(logits, labels), each.mean())


def test_the_body_loss_is_nil_for_a_sure_and_right_mask_and_ignores_what_does_not_count():
    mask = (torch.rand(2, 1, 16, 16) > 0.5).float()
    sure = 40 * (2 * mask - 1)
    assert body_loss(sure, mask) < 1e-4
    assert body_loss(-sure, mask) > 10
    counted = torch.ones_like(mask).bool()
    counted[:, :, :4] = False
    wrong = sure.clone()
    wrong[:, :, :4] *= -1
    assert body_loss(wrong, mask, counted) < 1e-4
    assert body_loss(wrong, mask) > 1


def test_a_backbone_starts_from_torchvision_weights(tmp_path: Path):
    import torchvision

    donor = torchvision.models.resnet18(weights=None)
    save_file(donor.state_dict(), tmp_path / "resnet18.safetensors")
    model = tiny()
    last = model.backbone.net.fc.weight.clone()
    load_backbone(model, tmp_path / "resnet18.safetensors")
    assert torch.equal(model.backbone.net.layer3[0].conv1.weight, donor.layer3[0].conv1.weight)
    assert torch.equal(model.backbone.net.fc.weight, last)
    with pytest.raises(InputError, match=r"resnet18\.safetensors.*not those of this network"):
        load_backbone(tiny(backbone="densenet121"), tmp_path / "resnet18.safetensors")


def test_densenet_weights_with_the_old_names_are_read(tmp_path: Path):
    import torchvision

    donor = torchvision.models.densenet121(weights=None).state_dict()
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): tensor
        for name, tensor in donor.items()
    }
    assert set(old) != set(donor)
    torch.save(old, tmp_path / "densenet121.pth")
    model = tiny(backbone="densenet121")
    load_backbone(model, tmp_path / "densenet121.pth")
    name = "features.denseblock2.denselayer3.conv2.weight"
    assert torch.equal(model.backbone.net.get_parameter(name), donor[name])


def test_a_body_starts_from_another_one(tmp_path: Path):
    donor = tiny(seed=5)
    assert donor.body is not None
    save_file(donor.body.state_dict(), tmp_path / "body.safetensors")
    save_file(
        {name: x.clone() for name, x in donor.state_dict().items()}, tmp_path / "whole.safetensors"
    )
    for name in ("body", "whole"):
        model = tiny()
        load_body(model, tmp_path / f"{name}.safetensors")
        assert model.body is not None
        for key, wanted in donor.body.state_dict().items():
            assert torch.equal(model.body.state_dict()[key], wanted)
    with pytest.raises(InputError, match="has no body"):
        load_body(tiny(attention="none"), tmp_path / "body.safetensors")
    with pytest.raises(InputError, match="not those of this network"):
        load_body(tiny(body_widths=(8, 16)), tmp_path / "body.safetensors")


def test_maps_of_a_picture_are_means_of_the_gates():
    model = tiny()
    main, body = inputs(batch=1)
    batch = {"main": main, "body": body, "label": torch.tensor([0])}
    maps = picture_maps(model, batch)
    view = model.watch(main, body)
    assert set(maps.gates) == {1, 2, 3, 4}
    for scale, attention in enumerate(view.gates, start=1):
        wanted = attention[0].mean(0).detach().numpy()
        assert maps.gates[scale] == pytest.approx(wanted, abs=1e-6)
    assert maps.evidence.shape == (2, 3)
    assert 0 <= maps.evidence.min() <= maps.evidence.max() <= 1 + 1e-6
    assert enlarge(maps.gates[4], (64, 96)).shape == (64, 96)
    other = picture_maps(model, batch, target=1 - int(view.logits.argmax()))
    assert abs(other.evidence - maps.evidence).max() > 1e-6
    assert picture_maps(tiny(attention="none"), batch).gates == {}


@pytest.mark.slow
def test_the_wiring_learns_where_squares_lie():
    """Three squares in noise: class 1 has one in the left half."""
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = torch.rand((number, 1, 64, 64), generator=generator) * 0.4
        labels = torch.arange(number) % 2
        for picture, label in zip(pictures, labels, strict=True):
            for square in range(3):
                row = int(torch.randint(0, 58, (1,), generator=generator))
                left = int(torch.randint(0, 26, (1,), generator=generator))
                column = left if label and square == 0 else left + 32
                picture[0, row : row + 6, column : column + 6] += 0.6
        return pictures, labels

    torch.manual_seed(0)
    model = Medusa(MedusaConfig(backbone="resnet18", body_widths=(8, 16, 32, 64, 128)))
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    pictures, labels = draw(400)
    for _ in range(6):
        model.train()
        for index in torch.randperm(400, generator=generator).split(16):
            picture = pictures[index]
            logits = model(picture.expand(-1, 3, -1, -1), standardise(picture))
            adam.zero_grad()
            class_loss(logits, labels[index]).backward()
            adam.step()
    pictures, labels = draw(200)
    with torch.no_grad():
        logits = model.eval()(pictures.expand(-1, 3, -1, -1), standardise(pictures))
    assert (logits.argmax(1) == labels).float().mean() >= 0.95


def test_padding_leaves_sizes_that_fit_as_they_are():
    main, body = torch.rand(2, 3, 64, 96), torch.randn(2, 1, 32, 48)
    plain, padded = tiny(), tiny(pad=True)
    torch.testing.assert_close(padded(main, body), plain(main, body), rtol=0, atol=0)


def test_other_sizes_are_padded_and_maps_cut_back():
    model = tiny(pad=True)
    main, body = torch.rand(1, 3, 50, 90), torch.randn(1, 1, 33, 44)
    view = model.watch(main, body)
    assert view.body_mask.shape == (1, 1, 33, 44)
    assert [tuple(gate.shape[-2:]) for gate in view.gates] == [(16, 23), (8, 12), (4, 6), (2, 3)]
    whole = F.pad(body, (0, 0, 0, 1), mode="replicate")  # 34 is the next multiple of 2
    torch.testing.assert_close(model.body(body), model.body(whole)[..., :33, :])
    maps = picture_maps(model, {"main": main, "body": body, "label": torch.tensor([-1])})
    for grid in (maps.evidence, *maps.gates.values(), *maps.spread.values()):
        assert grid.shape == (50, 90)
    assert maps.body_mask.shape == (33, 44)


def test_body_and_picture_lie_over_each_other_where_the_picture_is_padded():
    """A gate that hands the body's context through shows it where the picture is."""
    model = tiny(pad=True, local=False, head="spatial", gate="sigmoid")
    ramp = torch.linspace(0, 1, 120).expand(1, 4, 120, 120).clone()
    model.body.forward = lambda _: ramp
    gate = model.gates[0]
    nn.init.zeros_(gate.from_global.weight)
    gate.from_global.weight.data[0, 0, 1, 1] = 1.0
    gate.norm = nn.Identity()
    nn.init.zeros_(gate.score.weight)
    nn.init.zeros_(gate.score.bias)
    gate.score.weight.data[0, 0] = 1.0
    batch = {"main": torch.rand(1, 3, 40, 40), "body": torch.zeros(1, 1, 120, 120)}
    shown = picture_maps(model, {**batch, "label": torch.tensor([-1])}).gates[1]
    wanted = torch.sigmoid(torch.linspace(0, 1, 40)).numpy()
    # a cell of scale 1 is 4 pixels of 40: its middle is at most 2 pixels off
    assert abs(shown[20] - wanted).max() < 0.25 * 2 / 40 + 1e-3
    assert shown[20, 0] < shown[20, 20] < shown[20, -1]


@pytest.mark.parametrize("attention", ["se", "cbam", "none"])
def test_backbones_without_a_body_are_padded_too(attention: str):
    model = tiny(pad=True, attention=attention)
    main, body = torch.rand(1, 3, 20, 64), torch.randn(1, 1, 32, 32)
    whole = F.pad(main, (0, 0, 22, 22), mode="replicate")
    torch.testing.assert_close(model(main, body), tiny(attention=attention)(whole, body))
