"""Attention of blocks to gathered keys: the formula, the operator, memory, bad input."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heed_core.attention.context_mixing import neighborhood_av
from heed_core.attention.tensor import tensor_attention
from heed_core.dispatch import UnsupportedBackend
from heed_core.kernels.gather_attention import (
    gather_attention,
    gathered_softmax,
    gathered_softmax_backward,
    why_not,
)
from heed_core.kernels.neighborhood import why_not as why_not_neighbours
from heed_core.kernels.neighborhood import window_sum, window_sum_backward
from heed_core.kernels.pair_softmax import pair_softmax, pair_softmax_backward
from heed_core.kernels.pair_softmax import why_not as why_not_pairs

UTILS = ("test_schema", "test_autograd_registration", "test_faketensor")


def draw(**sizes: int) -> dict[str, Tensor]:
    size = {"heads": 4, "groups": 2, "blocks": 3, "tokens": 2, "keys": 7, "slots": 4} | sizes
    groups, slots = size["groups"], size["slots"]
    rows = {
        "query": torch.randn(2, size["heads"], size["blocks"], size["tokens"], 3),
        "key": torch.randn(2, groups, size["keys"], 3),
        "value": torch.randn(2, groups, size["keys"], 5),
        "bias": torch.randn(2, groups, size["keys"]),
    }
    rows = {name: x.double().requires_grad_() for name, x in rows.items()}
    kept = torch.rand(2, 1, size["blocks"], size["tokens"], slots) > 0.3
    kept[0, 0, :1, 0] = False
    index = torch.randint(0, size["keys"], (2, groups, size["blocks"], slots))
    return {**rows, "kept": kept, "index": index}


def by_formula(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, kept: Tensor, bias: Tensor
) -> Tensor:
    """One query at a time."""
    output = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            g = h * key.shape[1] // query.shape[1]
            for block in range(query.shape[2]):
                where = index[b, min(g, index.shape[1] - 1), block]
                for t in range(query.shape[3]):
                    scores = key[b, g, where] @ query[b, h, block, t] * 3**-0.5
                    scores = scores + bias[b, g, where]
                    may = kept[b, 0, block, t]  # the softmax of no score at all has the sum 0
                    output.append(scores[may].softmax(0) @ value[b, g, where[may]])
    return torch.stack(output).reshape(*query.shape[:4], -1)


def test_it_is_softmax_over_the_named_keys() -> None:
    given = draw()
    leaves = [given[name] for name in ("query", "key", "value", "bias")]
    found, wanted = gather_attention(**given), by_formula(**given)
    torch.testing.assert_close(found, wanted)
    assert not bool(found[0, :, 0, 0].any())  # it keeps nothing
    probe = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad((found * probe).sum(), leaves),
        torch.autograd.grad((wanted * probe).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_without_options_all_slots_count_once_each() -> None:
    given = draw()
    given["index"] = given["index"][:, :1]
    found = gather_attention(*(given[name] for name in ("query", "key", "value", "index")))
    everything = torch.ones_like(given["kept"])
    wanted = by_formula(**{**given, "kept": everything, "bias": torch.zeros_like(given["bias"])})
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("blocks", [0, 2])
def test_the_operators_are_good_ones(blocks: int) -> None:
    given = draw(blocks=blocks, tokens=1, keys=3, slots=2)
    rows = [given[name] for name in ("query", "key", "value", "index", "kept", "bias")]
    torch.library.opcheck(gathered_softmax, (*rows, 0.5, False), test_utils=UTILS)
    torch.autograd.gradcheck(
        lambda q, k, v, b: gathered_softmax(q, k, v, *rows[3:5], b, 0.5, False)[0],
        (*rows[:3], rows[5]),
        fast_mode=True,
    )
    weights = torch.randn(1, 2, 3, 4 * blocks + 3, 9, dtype=torch.float64, requires_grad=True)
    value = torch.randn(*weights.shape[:4], 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(window_sum, (weights, value, 3, False), test_utils=UTILS)
    torch.autograd.gradcheck(lambda w, v: window_sum(w, v, 3, False), (weights, value))


def test_strided_inputs_give_the_layout_that_the_operators_promise() -> None:
    """Heads are usually views of tokens; compiled code relies on the strides of a fake."""

    def heads(*shape: int) -> Tensor:
        return torch.randn(shape).transpose(1, 2).contiguous().transpose(1, 2)

    pairs = *(heads(2, 3, n, 4) for n in (5, 6, 7, 6, 7)), None, None, False, False, 0.5, False
    index = torch.randint(0, 9, (2, 2, 3, 7))
    gathered = heads(2, 4, 3, 5, 6), heads(2, 2, 9, 6), heads(2, 2, 9, 4), index, None, None
    windows = heads(2, 3, 5, 6, 9), heads(2, 3, 5, 6, 4), 3, False
    for forward, backward, given in (
        (pair_softmax, pair_softmax_backward, pairs),
        (gathered_softmax, gathered_softmax_backward, (*gathered, 0.5, False)),
        (window_sum, window_sum_backward, windows),
    ):
        found = forward(*given)
        outputs = found if isinstance(found, tuple) else ()
        grad = heads(*(outputs[0] if outputs else found).shape)
        for op, arguments in ((forward, given), (backward, (grad, *outputs, *given))):
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


class Largest(TorchDispatchMode):
    """The most numbers that one tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_gathered_keys_and_windows_are_never_held_at_once() -> None:
    given = draw(blocks=16, tokens=4, keys=64, slots=32)
    given = {name: x for name, x in given.items() if name not in ("kept", "bias")}
    with Largest() as largest:
        gather_attention(**given).sum().backward()
    inputs = max(given[name].numel() for name in ("query", "value"))
    assert largest.numbers <= 2 * inputs  # all gathered values: 2 * 2 * 16 * 32 * 5, 8 times them
    weights, value = (torch.randn(1, 1, 12, 40, c, requires_grad=True) for c in (25, 16))
    with Largest() as largest:
        window_sum(weights, value, 5, False).sum().backward()
    assert largest.numbers <= 2 * weights.numel()  # all windows: 25 * 16 for each place


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    given = draw()
    for name, wrong, said in (
        ("query", given["query"][0], "query must be"),
        ("key", given["key"][..., :2], "key must be"),
        ("value", given["value"][:, :, 1:], "value must agree"),
        ("index", given["index"][:, :, 1:], "index must be"),
        ("kept", given["kept"][..., 1:], "kept must be"),
        ("bias", given["bias"][:, 1:], "bias must be"),
    ):
        with pytest.raises(ValueError, match=said):
            gather_attention(**{**given, name: wrong})
    with pytest.raises(TypeError, match="kept must be boolean"):
        gather_attention(**{**given, "kept": given["kept"].float()})
    with pytest.raises(TypeError, match="index must hold int64"):
        gather_attention(**{**given, "index": given["index"].int()})
    with pytest.raises(UnsupportedBackend, match="Triton needs a CUDA device"):
        gather_attention(**given, impl="triton")
    with pytest.raises(ValueError, match="impl must be one of"):
        gather_attention(**given, impl="cuda")


def test_kernels_say_what_they_cannot_run() -> None:
    single = torch.float32
    assert why_not("cuda", single, key_dim=64, value_dim=64) is None
    assert "values have 300" in str(why_not("cuda", single, key_dim=64, value_dim=300))
    assert why_not_neighbours("cuda", single, channels=64) is None
    assert "300 channels" in str(why_not_neighbours("cuda", single, channels=300))
    assert why_not_pairs("cuda", single, key_dim=16, value_dim=16) is None
    assert "keys have 200" in str(why_not_pairs("cuda", single, key_dim=200, value_dim=16))
    assert "float64" in str(why_not_pairs("cuda", torch.float64, key_dim=16, value_dim=16))


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_operators_compile_and_export_in_one_graph(backend: str) -> None:
    class All(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
            gathered = gather_attention(query, key, value, index)
            weights = gathered.flatten(2, 3)[:, :, :4, None, :1].expand(-1, -1, 4, 4, 9)
            places = value[:, :, None, :4].expand(-1, -1, 4, -1, -1)
            summed = neighborhood_av(weights, places, kernel=3)
            rows = (key[:, :, :5], key[:, :, :4], key[:, :, 1:6], value[:, :, :4], value[:, :, 1:6])
            return tensor_attention(*rows).sin() + summed.mean()

    given = draw(groups=4)
    rows = [given[name].detach().float() for name in ("query", "key", "value")]
    rows = [*(x.requires_grad_() for x in rows), given["index"]]
    wanted = All()(*rows)
    found = torch.compile(All(), fullgraph=True, backend=backend)(*rows)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found.sum(), rows[:3]),
        torch.autograd.grad(wanted.sum(), rows[:3]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(All(), tuple(x.detach() for x in rows)).module()
    torch.testing.assert_close(exported(*(x.detach() for x in rows)), wanted)
