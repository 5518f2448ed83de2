"""Trained models whose attentions become mixtures of heads, in place.

    names = convert_to_mixtures(model, shared=16, active=8)
    with mixtures(model) as found:
        loss = task(model(x)) + 0.01 * found.balance_loss()

Jin et al., "MoH: multi-head attention as mixture-of-head attention" (arXiv 2410.11842): a trained
language model goes on with half of its heads shared and a router without parameters, the lengths of
the queries (`head_routing.norm_gates`). The equations are those of
`heed_core.attention.mixture_of_heads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn

from heed_core.attention.mixture_of_heads import Mixture, MixtureOfHeads
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.cache import KVCache
from heed_core.head_routing import Router


class HeadMixture(nn.Module):
    """A mixture of heads in the place of a `MultiHeadAttention`: its output, without the rest.

    Args:
        mixture: Serves the calls; `mixtures` shows what else it returns.

    Example:
        >>> attention = HeadMixture(MixtureOfHeads(32, heads=4, shared=2, active=1))
        >>> attention(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(self, mixture: MixtureOfHeads) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        bias: Float[Tensor, "*#bias"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend; arguments as of `MixtureOfHeads`."""
        found: Mixture = self.mixture(
            x,
            context,
            mask=mask,
            padding_mask=padding_mask,
            bias=bias,
            positions=positions,
            cache=cache,
        )
        return found.output

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for decoding; arguments as of `MixtureOfHeads.new_cache`."""
        return self.mixture.new_cache(batch, max_len, dtype=dtype)


def convert_to_mixtures(
    model: nn.Module,
    *,
    shared: int,
    active: int,
    names: str = "*",
    router: Router = "norm",
    straight_through: bool = False,
    skip: bool | None = None,
) -> list[str]:
    """Replace the self-attentions of a model by mixtures with their weights, to be trained on.

    Args:
        model: Changed in place. Attentions to a context stay.
        shared: Heads that every token uses, the first ones.
        active: Routed heads that a token uses.
        names: Pattern of the modules to be replaced, as `fnmatch` reads it.
        router: As in `MixtureOfHeads`.
        straight_through: As in `MixtureOfHeads`.
        skip: As in `MixtureOfHeads`.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: No self-attention of that name, or one with options that a mixture has not: then
            nothing is replaced.
    """
    made: dict[int, HeadMixture] = {}
    places: list[tuple[str, HeadMixture]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        fits = isinstance(module, MultiHeadAttention) and module.context_dim is None
        if not fits or not fnmatchcase(name, names):
            continue
        assert isinstance(module, MultiHeadAttention)
        if not name:
            raise ValueError(
                "model must hold attentions, got an attention: MixtureOfHeads.from_attention"
            )
        if id(module) not in made:
            try:
                mixture = MixtureOfHeads.from_attention(
                    module,
                    shared=shared,
                    active=active,
                    router=router,
                    straight_through=straight_through,
                    skip=skip,
                )
            except ValueError as error:
                raise ValueError(f"{name} cannot become a mixture of heads: {error}") from error
            made[id(module)] = HeadMixture(mixture).train(module.training)
        places.append((name, made[id(module)]))
    if not places:
        raise ValueError(f"model has no self-attention MultiHeadAttention named {names!r}")
    for name, mixture_of in places:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, mixture_of)
    return [name for name, _ in places]


class MixtureRecord(dict[str, list[Mixture]]):
    """What every mixture of a model returned, in the order of its calls, by its name."""

    def balance_loss(self) -> Float[Tensor, ""]:
        """The mean over all calls; the paper adds 0.01 times it to the loss.

        Raises:
            ValueError: No mixture was called.
        """
        losses = [mixture.balance_loss for calls in self.values() for mixture in calls]
        if not losses:
            raise ValueError("no mixture of heads was called while its model was recorded")
        return torch.stack(losses).mean()


@contextmanager
def mixtures(model: nn.Module) -> Iterator[MixtureRecord]:
    """Note what the mixtures of heads of a model return, with gradients, while it is entered.

    Args:
        model: Any, with `MixtureOfHeads` or `HeadMixture` in it.
    """
    record = MixtureRecord()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfHeads):

            def note(_: nn.Module, __: object, found: Mixture, name: str = name) -> None:
                record.setdefault(name, []).append(found)

            handles.append(module.register_forward_hook(note))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
