"""The mixing matrix of any layer that is linear in its values, found by trying unit values.

    Y = M(X) V(X) + c       per head or channel; M (n, m) depends on the input, V maps channels

Softmax, kernel, low-rank and local attention, convolutions, Fourier filters and mixing matrices of
MLPs are all of this form (He and Kabic, "A unified view of long-sequence models", arXiv 2302.06218;
a row normaliser is part of M here). With everything else left as the input makes it, unit values
show M column by column, however the layer computes: what `observe` says of mechanisms without a
softmax can be checked so, and those that say nothing have weights all the same.

Cost: a forward pass per head_dim tokens, or per token where channels mix differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

Per = Literal["head", "channel"]
"""Whether the channels of a head share one matrix, or each has its own."""

RELATIVE_ERROR = 1e-4
"""How far M V + c may be from what the layer computes, against its largest number."""


def mixing_matrix(
    module: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    values: str | None = "value",
    out: str | None = "out",
    per: Per = "head",
    heads: int | None = None,
) -> Float[Tensor, "b h n m"]:
    """How much of each token's values is in each output, for this input.

    Tokens of grids are counted in the order in which the layer holds them, as a rule row-major.

    Args:
        module: A layer, in eval mode if it has dropout.
        inputs: What it is called with: one tensor, or arguments by name.
        values: The sub-module that makes values (b, *tokens, channels); None if the first input
            is what is mixed, and nothing else depends on it.
        out: The sub-module that takes what was mixed (b, *tokens, channels); None if the module
            returns it.
        per: "channel" gives a matrix for each channel that was mixed (h = channels).
        heads: Of what was mixed; `module.heads` if not given. Unused per channel.

    Returns:
        M, without gradient. Rows sum to 1 where the layer averages.

    Raises:
        ValueError: No such sub-module, or one that was not called just once; heads that do not
            divide the channels; or a layer that is not linear in its values so: they also choose
            what is mixed (`DynamicMaskAttention`), something random or a non-linear function is
            between, or channels of a head mix differently (`per="channel"` may do).

    Example:
        >>> from heed_core.attention.linear import LinearAttention
        >>> mixing_matrix(LinearAttention(16, heads=2).eval(), torch.randn(1, 5, 16)).shape
        torch.Size([1, 2, 5, 5])
    """
    if per not in get_args(Per):
        raise ValueError(f"per must be one of {get_args(Per)}, got {per!r}")
    run = _Run(module, inputs, values, out)
    with torch.no_grad():
        real, mixed = run.once(None)
        channels, held = mixed.shape[-1], real.shape[-1]
        # Values of fewer channels are those of fewer heads.
        shared = per == "channel" and held == channels
        width = 1 if shared else channels // _heads(module, heads, channels)
        if held % width or channels % held:
            raise ValueError(
                f"values of {held} channels must be heads that serve those of {channels} mixed "
                f"channels, {width} each: give heads"
            )
        tokens = real[0, ..., 0].numel()
        nothing = run.once(real.new_zeros(real.shape))[1]
        step = width if per == "head" else 1
        columns = []
        for start in range(0, tokens, step):
            count = min(step, tokens - start)
            units = real.new_zeros(tokens, held // step, step)
            for d in range(count):
                units[start + d, :, d] = 1.0
            unit = units.view(1, *real.shape[1:]).expand(real.shape)
            found = _by_head(run.once(unit)[1] - nothing, channels // step)
            columns.append(found[..., :count])
        matrix = torch.cat(columns, dim=-1)
        _check(matrix, _serving(real, width, channels), mixed - nothing)
    return matrix


class _Run:
    """Forward passes in which the values are replaced."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Tensor | Mapping[str, Any],
        values: str | None,
        out: str | None,
    ) -> None:
        named = isinstance(inputs, Mapping)
        self.module = module
        self.inputs: dict[Any, Any] = (
            dict(cast(Mapping[str, Any], inputs)) if named else {0: inputs}
        )
        self.named, self.out = named, _part(module, out)
        self.values = _part(module, values)

    def once(self, replacement: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values and what was mixed of them, in a pass with these values or with the real ones."""
        inputs, seen, mixed = dict(self.inputs), [], []
        if self.values is None:
            first = next(iter(inputs))
            seen.append(inputs[first])
            inputs[first] = seen[0] if replacement is None else replacement

        def make(_: nn.Module, __: Any, made: Tensor) -> Tensor:
            seen.append(made)
            return made if replacement is None else replacement

        def take(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            mixed.append(given[0])

        with ExitStack() as hooks:
            if self.values is not None:
                hooks.enter_context(_removed(self.values.register_forward_hook(make)))
            if self.out is not None:
                hooks.enter_context(_removed(self.out.register_forward_pre_hook(take)))
            result = self.module(**inputs) if self.named else self.module(inputs[0])
        if self.out is None:
            mixed.append(result)
        for name, found in (("values", seen), ("out", mixed)):
            if len(found) != 1:
                raise ValueError(
                    f"{name} must be a sub-module that a forward pass calls once, it called it "
                    f"{len(found)} times"
                )
        return seen[0], mixed[0]


@contextmanager
def _removed(hook: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _part(module: nn.Module, name: str | None) -> nn.Module | None:
    if name is None:
        return None
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in module.named_modules() if n]
        raise ValueError(
            f"{type(module).__name__} has no sub-module {name!r}, only {names}"
        ) from None


def _heads(module: nn.Module, heads: int | None, channels: int) -> int:
    heads = getattr(module, "heads", None) if heads is None else heads
    if not isinstance(heads, int) or heads < 1 or channels % heads:
        raise ValueError(f"heads must divide the {channels} channels that were mixed, got {heads}")
    return heads


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(b, *tokens, c) -> (b, h, n, c / h)."""
    rows = x.reshape(x.shape[0], -1, heads, x.shape[-1] // heads)
    return rows.transpose(1, 2)


def _serving(real: Tensor, width: int, channels: int) -> Tensor:
    """Values (b, *tokens, channels) of as many heads as were mixed."""
    by_head = real.unflatten(-1, (-1, width))  # type: ignore[no-untyped-call]
    repeats = channels // real.shape[-1]
    return cast(Tensor, by_head.repeat_interleave(repeats, dim=-2).flatten(-2))


def _check(matrix: Tensor, held: Tensor, mixed: Tensor) -> None:
    """Raise if the matrix does not make of the real values what the layer makes of them."""
    wanted = _by_head(mixed, matrix.shape[1])
    off = (matrix @ _by_head(held, matrix.shape[1]) - wanted).abs()
    if not off.numel():
        return
    most = float(wanted.abs().max())
    if not float(off.max()) <= RELATIVE_ERROR * max(most, 1e-30):
        raise ValueError(
            f"the module must be linear in its values: its matrix gives outputs that are up to "
            f"{float(off.max()):.1e} off where the largest is {most:.1e}. Values that also choose "
            "what is mixed, dropout or a function between cannot be undone; if channels mix "
            "differently, per='channel' may do"
        )
