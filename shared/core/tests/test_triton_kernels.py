"""Our Triton kernels in Triton's interpreter, on the CPU, against the same operation in torch."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from heed_core.kernels import (
    chunk_scan,
    chunk_scan_triton,
    gather_attention,
    gather_attention_triton,
    neighborhood,
    neighborhood_triton,
    pair_softmax,
    pair_softmax_triton,
)

LEAST_SHARED = 99 * 1024
"""Bytes of shared memory that a program may have on any GPU of compute capability 8."""

CHUNK_SCAN = """
    from heed_core.attention.delta_rule import delta_rule, gated_delta_rule
    from heed_core.attention.linear import linear_attention

    for length, d, e, chunk in ((1, 3, 5, None), (20, 20, 70, 12)):
        query, key = torch.randn(1, 2, length, d), torch.randn(1, 2, length, d)
        key = key / key.norm(dim=-1, keepdim=True)
        value, beta = torch.randn(1, 2, length, e), torch.rand(1, 2, length)
        whole, each = -torch.rand(1, 2, length), -torch.rand(1, 2, length, d)
        state = torch.randn(1, 2, d, e)
        leaves = [x.requires_grad_() for x in (query, key, value, beta, whole, each, state)]

        def run(form, **options):
            size = {"chunk": chunk} if form == "chunked" else {}
            options = {"form": form, **size, **options}
            return [
                *linear_attention(query, key, value, state=state, causal=True, **options),
                *linear_attention(query, key, value, log_decay=whole, causal=True, **options),
                *linear_attention(query, key, value, log_decay=each, causal=True, **options),
                *delta_rule(query, key, value, beta, state=state, **options),
                *gated_delta_rule(query, key, value, beta, whole, state=state, **options),
                *gated_delta_rule(query, key, value, beta, each, **options),
            ]

        same(run("chunked", impl="triton"), run("recurrent"), leaves, ("scan", length))
"""

NEIGHBOURS = """
    from heed_core.attention.context_mixing import neighborhood_av

    for height, width, kernel, channels in ((3, 35, 3, 5), (1, 2, 1, 3)):
        weights = torch.randn(1, 2, height, width, kernel**2).requires_grad_()
        value = torch.randn(1, 2, height, width, channels).requires_grad_()
        ours, wanted = (
            neighborhood_av(weights, value, kernel=kernel, impl=impl)
            for impl in ("triton", "torch")
        )
        same([ours], [wanted], [weights, value], ("neighbours", height, width))
"""

GATHERED = """
    from heed_core.kernels.gather_attention import gather_attention

    for heads, groups, blocks, size, keys, slots in ((2, 1, 1, 1, 3, 2), (2, 2, 2, 17, 21, 19)):
        query = torch.randn(1, heads, blocks, size, 6).requires_grad_()
        key = torch.randn(1, groups, keys, 6).requires_grad_()
        value = torch.randn(1, groups, keys, 5).requires_grad_()
        bias = torch.randn(1, groups, keys).requires_grad_()
        for shared in (True, False):
            index = torch.randint(0, keys, (1, 1 if shared else groups, blocks, slots))
            kept = torch.rand(1, 1 if shared else groups, blocks, size, slots) > 0.4
            kept[:, :, 0, 0] = False
            options = {} if shared and size == 1 else {"kept": kept, "bias": bias}
            leaves = [query, key, value, *([bias] if options else [])]
            ours, wanted = (
                gather_attention(query, key, value, index, impl=impl, **options)
                for impl in ("triton", "torch")
            )
            same([ours], [wanted], leaves, ("gathered", heads, shared))
"""

PAIRS = """
    from heed_core.attention.tensor import tensor_attention

    for n, n1, n2, d, e in ((1, 1, 2, 3, 2), (2, 34, 5, 4, 3)):
        rows = [
            torch.randn(1, 1, count, width).requires_grad_()
            for count, width in ((n, d), (n1, d), (n2, d), (n1, e), (n2, e))
        ]
        mask1 = torch.rand(1, 1, n, n1) > 0.3
        mask2 = torch.rand(1, 1, n2) > 0.3
        mask1[:, :, 0] = False
        for options in (
            {},
            {"mask1": mask1, "mask2": mask2, "distinct": True},
            {"causal": True, "mask2": mask2},
        ):
            ours, wanted = (
                tensor_attention(*rows, impl=impl, **options) for impl in ("triton", "torch")
            )
            same([ours], [wanted], rows, ("pairs", n, *options))
"""

FRAME = """
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)

    def same(ours, wanted, leaves, where):
        def with_gradients(found):
            loss = sum((x.sin() * (i + 1)).sum() for i, x in enumerate(found))
            return [*found, *torch.autograd.grad(loss, leaves)]

        for one, other in zip(with_gradients(ours), with_gradients(wanted), strict=True):
            scale = max(1.0, float(other.detach().abs().max()))
            error = float((one - other).detach().abs().max()) / scale
            assert error < 1e-5, (where, error)
"""


PARTS = (CHUNK_SCAN, NEIGHBOURS, GATHERED, PAIRS)


def run(device: str, **environment: str) -> None:
    """In a process of its own: Triton settles on import whether it interprets."""
    put = f'torch.set_default_device("{device}")'
    script = [textwrap.dedent(part) for part in (FRAME, put, *PARTS, 'print("equal")')]
    finished = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.strip() == "equal", finished.stderr[-2000:]


def test_kernels_give_what_torch_gives() -> None:
    run("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_give_what_torch_gives() -> None:
    run("cuda")


KINDS = {torch.float32: "*fp32", torch.int64: "*i64", torch.bool: "*i1"}


class Compiled:
    """Stands for a kernel: compiles it for a GPU with what it would be launched with."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel, self.shared = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *given: object, **options: object) -> None:
        names = self.kernel.arg_names
        constants = {name: options.pop(name) for name in names if name in options}
        signature = dict.fromkeys(names, "constexpr")
        for name, value in zip(names, given, strict=False):
            plain = "fp32" if isinstance(value, float) else "i32"
            signature[name] = KINDS[value.dtype] if isinstance(value, Tensor) else plain
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=places)
        found = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        assert "cubin" in found.asm
        self.shared.append(found.metadata.shared)


@pytest.mark.slow
def test_kernels_compile_and_fit_on_a_gpu(monkeypatch, tmp_path) -> None:
    """Without one: machine code of capability 8.0 for the largest sizes that our code launches."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = []
    for module in (gather_attention_triton, neighborhood_triton, pair_softmax_triton):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernels.append(Compiled(getattr(module, name)))
            monkeypatch.setattr(module, name, kernels[-1])
    kernels.append(Compiled(chunk_scan_triton.scan_kernel))
    monkeypatch.setattr(chunk_scan, "_kernel", lambda: kernels[-1])

    t, d = chunk_scan.MOST_TOKENS, chunk_scan.MOST_CHANNELS
    rows = [torch.zeros(1, 1, 1, t, width) for width in (d, d, t, d, d)]
    start = torch.zeros(1, 1, d, d)
    chunk_scan._launch(chunk_scan._Chunks(*rows, torch.zeros(1, 1, 1, d), start))

    weights = torch.zeros(1, 1, 9, 40, 9)
    value = torch.zeros(1, 1, 9, 40, neighborhood.MOST_CHANNELS)
    neighborhood_triton.launch_sum(weights, value, 3)
    neighborhood_triton.launch_backward(value, weights, value, 3)

    d = gather_attention.MOST_CHANNELS
    query, key = torch.zeros(1, 2, 3, 64, d), torch.zeros(1, 1, 90, d)
    index = torch.zeros(1, 1, 3, 40, dtype=torch.int64)
    given = query, key, key, index, torch.zeros(1, 1, 3, 64, 40, dtype=torch.bool), key[..., 0], 0.1
    output, sums = gather_attention_triton.launch_forward(*given)
    gather_attention_triton.launch_backward(output, output, sums, *given)

    row, mask = (
        torch.zeros(1, 2, 40, pair_softmax.MOST_CHANNELS),
        torch.zeros(1, 1, 1, 40, dtype=torch.bool),
    )
    triples = *[row] * 5, mask, mask, True, True, 0.1
    output, sums = pair_softmax_triton.launch_forward(*triples)
    pair_softmax_triton.launch_backward(output, output, sums, *triples)

    assert len(kernels) == 8
    for kernel in kernels:
        assert kernel.shared, kernel.kernel.__name__
        assert max(kernel.shared) <= LEAST_SHARED, (kernel.kernel.__name__, kernel.shared)
