"""Attention sites: the named places of a model where attention happens, to read and to edit.

A site is a sub-module `Attend` (softmax attention) or `Probe` (a mechanism without softmax that can
state its effective weights); its name in `model.named_modules()` is the site's name.

    with observe(model, "encoder.*") as record:
        model(x)
    record["encoder.layers.0.attend"]                       # (b, h, n, m)

    with steer(model, edits.prune_heads([3]), "encoder.*"):
        y = model(x)

**What runs.** With nothing attached a site calls `attend` and pays nothing. While a site is only
observed, its output still comes from `attend`, bit for bit, and the wanted weights are computed
beside it, in pieces of query rows. While scores or weights are edited, or observed with their
graph, the explicit computation of `backends.reference` runs.

**Models that we did not write.** A module with a method `attention_sites() -> Mapping[str,
AttachPoint]` brings its own sites; names are relative to it, and the search does not go deeper.
Modules of Hugging Face transformers are served by
`heed_core.adapters.transformers.provider(module)`, imported only then. An attach point keeps one
`Attachments` per site, puts itself to work when the first item is attached and restores the model
when the last is detached, and in each call does

    call = AttendCall(index=a.next_call(), query=..., key=..., value=..., scale=..., mask=...,
                      causal=..., q_offset=...)
    scores = a.edit_scores(scores, call)                    # before the mask
    weights = a.edit_weights(softmax(mask(scores)), call)   # what may not attend stays 0
    a.record(weights, call)                                 # `raw=True` for those before edits
    output = a.edit_output(weights @ value, call)           # (b, h, n, e)

`AttendCall` may be sub-classed to tell edits more (layer, phase).
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Literal, ParamSpec, TypeVar, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attachments import (
    Attachment,
    Attachments,
    AttachPoint,
    AttendCall,
    Edit,
    Place,
    SiteProvider,
    Steering,
    seen_by,
)
from heed_core.attend import Impl, attend, autocast_together, check_arguments, default_scale
from heed_core.backends import reference
from heed_core.records import Record, Recorder, Reduction, Selection, SiteCall, Stage

__all__ = [
    "AttachPoint",
    "Attachment",
    "Attachments",
    "Attend",
    "AttendCall",
    "Edit",
    "Place",
    "Probe",
    "Record",
    "SiteCall",
    "SiteProvider",
    "Steering",
    "attach_points",
    "observe",
    "sites",
    "steer",
    "use_impl",
]

logger = logging.getLogger(__name__)

PIECE_BYTES = 2**26
"""Weights computed at a time where a record does not need them in one piece."""


P = ParamSpec("P")
R = TypeVar("R")
PointT = TypeVar("PointT", bound=AttachPoint)


_graph_break: Callable[[Callable[P, R]], Callable[P, R]] = torch.compiler.disable


class _Site(nn.Module):
    """Keeps what is attached; None, and nothing paid, while nothing is."""

    attachments: Attachments | None

    def __init__(self) -> None:
        super().__init__()
        self.attachments = None

    def attach(self, item: Attachment) -> None:
        """Put an item to work."""
        if self.attachments is None:
            self.attachments = Attachments()
        self.attachments.add(item)

    def detach(self, item: Attachment) -> None:
        """Take it off."""
        if self.attachments is not None:
            self.attachments.remove(item)
            self.attachments = self.attachments or None


class Attend(_Site):
    """`attend` as a parameterless sub-module: a named place, which can be observed and steered.

    Args:
        causal: Default of the call's `causal`.
        scale: Factor of the products; default d ** -0.5.
        dropout: Probability of dropping a weight, in training mode only.
        impl: The back-end, as for `attend`.

    Example:
        >>> import torch
        >>> site = Attend(causal=True)
        >>> site(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)).shape
        torch.Size([1, 2, 3, 5])
    """

    steerable = True

    def __init__(
        self,
        *,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.causal, self.scale, self.dropout = causal, scale, dropout
        self.impl: Impl = impl

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g m d"],
        value: Float[Tensor, "b g m e"],
        *,
        mask: Bool[Tensor, "*mask"] | None = None,
        bias: Float[Tensor, "*bias"] | None = None,
        causal: bool | None = None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax attention; arguments as of `attend`."""
        causal = self.causal if causal is None else causal
        dropout = self.dropout if self.training else 0.0
        if self.attachments is None:
            return attend(
                query, key, value, mask=mask, bias=bias, causal=causal, scale=self.scale,
                dropout=dropout, impl=self.impl,
            )  # fmt: skip
        return _watched(self, query, key, value, mask, bias, causal, dropout)

    def extra_repr(self) -> str:
        """Show what differs from the defaults."""
        shown = {"causal": self.causal, "scale": self.scale, "dropout": self.dropout}
        parts = [f"{name}={value}" for name, value in shown.items() if value]
        return ", ".join([*parts, *([f"impl={self.impl!r}"] if self.impl != "auto" else [])])


class Probe(_Site):
    """A site of a mechanism without softmax, which states its effective weights when observed.

    Example:
        self.probe = Probe()
        ...
        self.probe(lambda: effective_weights(q, k))   # called only while observed
    """

    steerable = False

    def forward(self, weights: Callable[[], Float[Tensor, "b h n m"]]) -> None:
        """Report the weights of this call."""
        if self.attachments is not None:
            _report(self.attachments, weights)


@_graph_break
def _report(attachments: Attachments, weights: Callable[[], Tensor]) -> None:
    call = SiteCall(index=attachments.next_call())
    with torch.set_grad_enabled(torch.is_grad_enabled() and attachments.explicit):
        found = weights()
    attachments.record(found, call)
    attachments.record(found, call, raw=True)


@_graph_break
def _watched(
    site: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    attached = site.attachments
    assert attached is not None
    query, key, value = autocast_together(query, key, value)
    check_arguments(query, key, value, mask=mask, bias=bias, scale=site.scale, dropout=dropout)
    call = AttendCall(
        index=attached.next_call(),
        scale=default_scale(query) if site.scale is None else site.scale,
        mask=mask,
        causal=causal,
        q_offset=key.shape[2] - query.shape[2],
        query=query,
        key=key,
        value=value,
    )
    if attached.explicit:
        output = _explicit(attached, call, bias, dropout)
    else:
        for recorder in attached.recorders:
            record_beside(recorder, seen_by(recorder, call), bias)
        output = attend(
            query, key, value, mask=mask, bias=bias, causal=causal, scale=site.scale,
            dropout=dropout, impl=site.impl,
        )  # fmt: skip
    return attached.edit_output(output, call)


def _explicit(
    attached: Attachments, call: AttendCall, bias: Tensor | None, dropout: float
) -> Tensor:
    allowed = call.allowed
    scores = reference.scores(call.query, call.key, scale=call.scale, bias=bias)
    edited = attached.edit_scores(scores, call)
    weights = reference.masked_softmax(edited, allowed)
    if attached.wants("raw"):
        raw = weights if edited is scores else reference.masked_softmax(scores, allowed)
        attached.record(raw, call, raw=True)
    weights = attached.edit_weights(weights, call)
    attached.record(weights, call)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return reference.mix(weights, call.value).to(call.query.dtype)


def record_beside(recorder: Recorder, call: AttendCall, bias: Tensor | None) -> None:
    """Compute the wanted heads and rows of the weights, in pieces of rows."""
    selection = recorder.selection
    batch, heads, queries, _ = call.query.shape
    groups, keys = call.key.shape[1:3]
    chosen = selection.chosen_heads(heads)
    rows = selection.rows(queries)
    rows = list(range(queries)) if rows is None else rows
    query, key = call.query, call.key
    if chosen is not None:
        query, key = query[:, chosen], key[:, [head * groups // heads for head in chosen]]
    size = batch * query.shape[1] * keys * 4
    step = len(rows) if selection.whole else max(1, PIECE_BYTES // max(size, 1))
    with torch.no_grad():
        for start in range(0, max(len(rows), 1), max(step, 1)):
            piece = torch.tensor(rows[start : start + step], dtype=torch.long, device=query.device)
            allowed = reference.permission(
                _pick(_pick(call.mask, -3, chosen), -2, piece),
                causal=call.causal,
                queries=queries,
                keys=keys,
                device=query.device,
                rows=piece,
            )
            part = _pick(_pick(bias, -3, chosen), -2, piece)
            scores = reference.scores(query[:, :, piece], key, scale=call.scale, bias=part)
            recorder.put(reference.masked_softmax(scores, allowed))
    recorder.finish(call)


def _pick(tensor: Tensor | None, dim: int, index: Tensor | Sequence[int] | None) -> Tensor | None:
    """Select along an axis of a broadcastable tensor, if it has that axis."""
    if tensor is None or index is None or tensor.ndim < -dim or tensor.shape[dim] == 1:
        return tensor
    return tensor.index_select(dim, torch.as_tensor(index, device=tensor.device))


Patterns = str | Sequence[str]
"""A shell pattern of site names, or several."""


def sites(model: nn.Module, pattern: Patterns = "*") -> dict[str, Attend]:
    """The softmax sites of a model by name, in the order of its modules.

    Raises:
        ValueError: No site matches; the message lists the nearest names.
    """
    every = {name: point for name, point in _all(model).items() if isinstance(point, Attend)}
    return _matching(every, pattern)


def attach_points(model: nn.Module, pattern: Patterns = "*") -> dict[str, AttachPoint]:
    """Every place that can be observed, ours and foreign, by name.

    Raises:
        ValueError: No site matches; the message lists the nearest names.
    """
    return _matching(_all(model), pattern)


def use_impl(model: nn.Module, impl: Impl) -> None:
    """Let all softmax sites of a model run on the same back-end.

    Raises:
        ValueError: `impl` is not the name of a back-end.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    for site in sites(model).values():
        site.impl = impl


@contextmanager
def observe(
    model: nn.Module,
    sites: Patterns = "*",
    *,
    reduce: Reduction = None,
    queries: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    stage: Stage = "final",
    keep: Literal["last", "all"] = "last",
    grad: bool = False,
) -> Iterator[Record]:
    """Record the attention weights of the sites of a model while it runs.

    Args:
        model: Any module that has sites.
        sites: Shell patterns of site names.
        reduce: None keeps the map (b, h, n, m); "heads" its mean over heads (b, n, m); "queries"
            its mean over query rows (b, h, m); "stats" running statistics of the rows per head over
            all calls, in constant memory; a function makes a tensor of (weights, call).
        queries: Only these query rows, in this order; negative counts from the end. Applied before
            `reduce`.
        heads: Only these heads.
        stage: "final" are the weights after all edits of `steer`, "raw" those before; both before
            dropout.
        keep: Each site's latest call, or all calls (`record.calls(site)`).
        grad: Keep the record in the graph. Without `reduce` and selection the recorded tensor is
            the very one that meets the values, so that `torch.autograd.grad(loss, record[site])`
            gives its gradient.

    Yields:
        The record, filled call by call.

    Raises:
        ValueError: No site matches, or an option that cannot be used.
    """
    selection = Selection(
        reduce=reduce,
        queries=None if queries is None else tuple(queries),
        heads=None if heads is None else tuple(heads),
        keep=keep,
        stage=stage,
        grad=grad,
    )
    points = attach_points(model, sites)
    recorders = {name: Recorder(site=name, selection=selection) for name in points}
    logger.info("observing %d sites: their weights are computed explicitly", len(points))
    with _attached(points, recorders):
        yield Record(recorders)


@contextmanager
def steer(
    model: nn.Module, edit: Edit, sites: Patterns = "*", *, at: Place = "weights"
) -> Iterator[None]:
    """Edit attention at the sites of a model while it runs.

    Nested edits compose in the order in which their contexts were entered.

    Args:
        model: Any module that has sites.
        edit: A pure function of (tensor, call); `heed_core.edits` has the usual ones.
        sites: Shell patterns of site names.
        at: What is edited: "weights" (b, h, n, m), "scores" (b, h, n, m; scaled, with bias, before
            the mask, so that they are finite) or "output", the heads' outputs (b, h, n, e).

    Raises:
        ValueError: No site that can be steered matches, or an unknown `at`; while the model runs,
            an edit that changes the shape or its argument in place.
    """
    if at not in get_args(Place):
        raise ValueError(f"at must be one of {get_args(Place)}, got {at!r}")
    if not callable(edit):
        raise TypeError(f"edit must be a function of (tensor, call), got {type(edit).__name__}")
    found = attach_points(model, sites)
    points = {name: point for name, point in found.items() if point.steerable}
    if not points:
        raise ValueError(f"{sorted(found)} can be observed but not steered: they have no softmax")
    logger.info("steering %d sites: their attention is computed explicitly", len(points))
    items = {name: Steering(site=name, edit=edit, at=at) for name in points}
    with _attached(points, items):
        yield


@contextmanager
def _attached(points: Mapping[str, AttachPoint], items: Mapping[str, Attachment]) -> Iterator[None]:
    with ExitStack() as undo:
        for name, point in points.items():
            point.attach(items[name])
            undo.callback(point.detach, items[name])
        yield


def _all(model: nn.Module) -> dict[str, AttachPoint]:
    root = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return dict(_walk(root, "", set()))


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, AttachPoint]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, Attend | Probe):
        yield name, module
    elif (provider := _provider(module)) is not None:
        for inner, point in provider.attention_sites().items():
            yield _joined(name, inner), point
    else:
        for child_name, child in module.named_children():
            yield from _walk(child, _joined(name, child_name), seen)


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _provider(module: nn.Module) -> SiteProvider | None:
    if isinstance(module, SiteProvider):
        return module
    library = sys.modules.get("transformers.modeling_utils")
    if library is not None and isinstance(module, library.PreTrainedModel):
        from heed_core.adapters import transformers

        return transformers.provider(module)
    return None


def _matching(found: Mapping[str, PointT], pattern: Patterns) -> dict[str, PointT]:
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not found:
        raise ValueError("the model has no attention sites")
    matching = {
        name: point
        for name, point in found.items()
        if any(fnmatchcase(name, one) for one in patterns)
    }
    if not matching:
        near = [name for one in patterns for name in difflib.get_close_matches(one, found, 5, 0.0)]
        raise ValueError(
            f"no attention site matches {patterns}; the nearest of {len(found)}: "
            + ", ".join(dict.fromkeys(near))
        )
    return matching
