"""The attention call: every back-end against loops in float64, and its promises at the edges."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heed_core import attend, explain_dispatch, masks
from heed_core.attend import BACKENDS, ORDER, UnsupportedBackend
from heed_core.backends import flex, reference
from heed_core.testing.memory import Memory
from heed_core.testing.oracle import assert_within_budget, naive_attention

EAGER = ("sdpa", "reference")
LOW = (torch.float32, torch.bfloat16, torch.float16)


def draw(
    b: int, h: int, g: int, n: int, m: int, d: int, e: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(b, h, n, d, dtype=dtype),
        torch.randn(b, g, m, d, dtype=dtype),
        torch.randn(b, g, m, e, dtype=dtype),
    )


def kinds(kind: str, b: int, h: int, n: int, m: int) -> dict[str, object]:
    mask = torch.rand(b, 1, n, m) > 0.4
    if n:
        mask[:, :, n // 2] = False  # a row that may attend to nothing
    bias = torch.randn(h, n, m, dtype=torch.float64)
    return {
        "plain": {},
        "mask": {"mask": mask},
        "causal": {"causal": True},
        "bias": {"bias": bias},
        "all": {"mask": mask, "causal": True, "bias": bias, "scale": 0.3},
    }[kind]


def cast(options: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    probe = torch.arange(out.numel(), dtype=torch.float64).cos().reshape(out.shape)
    loss = (out.double() * probe).sum()
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(5, 5), (4, 7), (7, 4), (1, 6), (3, 1)])
@pytest.mark.parametrize("kind", ["plain", "mask", "causal", "bias", "all"])
def test_every_backend_equals_loops(kind, lengths, groups, impl) -> None:
    n, m = lengths
    tensors = draw(2, 4, groups, n, m, 3, 5)
    options = kinds(kind, 2, 4, n, m)
    leaves = [
        x.requires_grad_()
        for x in (*tensors, *(x for x in options.values() if x is options.get("bias")))
    ]
    out, exact = attend(*tensors, impl=impl, **options), naive_attention(*tensors, **options)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(out, leaves), gradients(exact, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("kind", ["plain", "mask", "causal", "bias", "all"])
def test_low_precision_keeps_its_error_budget(kind, impl, dtype) -> None:
    tensors = draw(2, 4, 2, 9, 13, 8, 6, dtype=dtype)
    options = cast(kinds(kind, 2, 4, 9, 13), dtype)
    wide = [x.double() for x in tensors]
    exact = naive_attention(*wide, **cast(options, torch.float64))
    eager = naive_attention(*tensors, **options)
    out = attend(*tensors, impl=impl, **options)
    assert out.dtype == dtype
    assert_within_budget(out, exact=exact, eager=eager)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_a_row_without_permitted_keys_is_zero_with_zero_gradients(dtype, impl) -> None:
    for with_bias, whole in itertools.product((False, True), (False, True)):
        q, k, v = (x.requires_grad_() for x in draw(1, 2, 2, 3, 4, 4, 4, dtype=dtype))
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[slice(None) if whole else 1] = False
        bias = torch.randn(3, 4, dtype=dtype).requires_grad_() if with_bias else None
        out = attend(q, k, v, mask=mask, bias=bias, impl=impl)
        leaves = [q, k, v, *([bias] if with_bias else [])]
        found = gradients(out, leaves)
        empty = slice(None) if whole else 1
        assert bool((out[:, :, empty] == 0).all())
        assert bool((found[0][:, :, empty] == 0).all())
        assert all(bool(x.isfinite().all()) for x in found)
        assert whole or bool(found[1].ne(0).any())


@pytest.mark.parametrize("impl", EAGER)
def test_a_bias_of_minus_infinity_forbids(impl) -> None:
    q, k, v = draw(1, 1, 1, 3, 4, 2, 2)
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    bias = torch.zeros(3, 4, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(
        attend(q, k, v, bias=bias, impl=impl), attend(q, k, v, mask=mask, impl=impl)
    )


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("learned", [False, True])
def test_a_row_that_a_bias_empties_is_zero_with_zero_gradients(learned, impl) -> None:
    q, k, v = (x.requires_grad_() for x in draw(1, 2, 2, 3, 4, 4, 4))
    bias = torch.zeros(3, 4, dtype=torch.float64)
    bias[1] = -torch.inf
    bias.requires_grad_(learned)
    out = attend(q, k, v, bias=bias, impl=impl)
    found = gradients(out, [q, k, v, *([bias] if learned else [])])
    assert bool((out[:, :, 1] == 0).all())
    assert bool((found[0][:, :, 1] == 0).all())
    assert all(bool(x.isfinite().all()) for x in found)


@pytest.mark.parametrize("impl", EAGER)
def test_causality_is_aligned_bottom_right(impl) -> None:
    # equal scores and unit vectors as values: the output is the weights; row i sees i + 3 keys
    out = attend(
        torch.zeros(1, 1, 4, 2),
        torch.zeros(1, 1, 6, 2),
        torch.eye(6)[None, None],
        causal=True,
        impl=impl,
    )
    expected = torch.zeros(4, 6)
    for i in range(4):
        expected[i, : i + 3] = 1.0 / (i + 3)
    torch.testing.assert_close(out[0, 0], expected)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize(("n", "m"), [(0, 4), (3, 0), (0, 0)])
def test_empty_sequences(n, m, impl) -> None:
    q, k, v = (x.requires_grad_() for x in draw(2, 2, 1, n, m, 4, 3))
    for causal in (False, True):
        out = attend(q, k, v, causal=causal, impl=impl)
        assert out.shape == (2, 2, n, 3)
        assert bool((out == 0).all())
        out.sum().backward()
        assert all(bool((x.grad == 0).all()) for x in (q, k, v))


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize(
    "scale",
    [1.0, 0.0, -0.7, pytest.param(3, marks=pytest.mark.bad_input)],  # for beartype, int is no float
)
def test_any_finite_scale(scale, impl) -> None:
    tensors, options = draw(1, 2, 2, 4, 5, 3, 3), kinds("mask", 1, 2, 4, 5)
    torch.testing.assert_close(
        attend(*tensors, scale=scale, impl=impl, **options),
        naive_attention(*tensors, scale=float(scale), **options),
    )


@pytest.mark.parametrize("impl", EAGER)
def test_strided_inputs(impl) -> None:
    q, k, v = draw(2, 3, 3, 5, 7, 4, 4)
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(attend(*strided, impl=impl), attend(q, k, v, impl=impl))
    expanded = q[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        attend(expanded, k, v, impl=impl), attend(expanded.contiguous(), k, v, impl=impl)
    )


@pytest.mark.parametrize("impl", EAGER)
def test_masked_and_future_tokens_change_no_bit(impl) -> None:
    q, k, v = draw(2, 4, 2, 6, 6, 8, 8, dtype=torch.float32)
    mask = torch.arange(6) < torch.tensor([4, 6])[:, None, None, None]
    before = attend(q, k, v, mask=mask, causal=True, impl=impl)
    k2, v2 = k.clone(), v.clone()
    k2[0, :, 4:], v2[0, :, 4:] = 1e4, -1e4
    k2[1, :, 5:], v2[1, :, 5:] = 1e4, -1e4
    after = attend(q, k2, v2, mask=mask, causal=True, impl=impl)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :, :5], after[1, :, :5])
    assert not torch.equal(before[1, :, 5], after[1, :, 5])


@pytest.mark.parametrize("impl", EAGER)
def test_dropout_keeps_the_mean(impl) -> None:
    q, k, v = draw(1, 1, 1, 2, 3, 2, 1, dtype=torch.float32)
    many = [x.expand(4000, -1, -1, -1) for x in (q, k, v)]
    draws = attend(*many, dropout=0.4, impl=impl)
    spread = draws.std(dim=0) / 4000**0.5
    assert bool(((draws.mean(dim=0) - attend(q, k, v)[0]).abs() < 3.5 * spread).all())
    assert float(draws.std(dim=0).min()) > 0


def test_gradcheck_of_the_reference() -> None:
    tensors = [x.requires_grad_() for x in draw(1, 2, 1, 5, 4, 4, 3)]
    bias = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 4) > 0.3

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(q, k, v, mask=mask, bias=bias, causal=True, impl="reference")

    assert torch.autograd.gradcheck(call, (*tensors, bias))


@settings(deadline=None, max_examples=40)
@given(
    b=st.integers(1, 3),
    g=st.integers(1, 3),
    r=st.integers(1, 3),
    n=st.integers(0, 6),
    m=st.integers(0, 6),
    d=st.integers(1, 5),
    e=st.integers(1, 5),
    kind=st.sampled_from(["plain", "mask", "causal", "bias", "all"]),
    broadcast=st.booleans(),
)
def test_backends_agree_on_any_shape(b, g, r, n, m, d, e, kind, broadcast) -> None:
    tensors = draw(b, g * r, g, n, m, d, e)
    options = kinds(kind, b, g * r, n, m)
    if broadcast and "mask" in options:
        options["mask"] = options["mask"][:1, :, :, :1]
    torch.testing.assert_close(
        attend(*tensors, impl="sdpa", **options), attend(*tensors, impl="reference", **options)
    )


@pytest.mark.parametrize("impl", EAGER)
def test_autocast_rounds_the_same_in_every_backend(impl) -> None:
    q, k, v = draw(1, 2, 2, 5, 5, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k.bfloat16(), v, impl=impl)
        wide = attend(q.double(), k.double(), v.double(), impl=impl)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
    narrow = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, attend(*narrow, impl=impl))


def test_meta_tensors() -> None:
    q, k, v = (x.to("meta") for x in draw(2, 4, 2, 3, 5, 8, 6))
    assert attend(q, k, v, causal=True).shape == (2, 4, 3, 6)


BAD = {
    "query must be (batch": ({"query": torch.ones(2, 3, 4)}, ValueError),
    "query must be one of": ({"query": torch.ones(1, 2, 3, 4).long()}, TypeError),
    "value must have the type of query": ({"value": torch.ones(1, 2, 5, 4).double()}, TypeError),
    "key must be (b, g, m, d)": ({"key": torch.ones(1, 2, 5, 3)}, ValueError),
    "must divide that of query": (
        {"query": torch.ones(1, 3, 3, 4), "key": torch.ones(1, 2, 5, 4)},
        ValueError,
    ),
    "value must agree with key": ({"value": torch.ones(1, 2, 6, 4)}, ValueError),
    "mask must be boolean": ({"mask": torch.ones(3, 5)}, TypeError),
    "mask must be broadcastable": ({"mask": torch.ones(5, 3) > 0}, ValueError),
    "bias must be floating": ({"bias": torch.ones(3, 5) > 0}, TypeError),
    "bias must be broadcastable": ({"bias": torch.ones(4, 3, 5)}, ValueError),
    "scale must be finite": ({"scale": float("nan")}, ValueError),
    "scale must be a number": ({"scale": torch.ones(1)}, TypeError),
    "dropout must be in": ({"dropout": 1.0}, ValueError),
    "impl must be": ({"impl": "fast"}, ValueError),
}


AGAINST_ANNOTATIONS = {
    "query must be (batch",
    "query must be one of",
    "key must be (b, g, m, d)",
    "value must agree with key",
    "mask must be boolean",
    "bias must be floating",
    "scale must be a number",
    "impl must be",
}
"""Those of `BAD` that the annotations of `attend` rule out already."""


@pytest.mark.parametrize(
    "message",
    [pytest.param(m, marks=pytest.mark.bad_input if m in AGAINST_ANNOTATIONS else ()) for m in BAD],
)
def test_bad_arguments_are_named(message) -> None:
    change, error = BAD[message]
    good = {
        "query": torch.ones(1, 2, 3, 4),
        "key": torch.ones(1, 2, 5, 4),
        "value": torch.ones(1, 2, 5, 4),
    }
    with pytest.raises(error) as caught:
        attend(**{**good, **change})
    assert message in str(caught.value)
    if not message.startswith("impl"):
        with pytest.raises(error):
            explain_dispatch(**{**good, **change})


def test_dispatch_is_explained() -> None:
    q = torch.ones(1, 1, 3, 4, requires_grad=True)
    reports = {report.name: report for report in explain_dispatch(q, q, q)}
    assert set(reports) == set(BACKENDS)
    assert [name for name, report in reports.items() if report.chosen] == ["sdpa"]
    assert not reports["flex"].usable
    assert "no backward pass on the CPU" in reports["flex"].reason
    assert reports["reference"].usable
    assert "preferred" in reports["reference"].reason
    chosen = {r.name: r.chosen for r in explain_dispatch(q, q, q, impl="reference")}
    assert chosen == {"sdpa": False, "flex": False, "reference": True}
    assert not any(r.chosen for r in explain_dispatch(q, q, q, impl="flex"))


@pytest.mark.bad_input
def test_an_unknown_choice_cannot_be_explained() -> None:
    q = torch.ones(1, 1, 3, 4)
    with pytest.raises(ValueError, match="impl must be"):
        explain_dispatch(q, q, q, impl="fast")


def test_an_explicit_choice_never_falls_back() -> None:
    q = torch.ones(1, 1, 3, 4)
    with pytest.raises(UnsupportedBackend, match="no backward pass on the CPU"):
        attend(q.requires_grad_(), q, q, impl="flex")
    with pytest.raises(UnsupportedBackend, match="no dropout"):
        attend(q.detach(), q.detach(), q.detach(), dropout=0.1, impl="flex")
    with pytest.raises(UnsupportedBackend, match="float64"):
        attend(*(q.detach().double() for _ in range(3)), impl="flex")
    with pytest.raises(UnsupportedBackend, match="empty"):
        attend(q.detach()[:, :, :0], q.detach(), q.detach(), impl="flex")


def test_auto_ends_with_what_accepts_everything() -> None:
    assert ORDER[-1] == "reference"


def test_the_package_exports_the_function() -> None:
    import heed_core.attend
    import heed_core.sites

    assert heed_core.attend is attend
    assert callable(heed_core.observe)
    with pytest.raises(AttributeError, match="no attribute 'attention_is'"):
        _ = heed_core.attention_is


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("kind", ["plain", "mask", "causal", "bias", "all"])
def test_flex_equals_loops_forward_on_the_cpu(kind) -> None:
    for n, m in ((6, 9), (1, 5)):
        tensors = draw(2, 4, 2, n, m, 8, 12, dtype=torch.float32)
        options = cast(kinds(kind, 2, 4, n, m), torch.float32)
        wide = [x.double() for x in tensors]
        exact = naive_attention(*wide, **cast(options, torch.float64))
        with torch.no_grad():
            out = attend(*tensors, impl="flex", **options)
        assert_within_budget(out, exact=exact, eager=naive_attention(*tensors, **options))


@pytest.mark.compile
def test_blocks_of_causal_calls_are_made_once(monkeypatch) -> None:
    flex._causal_blocks.cache_clear()
    with torch.inference_mode():
        first = flex._causal_blocks(130, 200, torch.device("cpu"))
    again = flex._causal_blocks(130, 200, torch.device("cpu"))
    assert again is first
    assert not first.kv_num_blocks.is_inference()
    assert flex._causal_blocks(200, 200, torch.device("cpu")) is not first
    from torch.nn.attention.flex_attention import create_mask

    dense = create_mask(first.mask_mod, 1, 1, 130, 200, device="cpu")[0, 0]
    assert torch.equal(dense, masks.causal(130, 200))
    monkeypatch.setattr(flex, "_run", lambda *_, block_mask, **__: block_mask)
    query, key, value = draw(1, 2, 2, 130, 200, 8, 8)
    for mask in (None, torch.ones(130, 200, dtype=torch.bool)):
        options = {"mask": mask, "bias": None, "causal": True, "scale": 1.0, "dropout": 0.0}
        assert (flex.run(query, key, value, **options) is first) == (mask is None)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [None, (2, 4, 9, 11), (9, 1), (1, 11), (11,)])
def test_rows_of_the_reference_in_pieces_are_the_whole(monkeypatch, causal: bool, shape) -> None:
    query, key, value = draw(2, 4, 2, 9, 11, 8, 6)
    mask = None if shape is None else torch.rand(shape) < 0.7
    bias = None if shape is None else torch.randn(shape, dtype=query.dtype)
    options = {"mask": mask, "bias": bias, "causal": causal, "impl": "reference"}
    whole = attend(query, key, value, **options)
    with Memory() as memory:
        assert torch.equal(attend(query, key, value, **options), whole)
    monkeypatch.setattr(reference, "PIECE_BYTES", 2 * 2 * 4 * 11 * 8)  # two rows
    with Memory() as piece:
        found = attend(query, key, value, **options)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    assert piece.largest < memory.largest


@pytest.mark.compile
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_without_a_break_for_any_length(impl) -> None:
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, m in ((5, 7), (8, 11)):
        q, k, v = draw(2, 4, 2, n, m, 8, 6, dtype=torch.float32)
        for options in ({"causal": True}, {"mask": torch.rand(2, 1, n, m) > 0.5}):
            torch.testing.assert_close(
                compiled(q, k, v, impl=impl, **options), attend(q, k, v, impl=impl, **options)
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "mask", "causal", "bias", "all"])
@pytest.mark.parametrize("impl", ["sdpa", "flex", "reference"])
def test_every_backend_on_cuda(impl, kind, dtype) -> None:
    tensors = [x.cuda().requires_grad_() for x in draw(2, 4, 2, 70, 133, 32, 32, dtype=dtype)]
    options = {
        name: x.cuda() if isinstance(x, Tensor) else x
        for name, x in cast(kinds(kind, 2, 4, 70, 133), dtype).items()
    }
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = attend(*wide, impl="reference", **cast(options, torch.float64))
    eager = attend(*tensors, impl="reference", **options)
    out = attend(*tensors, impl=impl, **options)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(out.double().square().sum(), tensors),
        torch.autograd.grad(eager.double().square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bias_beyond_half_precision_picks_its_key(impl: str, dtype: torch.dtype) -> None:
    query, key, value = draw(1, 2, 2, 3, 5, 8, 8, dtype=dtype)
    bias = torch.zeros(3, 5)
    bias[:, 2] = 3.4e38
    found = attend(query, key, value, bias=bias, impl=impl)
    torch.testing.assert_close(found, value[:, :, 2:3].expand_as(found))
