"""A linear recurrence of matrices: S_c = A_c S_(c-1) + U_c.

The states of linear attention and of the delta rules between chunks of tokens. Its length is the
number of chunks, so that a loop over it is short; as an operator of its own, it keeps that loop out
of compiled and exported graphs, whose sequence length then stays dynamic.

The gradient is the same recurrence run backwards. Time and memory for c chunks: c d^2 e (c d e with
a diagonal A), c d e.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "heed::state_scan",
    mutates_args=(),
    schema="(Tensor carry, Tensor update, Tensor start) -> Tensor",
)
def state_scan(carry: Tensor, update: Tensor, start: Tensor) -> Tensor:
    """All states, the first included.

    Args:
        carry: A, (b, h, c, d, d), or its diagonal (b, h, c, d, 1).
        update: U, (b, h, c, d, e).
        start: The state before the first step, (b, h, d, e).

    Returns:
        (b, h, c + 1, d, e): state i is the one before step i.
    """
    states = [start]
    diagonal = carry.shape[-1] == 1
    for step in range(update.shape[2]):
        left, last = carry[:, :, step], states[-1]
        states.append((left * last if diagonal else left @ last) + update[:, :, step])
    return torch.stack(states, dim=2)


@state_scan.register_fake
def _(carry: Tensor, update: Tensor, start: Tensor) -> Tensor:
    batch, heads, steps, rows, columns = update.shape
    return update.new_empty(batch, heads, steps + 1, rows, columns)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    carry, states = ctx.saved_tensors
    diagonal = carry.shape[-1] == 1
    back = carry if diagonal else carry.mT
    flipped = state_scan(back.flip(2), grad[:, :, :-1].flip(2), grad[:, :, -1].contiguous())
    total = flipped.flip(2)  # of each state, with what it does to the later ones
    after, before = total[:, :, 1:], states[:, :, :-1]
    to_carry = (after * before).sum(-1, keepdim=True) if diagonal else after @ before.mT
    return to_carry, after, total[:, :, 0]


state_scan.register_autograd(_backward, setup_context=_remember)
