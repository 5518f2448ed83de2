"""Equality with numbers that the official OAT computed (tests/golden/oat)."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from heed_core.errors import InputError
from heed_core.positions import gaussian_gram_codes
from heed_gaze.oat.decoding import decode_greedy
from heed_gaze.oat.losses import scanpath_loss
from heed_gaze.oat.network import Memory, Oat, OatConfig, Scenes
from heed_gaze.oat.weights import load_official, load_official_state

GOLDEN = Path(__file__).parent / "golden" / "oat"
CONFIG = OatConfig(dim=32, hidden=24, encoder_depth=2, decoder_depth=2, table_rows=6)
OBJECTS, COLUMNS = 7, 4
TARGET = torch.tensor([5, 6])
SHAPE = torch.tensor([[2, 4], [2, 4]])
CELLS = torch.tensor([[[k // COLUMNS, k % COLUMNS] for k in range(OBJECTS)]] * 2)
PRESENT = torch.ones(2, OBJECTS, dtype=torch.bool)


class SinglePrecisionSteps(nn.Module):
    """The sine code as the official code computes it: frequencies and angles in float32."""

    def forward(self, x: Tensor, *, offset: int = 0) -> Tensor:
        dim = x.shape[-1]
        frequencies = torch.exp(-torch.arange(0, dim, 2) * math.log(10000) / dim)
        angles = torch.arange(offset, offset + x.shape[1])[:, None] * frequencies
        return x + torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(x.dtype)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("weights."): x for k, x in golden.items() if k.startswith("weights.")}


def build(golden: dict[str, Tensor], dtype: torch.dtype) -> Oat:
    model = Oat(CONFIG)
    load_official_state(model, weights(golden), table=golden["input.position_table"])
    if dtype == torch.float64:
        model.steps = SinglePrecisionSteps()
    return model.to(dtype).eval()


def crops_of(golden: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    pool = golden["input.crop_pool_uint8"].float() / 255
    return pool[golden["input.crop_of_object"]].permute(0, 1, 4, 2, 3).to(dtype)


def paths_of(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What is given to the decoder after BOS, and what it is to predict."""
    ids = golden["input.tgt_pos"].T.contiguous()
    return ids[:, 1:-1], ids[:, 1:]


def memory_of(model: Oat, crops: Tensor) -> Memory:
    scenes = Scenes(crops=tuple(crops), cells=CELLS, shape=SHAPE, present=PRESENT)
    return model.read(scenes, torch.arange(2), TARGET)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_and_loss(golden: dict[str, Tensor], dtype: torch.dtype, tolerance: float) -> None:
    model = build(golden, dtype)
    given, wanted = paths_of(golden)
    logits = model(crops_of(golden, dtype), CELLS, TARGET, given, SHAPE)
    assert (logits.transpose(0, 1) - golden["output64.logits"]).abs().max() < tolerance
    loss = scanpath_loss(logits, wanted)
    assert abs(float(loss.detach() - golden["output64.loss"])) < tolerance


def test_stages(golden: dict[str, Tensor]) -> None:
    model, crops = build(golden, torch.float32), crops_of(golden, torch.float32)
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, *, after: bool = True) -> None:
        if after:
            module.register_forward_hook(lambda _m, _i, output: seen.update({name: output}))
        else:
            module.register_forward_pre_hook(lambda _m, inputs: seen.update({name: inputs[0]}))

    note("encoder_tokens", model.encoder, after=False)
    note("decoder_tokens", model.decoder, after=False)
    for k in range(2):
        note(f"encoder_layer{k}", model.encoder.layers[k])
        note(f"decoder_layer{k}", model.decoder.layers[k])
    model(crops, CELLS, TARGET, paths_of(golden)[0], SHAPE)
    assert len(seen) == 6
    for name, found in seen.items():
        wanted = golden[f"output.{name}"].transpose(0, 1)
        assert (found - wanted).abs().max() < 1e-5, name
    features = model.crop_encoder(crops.flatten(0, 1)).view(2, OBJECTS, -1)
    own = golden["output.crop_features_encoder"]
    assert (torch.cat([features, features[[0, 1], TARGET][:, None]], 1) - own).abs().max() < 1e-5


def test_pointer_heads_before_the_mix(golden: dict[str, Tensor]) -> None:
    model = build(golden, torch.float32)
    pointer = model.pointer
    assert pointer is not None
    memory = golden["output.encoder_layer1"].transpose(0, 1)
    decoded = golden["output.decoder_layer1"].transpose(0, 1)
    heads = pointer.project(memory)
    for head in range(2):
        query = pointer.query(decoded)[..., 32 * head : 32 * (head + 1)]
        scores = F.pad(query @ heads[:, head].transpose(1, 2) / math.sqrt(32), (0, 1))
        wanted = golden[f"output.pointer_head{head}"][..., 0].transpose(0, 1)
        assert (scores - wanted).abs().max() < 1e-5


def test_gradients(golden: dict[str, Tensor]) -> None:
    model = build(golden, torch.float64)
    given, wanted = paths_of(golden)
    pool = crops_of(golden, torch.float64)
    rows = torch.arange(2)
    # The official network is given the encoder's crops, the target's and the decoder's separately.
    shown = torch.cat([pool, pool[rows, TARGET][:, None]], dim=1).requires_grad_()
    features = model.crop_encoder(shown.flatten(0, 1)).view(2, OBJECTS + 1, -1)
    fixated = model.crop_encoder(pool.flatten(0, 1)).view(2, OBJECTS, -1)
    filler = model.crop_encoder(torch.ones_like(pool[0, :1]))[0]
    encoded = model.remember(
        features[:, :-1], filler, CELLS, SHAPE, PRESENT, TARGET, features[:, -1]
    )
    decoded = model.remember(fixated, filler, CELLS, SHAPE, PRESENT, TARGET)
    memory = Memory(
        tokens=encoded.tokens, there=encoded.there, table=decoded.table, keys=encoded.keys
    )
    loss = scanpath_loss(model.follow(memory, given), wanted)
    loss.backward()
    first = model.encoder.layers[0].attention
    assert model.pointer is not None
    assert model.pointer.mix is not None
    found = {
        "cnn_embedding.cnn1.0.weight": model.crop_encoder.conv1.weight.grad,
        "cross_attentions.1.encode_fc.weight": model.pointer.key.weight.grad[32:],
        "readout.weight": model.pointer.mix.weight.grad,
        "readout.bias": model.pointer.mix.bias.grad,
        "transformer_encoder.layers.0.self_attn.in_proj_weight": torch.cat(
            [layer.weight.grad for layer in (first.query, first.key, first.value)]
        ),
        "object_and_target_crops": shown.grad.abs().sum(dim=(2, 3, 4)),
        "object_crop_batch0_object0_every3rd_pixel": shown.grad[0, 0, :, ::3, ::3].permute(1, 2, 0),
    }
    for name, gradient in found.items():
        stored = golden[f"grad.{name}"]
        assert (gradient - stored).abs().max() <= 2e-6 * max(1.0, float(stored.abs().max())), name


def test_greedy_paths(golden: dict[str, Tensor]) -> None:
    model = build(golden, torch.float32)
    with torch.no_grad():
        memory = memory_of(model, crops_of(golden, torch.float32))
    for number, path in enumerate(decode_greedy(model, memory, max_len=12)):
        assert list(path.objects) == golden[f"output.greedy{number}"].tolist()


@pytest.mark.parametrize(
    ("name", "sigma"),
    [("amazon14_sigma2", 2.0), ("shelf11_sigma2", 2.0), ("shelf11_sigma2.5", 2.5)],
)
def test_the_exact_table_has_the_similarities_of_the_published_ones(
    golden: dict[str, Tensor], name: str, sigma: float
) -> None:
    gram = golden[f"output.official_table_{name}.cosine_gram"]
    codes = F.normalize(gaussian_gram_codes(len(gram), 86, sigma=sigma).double(), dim=-1)
    assert (codes @ codes.T - gram).abs().max() < 2e-3  # the published ones are fits
    norms = golden[f"output.official_table_{name}.row_norms"]
    assert norms.max() - norms.min() < 1e-3


def test_a_checkpoint_file_is_read_with_its_wrapping(
    golden: dict[str, Tensor], tmp_path: Path
) -> None:
    dead = {"generator.weight": torch.zeros(9, 32), "LinearEmbedding.weight": torch.zeros(16, 3)}
    state = {f"model.{name}": x for name, x in (weights(golden) | dead).items()}
    torch.save({"state_dict": state}, tmp_path / "epoch.ckpt")
    model = Oat(CONFIG)
    load_official(model, tmp_path / "epoch.ckpt", table=golden["input.position_table"])
    wanted = build(golden, torch.float32).state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items())


def test_weights_of_another_network_are_refused(golden: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="not those of this network"):
        load_official_state(Oat(replace(CONFIG, decoder_depth=3)), weights(golden))
    with pytest.raises(InputError, match="position table must be"):
        load_official_state(Oat(CONFIG), weights(golden), table=torch.zeros(5, 6))
