"""What can be attached to an attention site, and what a site must offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.backends import reference
from heed_core.records import Recorder, SiteCall, Stage

Place = Literal["scores", "weights", "output"]
"""What an edit changes.

Scores before mask and softmax (b, h, n, m), weights (b, h, n, m), or head outputs (b, h, n, e).
"""


@dataclass(frozen=True, kw_only=True)
class AttendCall(SiteCall):
    """One call of a softmax site: what an edit may look at."""

    scale: float
    mask: Bool[Tensor, "*mask"] | None
    """True = may attend, broadcastable to (b, h, n, m)."""
    causal: bool
    """Whether bottom-right causality comes on top of `mask`."""
    q_offset: int
    """Position of the first query among the keys: m - n."""
    query: Float[Tensor, "b h n d"]
    key: Float[Tensor, "b g m d"]
    value: Float[Tensor, "b g m e"]

    @property
    def allowed(self) -> Bool[Tensor, "*mask"] | None:
        """`mask` AND causality, broadcastable to (b, h, n, m). None = every pair."""
        return reference.permission(
            self.mask,
            causal=self.causal,
            queries=self.query.shape[2],
            keys=self.key.shape[2],
            device=self.query.device,
        )


Edit = Callable[[Tensor, AttendCall], Tensor]
"""A pure function: the tensor and its call -> a tensor of the same shape."""


@dataclass
class Steering:
    """One edit at one site."""

    site: str
    edit: Edit
    at: Place
    start: int = 0
    """Calls of the site before the attaching."""


Attachment = Steering | Recorder
CallT = TypeVar("CallT", bound=SiteCall)


@dataclass
class Attachments:
    """What is attached to one site, in the order of attaching."""

    edits: list[Steering] = field(default_factory=list)
    recorders: list[Recorder] = field(default_factory=list)
    calls: int = 0
    """Calls of the site while something was attached."""

    def __bool__(self) -> bool:
        return bool(self.edits or self.recorders)

    def add(self, item: Attachment) -> None:
        """Attach an edit or a recorder; it counts calls from now."""
        item.start = self.calls
        if isinstance(item, Recorder):
            self.recorders.append(item)
        else:
            self.edits.append(item)

    def remove(self, item: Attachment) -> None:
        """Detach what was attached."""
        if isinstance(item, Recorder):
            self.recorders = [other for other in self.recorders if other is not item]
        else:
            self.edits = [other for other in self.edits if other is not item]

    def next_call(self) -> int:
        """The index of the call that begins."""
        self.calls += 1
        return self.calls - 1

    def edits_at(self, at: Place) -> list[Steering]:
        """The edits of one place, in order."""
        return [item for item in self.edits if item.at == at]

    @property
    def explicit(self) -> bool:
        """Whether the output must come from the explicit computation."""
        return any(item.at != "output" for item in self.edits) or any(
            recorder.selection.grad for recorder in self.recorders
        )

    def wants(self, stage: Stage) -> bool:
        """Whether a recorder asks for weights of this stage."""
        return any(recorder.selection.stage == stage for recorder in self.recorders)

    def edit_scores(
        self, scores: Float[Tensor, "b h n m"], call: AttendCall
    ) -> Float[Tensor, "b h n m"]:
        """Scores (scaled, with bias, before the mask) after all edits of scores."""
        return self._edited("scores", scores, call)

    def edit_weights(
        self, weights: Float[Tensor, "b h n m"], call: AttendCall
    ) -> Float[Tensor, "b h n m"]:
        """Weights after all edits of weights; what may not attend stays zero whatever they do."""
        if not self.edits_at("weights"):
            return weights
        weights = self._edited("weights", weights, call)
        allowed = call.allowed
        return weights if allowed is None else weights.masked_fill(~allowed, 0.0)

    def edit_output(
        self, output: Float[Tensor, "b h n e"], call: AttendCall
    ) -> Float[Tensor, "b h n e"]:
        """Head outputs after all edits of outputs."""
        return self._edited("output", output, call)

    def record(
        self, weights: Float[Tensor, "b h n m"], call: SiteCall, *, raw: bool = False
    ) -> None:
        """Give a whole map to the recorders of its stage."""
        stage = "raw" if raw else "final"
        for recorder in self.recorders:
            if recorder.selection.stage == stage:
                recorder.take(weights, seen_by(recorder, call))

    def _edited(self, at: Place, tensor: Tensor, call: AttendCall) -> Tensor:
        for item in self.edits_at(at):
            tensor = _apply(item, tensor, seen_by(item, call))
        return tensor


def seen_by(item: Attachment, call: CallT) -> CallT:
    """The call as one attached item sees it: with its name of the site and its count."""
    return replace(call, site=item.site, index=call.index - item.start)


def _apply(item: Steering, tensor: Tensor, call: AttendCall) -> Tensor:
    version = None if tensor.is_inference() else tensor._version
    result = item.edit(tensor, call)
    where = f"the edit of {item.at} at site {item.site!r}"
    if not isinstance(result, Tensor):
        raise TypeError(f"{where} must return a tensor, got {type(result).__name__}")
    if result.shape != tensor.shape:
        raise ValueError(
            f"{where} must keep the shape {tuple(tensor.shape)}, got {tuple(result.shape)}"
        )
    if version is not None and tensor._version != version:
        raise ValueError(f"{where} changed its argument in place; return a new tensor")
    return result.to(tensor.dtype)


@runtime_checkable
class AttachPoint(Protocol):
    """A site, ours or of a model that we did not write."""

    @property
    def steerable(self) -> bool:
        """Whether edits can be attached, not only recorders."""

    def attach(self, item: Attachment) -> None:
        """Put an item to work."""

    def detach(self, item: Attachment) -> None:
        """Take it off; with the last one the model is as before."""


@runtime_checkable
class SiteProvider(Protocol):
    """A model, or an adapter of one, that brings its own sites."""

    def attention_sites(self) -> Mapping[str, AttachPoint]:
        """Name relative to the model -> site, in the order of the forward pass."""
