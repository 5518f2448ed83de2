"""What is left of a chunked recurrence when all products within chunks are done, in one kernel.

    U_c = E_c - R_c S_c,    O_c = W_c U_c + Q_c S_c,    S_(c+1) = diag(a_c) S_c + L_c^T U_c

Linear attention has R = 0 and E = V; of the delta rules E and R are the solved system, see
`attention.delta_rule`. `kernels.state_scan` carries the states first and reads them afterwards;
here a state stays on the chip while its chunk is read, and no d x d matrix is made.

The forward pass is a Triton kernel, float32 in all sums; the backward pass is `state_scan` run
backwards. Time for c chunks of s tokens: c s (d + s) e; memory: the states, c d e. On the CPU the
operator runs its plain torch reference, so that programs can be exported and checked there. The
kernel was compared with the reference in Triton's interpreter; it was not timed on a GPU yet, so
that it runs only when asked for by name.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heed_core.kernels.state_scan import state_scan
from heed_core.kernels.triton_calls import (
    INTERPRETED,
    KernelImpl,
    takes_triton,
    why_not_triton,
)

MOST_CHANNELS = 128
"""Of keys: states and products of so many rows still fit on any chip."""

MOST_TOKENS = 128
"""Of a chunk."""

_SCHEMA = (
    "(Tensor query, Tensor left, Tensor within, Tensor errors, Tensor? reads, Tensor end, "
    "Tensor start) -> (Tensor, Tensor)"
)


def why_not(device: str, dtype: torch.dtype, *, key_dim: int, chunk: int) -> str | None:
    """Why the kernel cannot run a call; None if it can."""
    if (reason := why_not_triton(device, dtype)) is not None:
        return reason
    if key_dim > MOST_CHANNELS:
        return f"keys have {key_dim} channels, more than {MOST_CHANNELS}"
    if chunk > MOST_TOKENS:
        return f"chunks have {chunk} tokens, more than {MOST_TOKENS}"
    return None


def wants_triton(
    impl: KernelImpl, device: str, dtype: torch.dtype, *, key_dim: int, chunk: int
) -> bool:
    """Whether a call runs on the kernel.

    Raises:
        ValueError: `impl` is no name.
        UnsupportedBackend: The kernel was asked for and cannot run the call.
    """
    return takes_triton(impl, lambda: why_not(device, dtype, key_dim=key_dim, chunk=chunk))


class _Chunks(NamedTuple):
    """The arguments of the operator."""

    query: Tensor
    left: Tensor
    within: Tensor
    errors: Tensor
    reads: Tensor | None
    end: Tensor
    start: Tensor


@torch.library.custom_op("heed::chunk_scan", mutates_args=(), schema=_SCHEMA)
def chunk_scan(
    query: Tensor,
    left: Tensor,
    within: Tensor,
    errors: Tensor,
    reads: Tensor | None,
    end: Tensor,
    start: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, c, s, e) and all states (b, h, c + 1, d, e), the first included.

    Args:
        query: Q, decayed to the chunk's start, (b, h, c, s, d).
        left: L, keys decayed to the chunk's end, (b, h, c, s, d).
        within: W, (b, h, c, s, s).
        errors: E, (b, h, c, s, e).
        reads: R, (b, h, c, s, d); None is zero.
        end: a, what is left of the state at a chunk's end, (b, h, c, d) or (b, h, c, 1).
        start: The state before the first chunk, (b, h, d, e).
    """
    given = _Chunks(query, left, within, errors, reads, end, start)
    if query.is_cuda or INTERPRETED:
        return _launch(given)
    return _written_out(given)


def _written_out(given: _Chunks) -> tuple[Tensor, Tensor]:
    """The formula, chunk by chunk."""
    query, left, within, errors, reads, end, start = given
    outputs, states = [errors[:, :, :0]], [start]
    for c in range(query.shape[2]):
        last = states[-1]
        found = errors[:, :, c] if reads is None else errors[:, :, c] - reads[:, :, c] @ last
        outputs.append((within[:, :, c] @ found + query[:, :, c] @ last).unsqueeze(2))
        states.append(end[:, :, c, :, None] * last + left[:, :, c].mT @ found)
    return torch.cat(outputs, dim=2), torch.stack(states, dim=2)


@chunk_scan.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    chunks = _Chunks(*given)
    batch, heads, count, _, width = chunks.errors.shape
    rows = chunks.query.shape[-1]
    states = chunks.start.new_empty(batch, heads, count + 1, rows, width)
    return chunks.errors.new_empty(chunks.errors.shape), states


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, grad: Tensor, grad_states: Tensor) -> tuple[Tensor | None, ...]:
    query, left, within, errors, reads, end, states = ctx.saved_tensors
    before = states[:, :, :-1]
    found = errors if reads is None else errors - reads @ before
    to_found = within.mT @ grad  # by the outputs; the states' part comes below
    update = query.mT @ grad + grad_states[:, :, :-1]
    if reads is None:
        carry = end[..., None]
    else:
        update = update - reads.mT @ to_found
        size = query.shape[-1]
        kept = end.expand(*end.shape[:-1], size).diag_embed()
        carry = kept - reads.mT @ left
    flipped = state_scan(carry.flip(2), update.flip(2), grad_states[:, :, -1].contiguous())
    total = flipped.flip(2)  # of each state, with what it does to the later ones
    after = total[:, :, 1:]
    to_errors = to_found + left @ after
    to_end = (after * before).sum(-1)
    if end.shape[-1] == 1:
        to_end = to_end.sum(-1, keepdim=True)
    return (
        grad @ before.mT,
        found @ after.mT,
        grad @ found.mT,
        to_errors,
        None if reads is None else -to_errors @ before.mT,
        to_end,
        total[:, :, 0],
    )


chunk_scan.register_autograd(_backward, setup_context=_remember)


def _launch(given: _Chunks) -> tuple[Tensor, Tensor]:
    """Run the kernel: a program for each head and block of value channels."""
    import triton  # type: ignore[import-untyped]

    query, left, within, errors, reads, end, start = given
    batch, heads, chunks, size, width = errors.shape
    rows = query.shape[-1]
    output = errors.new_empty(errors.shape)
    states = start.new_empty(batch, heads, chunks + 1, rows, width)
    if not output.numel() and not states.numel():
        return output, states
    tall = max(16, triton.next_power_of_2(rows))
    block = min(max(16, 4096 // tall), 64, max(16, triton.next_power_of_2(width)))
    dense = [x.contiguous() for x in (query, left, within, errors)]
    _kernel()[(batch * heads, triton.cdiv(width, block))](
        *dense,
        dense[0] if reads is None else reads.contiguous(),
        end.contiguous(),
        start.contiguous(),
        output,
        states,
        chunks,
        size,
        rows,
        width,
        HAS_READS=reads is not None,
        BY_CHANNEL=end.shape[-1] > 1,
        TOKENS=max(16, triton.next_power_of_2(size)),
        ROWS=tall,
        COLUMNS=block,
        num_stages=1,  # several chunks at once would not fit on every chip
    )
    return output, states


@functools.cache
def _kernel() -> Any:
    """The kernel; Triton is imported when it is used."""
    from heed_core.kernels.chunk_scan_triton import scan_kernel

    return scan_kernel
