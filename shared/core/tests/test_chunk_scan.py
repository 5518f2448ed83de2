"""The chunk scan: its operator on the CPU. Its kernel: `test_triton_kernels.py`."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heed_core.attention.delta_rule import DeltaRuleAttention, delta_rule, gated_delta_rule
from heed_core.attention.linear import LinearAttention, linear_attention
from heed_core.dispatch import UnsupportedBackend
from heed_core.kernels.chunk_scan import chunk_scan, why_not


def draw(chunks: int, *, reads: bool, by_channel: bool) -> tuple[Tensor | None, ...]:
    shapes = {
        "query": (5, 3), "left": (5, 3), "within": (5, 5), "errors": (5, 4), "reads": (5, 3)
    }  # fmt: skip
    rows = {
        name: torch.randn(2, 2, chunks, *shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }
    end = torch.rand(2, 2, chunks, 3 if by_channel else 1, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    if not reads:
        rows["reads"] = None
    return (*rows.values(), end, start)


@pytest.mark.parametrize(
    ("chunks", "reads", "by_channel"),
    [(2, True, False), (2, True, True), (2, False, True), (2, False, False), (0, True, False)],
)
def test_the_operator_is_a_good_one(chunks: int, reads: bool, by_channel: bool) -> None:
    rows = draw(chunks, reads=reads, by_channel=by_channel)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunk_scan, rows, test_utils=utils)  # compile has a test of its own
    torch.autograd.gradcheck(chunk_scan, rows, fast_mode=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_compiled_kernel_gives_what_torch_gives() -> None:
    query, key, value = (torch.randn(2, 4, 300, 64, device="cuda") for _ in range(3))
    key = key / key.norm(dim=-1, keepdim=True)
    beta, decay = torch.rand(2, 4, 300, device="cuda"), -torch.rand(2, 4, 300, device="cuda")
    ours = gated_delta_rule(query, key, value, beta, decay, impl="triton")
    wanted = gated_delta_rule(query, key, value, beta, decay, impl="torch")
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.compile
def test_the_operator_compiles_and_exports() -> None:
    class Scan(torch.nn.Module):
        def forward(self, *rows: Tensor) -> Tensor:
            return chunk_scan(*rows)[0].sin()

    rows = draw(2, reads=True, by_channel=False)
    wanted = Scan()(*rows)
    torch.testing.assert_close(torch.compile(Scan(), fullgraph=True)(*rows), wanted)
    exported = torch.export.export(Scan(), tuple(x.detach() for x in rows)).module()
    torch.testing.assert_close(exported(*(x.detach() for x in rows)), wanted)


@pytest.mark.bad_input
def test_an_explicit_choice_never_falls_back() -> None:
    query = torch.randn(1, 1, 4, 3)
    beta = torch.rand(1, 1, 4)
    with pytest.raises(UnsupportedBackend, match="Triton needs a CUDA device"):
        delta_rule(query, query, query, beta, impl="triton")
    with pytest.raises(ValueError, match="impl must be one of"):
        delta_rule(query, query, query, beta, impl="cuda")
    with pytest.raises(ValueError, match="needs form='chunked'"):
        delta_rule(query, query, query, beta, form="recurrent", impl="triton")
    with pytest.raises(ValueError, match="causal=True"):
        linear_attention(query, query, query, impl="triton")
    assert "float64" in str(why_not("cuda", torch.float64, key_dim=8, chunk=64))
    assert "300 channels" in str(why_not("cuda", torch.float32, key_dim=300, chunk=64))
    assert "256 tokens" in str(why_not("cuda", torch.float32, key_dim=64, chunk=256))
    assert why_not("cuda", torch.float32, key_dim=64, chunk=64) is None


@pytest.mark.bad_input
@pytest.mark.parametrize("build", [partial(LinearAttention, causal=True), DeltaRuleAttention])
def test_modules_reach_the_kernel(build) -> None:
    x = torch.randn(1, 4, 8)
    assert torch.equal(*(build_alike(build, impl)(x) for impl in ("auto", "torch")))
    with pytest.raises(UnsupportedBackend, match="Triton needs a CUDA device"):
        build_alike(build, "triton")(x)
    with pytest.raises(ValueError, match="impl must be one of"):
        build(8, heads=2, impl="cuda")
    with pytest.raises(ValueError, match="needs form='chunked'"):
        build(8, heads=2, impl="triton", form="recurrent")


def build_alike(build, impl: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return build(8, heads=2, impl=impl)


class Written(TorchDispatchMode):
    """Counts the numbers that operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers += out.numel() if isinstance(out, Tensor) else 0
        return out


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_the_gradient_costs_as_much_for_each_token_of_a_longer_sequence(form: str) -> None:
    costs = []
    for length in (128, 512):
        query, key, value = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3))
        loss = delta_rule(query, key, value, torch.rand(1, 1, length), form=form)[0].sum()
        with Written() as written:
            loss.backward()
        costs.append(written.numbers)
    assert costs[1] < 4.4 * costs[0]  # four times the tokens; 16 times if it were their square
