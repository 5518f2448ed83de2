"""The shipped edits: their identities, their gradients, and loops that do the same."""

import pytest
import torch
from torch import Tensor

from heed_core import Attend, observe, steer
from heed_core.attachments import AttendCall
from heed_core.edits import (
    attention_mass,
    emphasise_tokens,
    gate_heads,
    prune_heads,
    redistribute,
    reinforce_heads,
    scale_heads,
    sink_value,
)

B, H, G, N, M, D = 3, 4, 2, 5, 7, 6


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(B, H, N, D, dtype=torch.float64),
        torch.randn(B, G, M, D, dtype=torch.float64),
        torch.randn(B, G, M, D, dtype=torch.float64),
    )


def edited_weights(edit, qkv, *, at: str = "weights", causal: bool = False) -> Tensor:
    site = Attend(causal=causal)
    with steer(site, edit, at=at), observe(site) as record:
        site(*qkv)
    return record[""]


def own_call(qkv) -> AttendCall:
    query, key, value = qkv
    return AttendCall(
        scale=1.0, mask=None, causal=False, q_offset=M - N, query=query, key=key, value=value
    )


def plain_weights(qkv, *, causal: bool = False) -> Tensor:
    return edited_weights(lambda w, call: w, qkv, causal=causal)


def test_gates_of_one_change_no_bit_and_gates_of_zero_remove(qkv) -> None:
    site = Attend()
    plain = site(*qkv)
    with steer(site, gate_heads(torch.ones(H)), at="output"):
        assert torch.equal(site(*qkv), plain)
    gates = torch.tensor([[1.0, 0.0, 2.0, 1.0]] * B)
    for at in ("weights", "output"):
        with steer(site, gate_heads(gates), at=at):
            out = site(*qkv)
        torch.testing.assert_close(out, plain * gates[..., None, None])


def test_gates_are_differentiable(qkv) -> None:
    site, gates = Attend(), torch.ones(H, dtype=torch.float64, requires_grad=True)
    with steer(site, gate_heads(gates), at="output"):
        out = site(*qkv)
    out.square().sum().backward()
    torch.testing.assert_close(gates.grad, 2 * site(*qkv).square().sum(dim=(0, 2, 3)))


def test_scaled_scores_are_a_temperature(qkv) -> None:
    factors = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    found = edited_weights(scale_heads(factors), qkv, at="scores", causal=True)
    raw = plain_weights(qkv, causal=True)
    expected = (raw.log() * factors[:, None, None]).masked_fill(raw == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, expected)


def test_prune_and_reinforce_touch_only_their_heads(qkv) -> None:
    raw = plain_weights(qkv)
    pruned = edited_weights(prune_heads([0, -1]), qkv)
    assert bool((pruned[:, [0, 3]] == 0).all())
    assert torch.equal(pruned[:, 1:3], raw[:, 1:3])
    doubled = edited_weights(reinforce_heads([1], 2.0), qkv)
    assert torch.equal(doubled[:, 1], raw[:, 1] * 2)
    assert torch.equal(doubled[:, [0, 2, 3]], raw[:, [0, 2, 3]])
    with pytest.raises(ValueError, match=r"heads=\[4\] are out of range"):
        edited_weights(prune_heads([4]), qkv)


def test_emphasis_of_tokens(qkv) -> None:
    raw, chosen = plain_weights(qkv), torch.arange(M) < 2
    free = edited_weights(emphasise_tokens(chosen, 3.0, renormalise=False), qkv)
    torch.testing.assert_close(free, torch.where(chosen, raw * 3, raw))
    kept = edited_weights(emphasise_tokens(chosen.expand(B, M), 3.0, rows=[-1, 0]), qkv)
    torch.testing.assert_close(kept.sum(-1), torch.ones(B, H, N, dtype=torch.float64))
    torch.testing.assert_close(
        kept[:, :, [0, -1]], (free / free.sum(-1, keepdim=True))[:, :, [0, -1]]
    )
    assert torch.equal(kept[:, :, 1:-1], raw[:, :, 1:-1])
    nothing = edited_weights(emphasise_tokens(torch.ones(M) > 0, 0.0), qkv)
    assert bool((nothing == 0).all())


def loops(raw: Tensor, donors: Tensor, receivers: Tensor, part: float, rows: range) -> Tensor:
    result = raw.clone()
    for b in range(B):
        giving = [j for j in range(M) if donors[b, j]]
        taking = [j for j in range(M) if receivers[b, j] and not donors[b, j]]
        for h in range(H):
            for i in rows:
                held = sum(float(raw[b, h, i, j]) for j in taking)
                if held == 0:
                    continue
                moved = part * sum(float(raw[b, h, i, j]) for j in giving)
                for j in giving:
                    result[b, h, i, j] = (1 - part) * raw[b, h, i, j]
                for j in taking:
                    result[b, h, i, j] = raw[b, h, i, j] * (1 + moved / held)
    return result


@pytest.mark.parametrize("causal", [False, True])
def test_redistribution_equals_loops_and_keeps_row_sums(qkv, causal) -> None:
    donors = torch.tensor([[1, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]) > 0
    receivers = (
        torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]) > 0
    )
    raw = plain_weights(qkv, causal=causal)
    found = edited_weights(
        redistribute(donors, receivers, 0.6, rows=slice(1, None)), qkv, causal=causal
    )
    torch.testing.assert_close(found, loops(raw, donors, receivers, 0.6, range(1, N)))
    torch.testing.assert_close(found.sum(-1), raw.sum(-1))
    assert torch.equal(found[0, :, :, [1, 5, 6]], raw[0, :, :, [1, 5, 6]]), "others are not touched"
    assert torch.equal(found[1:], raw[1:]), "no donors, or no receivers: nothing moves"
    assert not torch.equal(found[0], raw[0])
    same = edited_weights(redistribute(donors, receivers, 0.0), qkv, causal=causal)
    assert torch.equal(same, raw)


def test_redistribution_where_a_condition_holds(qkv) -> None:
    donors, receivers = torch.arange(M) == 0, torch.arange(M) > 3
    raw, where = plain_weights(qkv), torch.rand(B, H, N) > 0.5
    found = edited_weights(redistribute(donors, receivers, 1.0, where=where), qkv)
    assert bool((found[..., 0][where] == 0).all())
    assert torch.equal(found[~where], raw[~where])


def test_redistribution_has_gradients(qkv) -> None:
    donors, receivers = torch.arange(M) == 0, torch.arange(M) > 3
    part = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    raw = plain_weights(qkv).requires_grad_()

    def moved(weights: Tensor, part: Tensor) -> Tensor:
        return redistribute(donors, receivers, part)(weights, own_call(qkv))

    assert torch.autograd.gradcheck(moved, (raw[:1, :1].detach().requires_grad_(), part))
    empty = torch.zeros(1, 1, 2, M, dtype=torch.float64, requires_grad=True)
    moved(empty, part).sum().backward()
    assert bool(empty.grad.isfinite().all())


def test_attention_mass(qkv) -> None:
    weights, chosen = plain_weights(qkv), torch.rand(B, M) > 0.5
    found = attention_mass(weights, chosen)
    for b in range(B):
        torch.testing.assert_close(found[b], weights[b][..., chosen[b]].sum(-1))
    assert torch.equal(attention_mass(weights, chosen[0])[0], found[0])


def test_sink_value() -> None:
    x = torch.zeros(3, 8, dtype=torch.float64)
    x[0, 5] = -300.0  # all energy in one channel: the bound sqrt(d)
    x[1] = 1.0
    found = sink_value(x, [2, 5], eps=0.0)[:2]
    torch.testing.assert_close(found, torch.tensor([8**0.5, 1.0], dtype=torch.float64))
    assert float(sink_value(x, [2])[2]) == 0.0
    torch.testing.assert_close(sink_value(x * 7, [5], eps=0.0)[:2], sink_value(x, [5], eps=0.0)[:2])
    assert sink_value(x.half(), [5]).dtype == torch.float32
    for dims in ([], [8], [-1]):
        with pytest.raises(ValueError, match="dims must name channels below 8"):
            sink_value(x, dims)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gate_heads(torch.ones(H + 1)), ValueError, r"gates must be \(4,\), \(3, 4\) or"),
        pytest.param(
            lambda: gate_heads(torch.ones(())),
            ValueError,
            "gates must be",
            marks=pytest.mark.bad_input,
        ),
        (lambda: scale_heads(torch.ones(2, H)), ValueError, "factors must be"),
        pytest.param(
            lambda: emphasise_tokens(torch.ones(M), 2.0),
            TypeError,
            "key_mask must be boolean",
            marks=pytest.mark.bad_input,
        ),
        (lambda: emphasise_tokens(torch.ones(M + 1) > 0, 2.0), ValueError, "key_mask must be"),
        (lambda: redistribute(torch.ones(M) > 0, torch.ones(M) > 0, 1.5), ValueError, "fraction"),
        (lambda: redistribute(torch.ones(2, M) > 0, torch.ones(M) > 0, 0.5), ValueError, "donors"),
    ],
)
def test_bad_arguments_are_named(qkv, make, error, message) -> None:
    with pytest.raises(error, match=message):
        edited_weights(make(), qkv)
