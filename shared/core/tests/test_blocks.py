"""Multi-head attention, blocks, stacks: equal to torch's, to loops, to themselves step by step."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from heed_core import observe, steer
from heed_core.attention.multi_head import build_norm
from heed_core.blocks import (
    BlockConfig,
    Decoder,
    DecoderBlock,
    Encoder,
    EncoderBlock,
    FeedForward,
    MultiHeadAttention,
)
from heed_core.cache import CrossCache, KVCache
from heed_core.relative import AlibiBias, GridRelativeBias, RelativeBias, RotaryPositions
from heed_core.sites import sites
from heed_core.weights import (
    attention_from_timm,
    attention_from_torch,
    decoder_block_from_torch,
    encoder_block_from_torch,
    stack_from_torch,
)

GOLDEN = Path(__file__).parent / "golden" / "attention" / "fixture.safetensors"


def shaken(module: nn.Module) -> nn.Module:
    """Draw every parameter at random, so that nothing hides behind a zero or a one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def real(lengths: list[int], tokens: int) -> torch.Tensor:
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def test_golden_timm_attention() -> None:
    golden = load_file(GOLDEN)
    state = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    module = MultiHeadAttention(24, heads=3)
    module.load_state_dict(attention_from_timm(state))
    module.double()
    x = golden["input.x"].double().requires_grad_()
    with observe(module) as record:
        y = module(x)
    close(y, golden["output64.y"])
    close(record["attend"], golden["output64.attention"])
    (y * golden["input.loss_weight"]).sum().backward()
    torch.testing.assert_close(x.grad.float(), golden["grad.input.x"], rtol=1e-5, atol=1e-5)
    packed = torch.cat([module.query.weight.grad, module.key.weight.grad, module.value.weight.grad])
    close(packed, golden["grad64.weights.qkv.weight"])
    close(module.out.weight.grad, golden["grad64.weights.proj.weight"])


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_qk_norm_is_over_the_channels_of_a_head(norm: str) -> None:
    module = shaken(MultiHeadAttention(12, heads=3, qk_norm=norm))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (layer(x).reshape(2, 5, 3, 4) for layer in (module.query, module.key, module.value))

    def normed(heads: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        if norm == "rms":
            return heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight
        centred = heads - heads.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * layer.weight + layer.bias

    q, k = normed(q, module.query_norm), normed(k, module.key_norm)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 2).softmax(-1)
    mixed = torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(2, 5, 12)
    close(module(x), mixed @ module.out.weight.T + module.out.bias)


def test_timm_norms_are_imported() -> None:
    ours = MultiHeadAttention(12, heads=3, qk_norm="layer")
    theirs = {
        "qkv.weight": torch.randn(36, 12),
        "qkv.bias": torch.randn(36),
        "proj.weight": torch.randn(12, 12),
        "proj.bias": torch.randn(12),
        "q_norm.weight": torch.randn(4),
        "q_norm.bias": torch.randn(4),
        "k_norm.weight": torch.randn(4),
        "k_norm.bias": torch.randn(4),
    }
    ours.load_state_dict(attention_from_timm(theirs))
    assert torch.equal(ours.key.bias, theirs["qkv.bias"][12:24])
    assert torch.equal(ours.key_norm.weight, theirs["k_norm.weight"])
    with pytest.raises(ValueError, match=r"'norm\.weight' is no weight"):
        attention_from_timm({**theirs, "norm.weight": torch.zeros(12)})


@pytest.mark.parametrize("context_dim", [None, 7])
def test_equals_torch_multihead_attention(context_dim: int | None) -> None:
    widths = {} if context_dim is None else {"kdim": context_dim, "vdim": context_dim}
    theirs = shaken(nn.MultiheadAttention(12, 3, batch_first=True, **widths))
    ours = MultiHeadAttention(12, heads=3, context_dim=context_dim).double()
    ours.load_state_dict(attention_from_torch(theirs.state_dict()))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    context = torch.randn(2, 6, context_dim or 12, dtype=torch.float64)
    keep = real([6, 4], 6)
    allowed = torch.rand(5, 6) > 0.3
    allowed[:, 0] = True
    want, weights = theirs(
        x, context, context, key_padding_mask=~keep, attn_mask=~allowed, average_attn_weights=False
    )
    with observe(ours) as record:
        close(ours(x, context, mask=allowed, padding_mask=keep), want)
    close(record["attend"], weights)


def test_values_may_come_from_elsewhere() -> None:
    theirs = shaken(nn.MultiheadAttention(12, 3, batch_first=True))
    ours = MultiHeadAttention(12, heads=3).double()
    ours.load_state_dict(attention_from_torch(theirs.state_dict()))
    x, k, v = (torch.randn(2, n, 12, dtype=torch.float64) for n in (5, 6, 6))
    close(ours(x, k, value=v), theirs(x, k, v)[0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_torch_encoder_layer_and_stack(norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(
        12, 3, 20, 0.0, activation, batch_first=True, norm_first=norm_first
    )
    config = BlockConfig(dim=12, heads=3, hidden=20, activation=activation, norm_first=norm_first)
    x, keep = torch.randn(2, 5, 12, dtype=torch.float64), real([5, 3], 5)
    one = EncoderBlock(config).double()
    one.load_state_dict(encoder_block_from_torch(shaken(layer).state_dict()))
    want = layer(x, src_key_padding_mask=~keep)
    close(one(x, padding_mask=keep)[keep], want[keep])

    theirs = shaken(
        nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False)
    )
    ours = Encoder(config, depth=2, final_norm=True).double()
    ours.load_state_dict(stack_from_torch(theirs.state_dict(), kind="encoder"))
    want = theirs(x, src_key_padding_mask=~keep)
    close(ours(x, padding_mask=keep)[keep], want[keep])


@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_torch_decoder_layer_and_stack(norm_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(12, 3, 20, 0.0, batch_first=True, norm_first=norm_first)
    config = BlockConfig(
        dim=12, heads=3, hidden=20, activation="relu", norm_first=norm_first, causal=True
    )
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    context, keep = torch.randn(2, 6, 12, dtype=torch.float64), real([6, 4], 6)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    one = DecoderBlock(config).double()
    one.load_state_dict(decoder_block_from_torch(shaken(layer).state_dict()))
    want = layer(x, context, tgt_mask=future, memory_key_padding_mask=~keep)
    close(one(x, context, context_padding_mask=keep), want)

    theirs = shaken(nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(12)))
    ours = Decoder(config, depth=2, final_norm=True).double()
    ours.load_state_dict(stack_from_torch(theirs.state_dict(), kind="decoder"))
    want = theirs(x, context, tgt_mask=future, memory_key_padding_mask=~keep)
    close(ours(x, context, context_padding_mask=keep), want)


def test_final_norm_belongs_to_pre_norm() -> None:
    for norm_first, kind in ((True, nn.LayerNorm), (False, nn.Identity)):
        config = BlockConfig(dim=8, heads=2, norm_first=norm_first)
        assert isinstance(Encoder(config, depth=1).norm, kind)
        assert isinstance(Decoder(config, depth=1).norm, kind)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        (
            "gelu_tanh",
            lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        ),
        ("reglu", lambda x: x.clamp(min=0)),
        ("geglu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("swiglu", lambda x: x / (1 + torch.exp(-x))),
    ],
)
def test_feed_forward_equals_the_formula(activation: str, function) -> None:
    module = shaken(FeedForward(6, hidden=10, activation=activation))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = x @ module.expand.weight.T + module.expand.bias
    gated = activation.endswith("glu")
    hidden = function(hidden[..., :10]) * hidden[..., 10:] if gated else function(hidden)
    close(module(x), hidden @ module.contract.weight.T + module.contract.bias)


CAUSAL = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "multi-query": {"kv_heads": 1},
    "qk-norm": {"qk_norm": "rms", "norm": "rms"},
    "post-norm": {"norm_first": False},
    "window": {"window": 3},
    "wide-heads": {"head_dim": 6, "activation": "swiglu", "bias": False, "qkv_bias": False},
}


def causal_stack(name: str, cross: bool, code: str) -> nn.Module:
    config = BlockConfig(
        dim=16, heads=4, causal=True, context_dim=10 if cross else None, **CAUSAL[name]
    )
    rotary = None
    if code == "rotary":
        rotary = RotaryPositions(config.head_dim or 4, rotated=2)
    bias = {
        "relative": lambda: RelativeBias(4, max_distance=6, buckets=4, bidirectional=False),
        "alibi": lambda: AlibiBias(4),
    }.get(code)
    kind = Decoder if cross else Encoder
    return kind(config, depth=2, rotary=rotary, relative_bias=bias).eval()


@pytest.mark.parametrize("code", ["none", "rotary", "relative", "alibi"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_step_by_step_equals_the_full_forward(name: str, cross: bool, code: str) -> None:
    model = causal_stack(name, cross, code)
    x = torch.randn(3, 9, 16)
    context = (torch.randn(3, 5, 10),) if cross else ()
    with torch.no_grad():
        full = model(x, *context)
        cache = model.new_cache(3, 9)
        steps = [model(x[:, :4], *context, cache=cache)]  # the prompt at once
        steps += [model(x[:, i : i + 1], cache=cache) for i in range(4, 9)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=0)
    assert cache.length == 9


def test_rows_that_share_a_cached_context_decode_as_with_a_copy_of_it_each() -> None:
    model = causal_stack("grouped", True, "rotary")
    x, context = torch.randn(5, 4, 16), torch.randn(1, 6, 10)
    there = torch.tensor([[True, True, False, True, True, True]])
    with torch.no_grad():
        cache = model.new_cache(1, 9)
        first = torch.randn(1, 1, 16)
        model(first, context, context_padding_mask=there, cache=cache)
        for layer in cache.layers:
            layer.own.reorder(torch.zeros(5, dtype=torch.long))
        found = model(x, context_padding_mask=there, cache=cache)
        whole = torch.cat([first.expand(5, -1, -1), x], dim=1)
        full = model(whole, context.expand(5, -1, -1), context_padding_mask=there.expand(5, -1))
    torch.testing.assert_close(found, full[:, 1:], atol=1e-5, rtol=0)
    with torch.no_grad(), pytest.raises(ValueError, match="share a cached context"):
        model(x, context_mask=there, cache=cache)


@pytest.mark.parametrize("cross", [False, True])
def test_crop_and_reorder_decode_as_if_nothing_had_happened(cross: bool) -> None:
    model = causal_stack("grouped", cross, "rotary")
    x, other = torch.randn(3, 8, 16), torch.randn(3, 3, 16)
    context = (torch.randn(3, 5, 10),) if cross else ()
    with torch.no_grad():
        cache = model.new_cache(3, 8)
        model(x[:, :5], *context, cache=cache)
        model(other, cache=cache)
        cache.crop(5)
        twin = cache.clone()
        again = model(x[:, 5:], cache=cache)
        torch.testing.assert_close(again, model(x, *context)[:, 5:], atol=1e-5, rtol=0)
        beams = torch.tensor([2, 0, 0, 1])
        twin.reorder(beams)
        picked = model(x[beams, 5:], cache=twin)
        torch.testing.assert_close(picked, again[beams], atol=1e-5, rtol=0)


def test_decoding_a_padded_batch_equals_each_row_alone() -> None:
    model = causal_stack("plain", False, "rotary")
    x, prompt = torch.randn(2, 7, 16), 5
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, :2] = False  # the second prompt is two tokens shorter, padded on the left
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = model.new_cache(2, 7)
        model(
            x[:, :prompt],
            padding_mask=keep[:, :prompt],
            positions=positions[:, :prompt],
            cache=cache,
        )
        last = [
            model(
                x[:, i : i + 1],
                padding_mask=keep[:, : i + 1],
                positions=positions[:, i : i + 1],
                cache=cache,
            )
            for i in range(prompt, 7)
        ]
        alone = model(x[1:, 2:])
    torch.testing.assert_close(torch.cat(last, dim=1)[1:], alone[:, -2:], atol=1e-5, rtol=0)


def test_window_equals_a_band_mask() -> None:
    wide = MultiHeadAttention(8, heads=2, causal=True).double()
    narrow = MultiHeadAttention(8, heads=2, causal=True, window=3).double()
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    band = torch.tensor([[i - j < 3 for j in range(7)] for i in range(7)])
    close(narrow(x), wide(x, mask=band))
    assert not torch.allclose(narrow(x), wide(x))


def test_biases_reach_the_scores() -> None:
    bias = GridRelativeBias(2, shape=(2, 3))
    module = MultiHeadAttention(8, heads=2, relative_bias=bias).double()
    plain = MultiHeadAttention(8, heads=2).double()
    plain.load_state_dict(module.state_dict(), strict=False)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    extra = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    close(module(x, bias=extra), plain(x, bias=bias(6, 6) + extra))
    module(x).sum().backward()
    assert bias.table.grad.abs().max() > 0
    with pytest.raises(ValueError, match="bias must be broadcastable"):
        module(x, bias=extra[..., :-1])


def test_rotary_cross_attention_uses_both_positions() -> None:
    module = MultiHeadAttention(8, heads=2, rotary=RotaryPositions(4)).double()
    x, context = torch.randn(1, 3, 8).double(), torch.randn(1, 5, 8).double()
    here, there = torch.arange(3), torch.arange(5)
    close(
        module(x, context, positions=here + 9, context_positions=there + 9),
        module(x, context, positions=here, context_positions=there),
    )
    moved = module(x, context, positions=here + 9, context_positions=there)
    assert not torch.allclose(moved, module(x, context))


def test_dropout_acts_in_training_only() -> None:
    config = BlockConfig(dim=8, heads=2, dropout=0.5, attention_dropout=0.5)
    model = Encoder(config, depth=1)
    x = torch.randn(1, 5, 8)
    assert not torch.equal(model(x), model(x))
    assert {site.dropout for site in sites(model).values()} == {0.5}
    model.eval()
    assert torch.equal(model(x), model(x))


def test_every_attention_is_a_site() -> None:
    model = Decoder(BlockConfig(dim=8, heads=2, causal=True), depth=2).eval()
    names = ["layers.0.attention.attend", "layers.0.context_attention.attend"]
    names += [name.replace("0", "1") for name in names]
    assert list(sites(model)) == names
    x, context = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    with observe(model) as record:
        plain = model(x, context)
    assert tuple(record[names[1]].shape) == (1, 2, 3, 4)
    assert torch.equal(record[names[0]].triu(1), torch.zeros(1, 2, 3, 3))
    with steer(model, lambda weights, call: weights * 0, names[1]):
        assert not torch.allclose(model(x, context), plain)


def test_every_parameter_gets_a_gradient() -> None:
    config = BlockConfig(dim=8, heads=2, causal=True, qk_norm="layer", activation="geglu")
    model = shaken(Decoder(config, depth=1))
    x, context = torch.randn(2, 5, 8).double(), torch.randn(2, 4, 8).double()
    model(x, context).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_padding_and_batch_mates_do_not_show() -> None:
    model = Encoder(BlockConfig(dim=8, heads=2), depth=2).eval()
    x, keep = torch.randn(2, 6, 8), real([6, 4], 6)
    out = model(x, padding_mask=keep)
    spoilt = x.masked_fill(~keep[..., None], 1e4)
    assert torch.equal(model(spoilt, padding_mask=keep)[keep], out[keep])
    torch.testing.assert_close(model(x[1:, :4]), out[1:, :4], atol=1e-6, rtol=1e-5)


@pytest.mark.compile
def test_compiles_and_exports_with_any_length() -> None:
    config = BlockConfig(dim=16, heads=4, kv_heads=2, causal=True)
    rotary, bias = RotaryPositions(4), lambda: RelativeBias(4, bidirectional=False)
    model = Encoder(config, depth=1, rotary=rotary, relative_bias=bias).eval()
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(compiled(x[:, :5]), model(x[:, :5]), atol=1e-5, rtol=0)
        tokens = torch.export.Dim("tokens", min=2, max=4096)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: tokens}})
        longer = torch.randn(2, 23, 16)
        torch.testing.assert_close(program.module()(longer), model(longer), atol=1e-5, rtol=0)


def attention(**options: object) -> MultiHeadAttention:
    return MultiHeadAttention(8, heads=2, **options)


X = torch.zeros(2, 3, 8)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: MultiHeadAttention(8, heads=3), ValueError, "heads must divide dim=8"),
        (lambda: attention(kv_heads=3), ValueError, "kv_heads must divide heads=2"),
        (lambda: attention(qk_norm="batch"), ValueError, "'layer' or 'rms'"),
        (lambda: attention(window=3), ValueError, "needs causal=True"),
        (lambda: attention()(X[..., :7]), ValueError, "x must be \\(batch, tokens, 8"),
        (lambda: attention()(X, X[:1]), ValueError, "context must be \\(batch 2"),
        (lambda: attention(context_dim=5)(X), ValueError, "context must be given"),
        (lambda: attention()(X, value=X[:, :2]), ValueError, "value must have the shape"),
        (lambda: attention()(X, padding_mask=X[..., 0]), TypeError, "padding_mask must be bool"),
        (
            lambda: attention()(X, padding_mask=torch.ones(2, 4, dtype=torch.bool)),
            ValueError,
            "padding_mask must be \\(2, 3\\)",
        ),
        (lambda: attention()(X, mask=X), TypeError, "mask"),
        (lambda: attention()(X, positions=torch.arange(3)), ValueError, "without rotary"),
        (lambda: attention()(X, cache=KVCache(2, 2, 9, 4)), ValueError, "causal self-attention"),
        (
            lambda: attention(causal=True)(X, X, cache=KVCache(2, 2, 9, 4)),
            ValueError,
            "causal self-attention",
        ),
        (lambda: attention()(X, cache=CrossCache()), ValueError, "needs a context"),
        (
            lambda: attention(causal=True)(X, cache=KVCache(2, 2, 9, 4)),
            ValueError,
            "decode under torch.no_grad",
        ),
        (lambda: FeedForward(8, activation="tanh"), ValueError, "activation must be one of"),
        (lambda: BlockConfig(dim=8, heads=2, dropout=1.0), ValueError, "dropout must be in"),
        (lambda: attention_from_torch({"bias_k": X}), ValueError, "'bias_k' has no counterpart"),
        (lambda: stack_from_torch({}, kind="both"), ValueError, "kind must be"),
    ],
)
def test_misuse_is_named(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_norm_is_torchs_with_and_without_gradients(dtype: torch.dtype) -> None:
    norm = build_norm("rms", 8, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 2, 8, dtype=dtype).transpose(1, 2)
    before = x.clone()
    wanted = torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-5)
    assert torch.equal(norm(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), wanted)
        assert torch.equal(x, before)
        torch.testing.assert_close(norm(torch.zeros_like(x)), torch.zeros_like(x))


@pytest.mark.bad_input
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_of_another_type_than_the_weights_are_named(dtype: torch.dtype) -> None:
    encoder = Encoder(BlockConfig(dim=8, heads=2), depth=1).float()
    x = torch.randn(2, 5, 8)
    told = f"x must have the type of the weights, torch.float32, got {dtype}"
    with pytest.raises(TypeError, match=told):
        encoder(x.to(dtype))
    with pytest.raises(ValueError, match=r"x must be \(batch, tokens, 8\), got \(2, 5, 7\)"):
        encoder(x[..., :7])
    with torch.autocast("cpu", torch.bfloat16):  # converts
        assert encoder(x.bfloat16()).isfinite().all()
    with pytest.raises(TypeError, match=told):
        copy.deepcopy(encoder).to("meta")(x.to("meta", dtype))


@pytest.mark.compile
def test_a_compiled_block_takes_what_autocast_converts() -> None:
    encoder = Encoder(BlockConfig(dim=8, heads=2), depth=1)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 8).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), encoder(x))
    with pytest.raises(TypeError, match=r"x must have the type of the weights, torch\.float32"):
        torch.compile(encoder, backend="aot_eager")(x)
