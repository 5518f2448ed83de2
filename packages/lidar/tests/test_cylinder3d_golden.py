"""Equality with numbers that the official network computed (tests/golden/cylinder3d)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heed_lidar.cylinder3d import Cylinder3d, Cylinder3dConfig, VoxelLogits
from heed_lidar.cylinder3d.weights import PREFIX, load_official_state, official_name
from heed_lidar.cylindrical import CylindricalGrid

GOLDEN = Path(__file__).parent / "golden" / "cylinder3d"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
STORED_SINGLE = 1e-7  # computed in float64 but stored as float32: half a unit in the last place
CONFIG = Cylinder3dConfig(
    classes=5,
    width=2,
    grid=CylindricalGrid(shape=(24, 18, 8)),
    point_features=24,
    voxel_features=6,
)
STAGES = {
    "stem": "downCntx",
    "context": "ReconNet",
    "head": "logits",
    **{f"down.{k}.body": f"resBlock{k + 2}.skip" for k in range(4)},
    **{f"down.{k}.pool": f"resBlock{k + 2}.pooled" for k in range(4)},
    **{f"up.{k}": f"upBlock{k}" for k in range(4)},
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def build(golden: dict[str, Tensor], dtype: torch.dtype) -> Cylinder3d:
    network = Cylinder3d(CONFIG)
    weights = {n.removeprefix("weights."): t for n, t in golden.items() if n.startswith("weights.")}
    load_official_state(network, weights)
    return network.to(dtype).eval()


def run(network: Cylinder3d, golden: dict[str, Tensor], dtype: torch.dtype) -> VoxelLogits:
    return network(golden["input.point_features"].to(dtype), golden["input.point_index"])


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max()
    assert error <= tolerance * wanted.abs().max(), f"off by {error:.3g}"


def scalar(output: VoxelLogits) -> Tensor:
    shape = (1, *CONFIG.grid.shape)
    dense = output.logits.new_zeros(*shape, CONFIG.classes)
    dense = dense.index_put(tuple(output.coords.long().unbind(1)), output.logits)
    flat = dense.movedim(-1, 1).flatten()
    wave = torch.sin(0.7 * torch.arange(len(flat), dtype=torch.float64)).to(flat.dtype)
    return 100 / len(output.logits) * (flat * wave).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    output = run(build(golden, dtype), golden, dtype)
    assert torch.equal(output.coords, golden["output.coords"])
    assert_near(output.logits, golden["output64.site_logits"], TOLERANCE[dtype])
    assert_near(scalar(output), golden["output64.scalar"], 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["torch", "spconv"])
def test_stages(golden: dict[str, Tensor], backend: str) -> None:
    if backend == "spconv":
        pytest.importorskip("spconv", exc_type=ImportError)
    from heed_core.sparse import use_backend

    network = build(golden, torch.float32)
    use_backend(network, backend)
    seen = {}
    for ours, theirs in STAGES.items():
        network.get_submodule(ours).register_forward_hook(
            lambda _module, _inputs, output, theirs=theirs: seen.update({theirs: output})
        )
    network.points.register_forward_hook(
        lambda _module, _inputs, output: seen.update({"voxel_features": output})
    )
    with torch.no_grad():
        run(network, golden, torch.float32)
    assert_near(seen.pop("voxel_features"), golden["output64.voxel_features"], 1e-5)
    assert len(seen) == len(STAGES)
    for name, stage in seen.items():
        wanted = golden[f"output.stage.{name}"]
        assert torch.equal(stage.coords, golden[f"output.stage.{name}.coords"]), name
        # Of the context the product is stored, not its concatenation with the input.
        assert_near(stage.features[:, : wanted.shape[1]], wanted, TOLERANCE[torch.float32])


def test_gradients(golden: dict[str, Tensor]) -> None:
    network = build(golden, torch.float64)
    features = golden["input.point_features"].double().requires_grad_()
    voxels: list[Tensor] = []
    network.points.register_forward_hook(lambda _m, _i, output: voxels.append(output))
    output = network(features, golden["input.point_index"])
    parameters = {official_name(name): p for name, p in network.named_parameters()}
    names = [n.removeprefix("grad.weights.") for n in golden if n.startswith("grad.weights.")]
    assert len(names) == 7
    wanted = [parameters[PREFIX.sub("", name)] for name in names]
    gradients = torch.autograd.grad(scalar(output), [features, voxels[0], *wanted])
    for name, gradient in zip(
        ["point_features", "voxel_features", *(f"weights.{n}" for n in names)],
        gradients,
        strict=True,
    ):
        assert_near(gradient, golden[f"grad.{name}"], STORED_SINGLE)


@pytest.mark.parametrize(
    "part",
    ["down.1.body.second", "down.3.pool", "up.0.mix", "up.2.unpool", "up.3.body.2", "points.norm"],
)
def test_logits_notice_a_missing_part(golden: dict[str, Tensor], part: str) -> None:
    network = build(golden, torch.float64)
    with torch.no_grad():
        for parameter in network.get_submodule(part).parameters():
            parameter.zero_()
        logits = run(network, golden, torch.float64).logits
    wanted = golden["output64.site_logits"]
    assert (logits - wanted).abs().max() > 1e-4 * wanted.abs().max()
