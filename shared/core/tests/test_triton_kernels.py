"""Our Triton kernels in Triton's interpreter, on the CPU, against the same operation in torch."""

import os
import subprocess
import sys
import textwrap

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


def test_kernels_give_what_torch_gives() -> None:
    """In a process of its own: Triton settles on import whether it interprets."""
    parts = [FRAME, CHUNK_SCAN, NEIGHBOURS, GATHERED, PAIRS, 'print("equal")']
    finished = subprocess.run(
        [sys.executable, "-c", "\n".join(textwrap.dedent(part) for part in parts)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.strip() == "equal", finished.stderr[-2000:]
