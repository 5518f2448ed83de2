"""Observe and steer Hugging Face transformers models, with nothing of their source changed.

`heed_core.observe` and `heed_core.steer` find the attention modules of such a model by themselves;
a site is named by the path of its module, `model.language_model.layers.1.self_attn`:

    with steer(model, prune_heads([3]), "*.layers.1.self_attn"), observe(model) as record:
        ids = model.generate(**inputs)

**How.** transformers looks the attention function and the builder of its mask up by name in two
registries. `register` puts `attend_eager_or_fused` and the eager mask under one name, "heed". (With
the function alone the mask would silently be missing: decoders would see the future and padding.)
While something is attached, the configuration of the text part names "heed"; when the last item is
detached it names what it named before. Vision and audio parts stay on their own implementation,
unless `adapt(model, parts=("text", "vision"))` asks for them.

**What runs.** A site whose attention is edited runs the eager computation of transformers with the
edits in it: equal to `eager` to the last bit in float32 while the edits change nothing. Everything
else keeps running as it did: on `eager` where the model was on it, else on torch's fused attention,
with the wanted weights computed beside it in pieces. Rows of padding queries attend evenly to
everything, as in `eager`. A vision tower that splits its images calls its sites once per piece.

**What edits see.** A `ModelCall`: an `AttendCall` with layer, phase (prefill or decode), step of
the generation and the spans of marked tokens among the keys. The placeholders of an image
are such a span:

    spans = token_spans(inputs["input_ids"], model.config.image_token_id)
    with adapt(model, key_spans=spans), steer(model, During("decode", edit)):
        ids = model.generate(**inputs)

Beam search repeats the spans; an edit that keeps no state of its own works with it. Caches must
grow with the sequence: a `StaticCache` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, ParamSpec, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from heed_core.adapters.eager import Inputs, additive, allowed_keys, attend_eager
from heed_core.attachments import (
    Attachment,
    Attachments,
    AttachPoint,
    AttendCall,
    Edit,
    seen_by,
)
from heed_core.errors import MissingExtra
from heed_core.sites import record_beside

try:
    import transformers
except ModuleNotFoundError as missing:
    raise MissingExtra("transformers", "heed-core[transformers]") from missing

from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from heed_core.adapters.implementations import (
    Phase,
    Progress,
    Switch,
    UnsupportedModelError,
    attention_modules,
    default_part,
    outermost_models,
    part_names,
    within,
)

__all__ = [
    "NAME",
    "Adaptation",
    "During",
    "ModelCall",
    "UnsupportedModelError",
    "adapt",
    "attend_eager_or_fused",
    "provider",
    "register",
    "token_spans",
]
P = ParamSpec("P")
R = TypeVar("R")
_graph_break: Callable[[Callable[P, R]], Callable[P, R]] = torch.compiler.disable

NAME = "heed"
"""The name in both registries of transformers."""

FUSED = "sdpa"
EAGER = "eager"


def register() -> None:
    """Put the attention function and its mask into the registries; again changes nothing."""
    transformers.AttentionInterface.register(NAME, attend_eager_or_fused)
    transformers.AttentionMaskInterface.register(NAME, eager_mask)


@dataclass(frozen=True, kw_only=True)
class ModelCall(AttendCall):
    """One call of an attention module of a transformers model: what an edit may look at."""

    module: nn.Module
    layer: int | None
    """Number of the decoder layer from 0; None in modules that have none, as of vision towers."""
    phase: Phase
    step: int
    """Forward calls since the cache was empty; 0 is the first."""
    key_spans: Int[Tensor, "b m"] | None
    """For every key the number of its span from 0, -1 outside (`token_spans`); None = not given."""


@dataclass(frozen=True)
class During:
    """An edit in one phase of generation only; in the other the model runs as if it were not there.

    Args:
        phase: "prefill" (the prompt) or "decode" (one new token at a time).
        edit: The edit, as for `heed_core.steer`.
    """

    phase: Phase
    edit: Edit

    def __post_init__(self) -> None:
        if self.phase not in get_args(Phase):
            raise ValueError(f"phase must be one of {get_args(Phase)}, got {self.phase!r}")

    def applies(self, call: AttendCall) -> bool:
        """Whether the edit has anything to do in a call."""
        return isinstance(call, ModelCall) and call.phase == self.phase

    def __call__(
        self, tensor: Float[Tensor, "b h n m"], call: AttendCall
    ) -> Float[Tensor, "b h n m"]:
        """Edit the tensor, or return it as it is."""
        return self.edit(tensor, call) if self.applies(call) else tensor


def token_spans(
    input_ids: Int[Tensor, "b t"], token_id: int, *, lengths: Sequence[int] | None = None
) -> Int[Tensor, "b t"]:
    """Number the runs of a placeholder token in every row: 0, 1, ..., and -1 elsewhere.

    Args:
        input_ids: The prompt as it goes into the model, padding included.
        token_id: The placeholder, such as `model.config.image_token_id`.
        lengths: Number of placeholders of every span, row by row, where spans may touch each
            other. By default a span ends where another token comes.

    Raises:
        ValueError: `lengths` do not add up to the placeholders row by row.

    Example:
        >>> token_spans(torch.tensor([[0, 7, 7, 1, 7, 2]]), 7)
        tensor([[-1,  0,  0, -1,  1, -1]])
    """
    marked = input_ids == token_id
    if lengths is None:
        before = F.pad(marked, (1, 0))[:, :-1]
        return torch.where(marked, (marked & ~before).cumsum(1) - 1, -1)
    spans = torch.full_like(input_ids, -1)
    rest = list(lengths)
    for row, mask in zip(spans, marked, strict=True):
        total = int(mask.sum())
        own: list[int] = []
        while rest and sum(own) < total:
            own.append(rest.pop(0))
        if sum(own) != total:
            raise ValueError(
                f"lengths {list(lengths)} do not fit: a row has {total} tokens {token_id}, "
                f"the lengths give {sum(own)}"
            )
        row[mask] = torch.repeat_interleave(torch.tensor(own, dtype=torch.long)).to(row)
    if rest:
        raise ValueError(f"lengths {list(lengths)} are more than the tokens: {rest} are left over")
    return spans


@dataclass(eq=False)
class Adaptation:
    """The time in which parts of one model run on the registered function.

    Several may be at work at once: they share nothing.
    """

    model: nn.Module
    parts: Sequence[str]
    key_spans: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None
    """Spans of the prompt that comes next; set them anew for every prompt."""

    def __post_init__(self) -> None:
        self._holders = 0
        self._switch = Switch(model=self.model, parts=self.parts, name=NAME)
        self._modules: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def hold(self) -> None:
        """Keep the model switched until `release` is called as often."""
        if self._holders == 0:
            self._begin()
        self._holders += 1

    def release(self) -> None:
        """Give one hold back; with the last one the model is as before."""
        self._holders -= 1
        if self._holders == 0:
            self._end()

    def spans_of(self, binding: Binding, query: Tensor, key: Tensor) -> Tensor | None:
        """The spans among the keys of one call: (b, m)."""
        spans, progress = self.key_spans, binding.progress
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        if spans is None or binding.part != default_part(self.model):
            return None
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError("key_spans mark one sequence; an encoder-decoder has two")
        if spans.dtype == torch.bool:
            spans = torch.where(spans, 0, -1)
        if progress.past == 0 and queries != spans.shape[1]:
            raise ValueError(
                f"key_spans are of a prompt of {spans.shape[1]} tokens, this one has {queries}; "
                "set `key_spans` for every prompt"
            )
        if batch % spans.shape[0]:
            raise ValueError(f"key_spans have {spans.shape[0]} rows, the call has {batch}")
        # Beams repeat rows; a sliding window drops the oldest keys.
        first = max(progress.past + queries - keys, 0)
        grown = F.pad(spans, (0, max(first + keys - spans.shape[1], 0)), value=-1)
        shown = grown[:, first : first + keys].to(query.device)
        return shown.repeat_interleave(batch // spans.shape[0], dim=0)

    def _begin(self) -> None:
        register()
        sites = [site for site in attention_modules(self.model) if within(site.part, self.parts)]
        free = [site for site in sites if site.module not in _BINDINGS]
        if not free:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no attention to adapt in parts {list(self.parts)}"
            )
        idle = {site.name: site.implementation for site in free}
        self._switch.on()
        progress: dict[nn.Module, Progress] = {}
        for site in free:
            if site.owner not in progress:
                own = progress[site.owner] = Progress()
                self._hooks.append(
                    site.owner.register_forward_pre_hook(own.begin, with_kwargs=True)
                )
            _BINDINGS[site.module] = Binding(
                adaptation=self,
                part=site.part,
                progress=progress[site.owner],
                eager=idle[site.name] == EAGER,
            )
            self._modules.append(site.module)

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            _BINDINGS.pop(module, None)
        self._hooks, self._modules = [], []
        self._switch.off()


@dataclass(frozen=True, kw_only=True, eq=False)
class Binding:
    """What the registered function knows of one attention module."""

    adaptation: Adaptation
    part: str
    progress: Progress
    eager: bool
    """Whether the module ran on `eager` before."""
    attachments: Attachments = field(default_factory=Attachments)


_BINDINGS: WeakKeyDictionary[nn.Module, Binding] = WeakKeyDictionary()
"""The modules that are at work now; empty outside of contexts. Any other runs plain eager."""


@dataclass(frozen=True, eq=False)
class Point:
    """A site of a transformers model; an `AttachPoint`."""

    model: nn.Module
    module: nn.Module
    part: str
    """The part of the model to switch."""

    steerable: ClassVar[bool] = True

    def attach(self, item: Attachment) -> None:
        """Put an item to work; the first one switches the model."""
        bound = _BINDINGS.get(self.module)
        adaptation = bound.adaptation if bound else Adaptation(self.model, [self.part])
        adaptation.hold()
        _BINDINGS[self.module].attachments.add(item)

    def detach(self, item: Attachment) -> None:
        """Take it off; the last one switches the model back."""
        bound = _BINDINGS[self.module]
        bound.attachments.remove(item)
        bound.adaptation.release()


@dataclass(frozen=True)
class Provider:
    """The sites of one transformers model: its text part, and whatever `adapt` has added."""

    model: nn.Module

    def attention_sites(self) -> Mapping[str, AttachPoint]:
        """Site by module path, in the order of the modules."""
        text = default_part(self.model)
        return {
            site.name: Point(self.model, site.module, text)
            for site in attention_modules(self.model)
            if within(site.part, [text]) or site.module in _BINDINGS
        }


def provider(module: nn.Module) -> Provider | None:
    """What finds the sites in a transformers model; None for any other module."""
    return Provider(module) if isinstance(module, transformers.PreTrainedModel) else None


@contextmanager
def adapt(
    model: nn.Module,
    *,
    parts: Sequence[str] | None = None,
    key_spans: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
) -> Iterator[Adaptation]:
    """Keep a model ready for `observe` and `steer`, with more than they know by themselves.

    Args:
        model: A transformers model, or a module with one inside.
        parts: The parts whose sites are shown: names of sub-configurations without `_config`, such
            as `("text", "vision")`. By default the text part, or the whole where a model has none
            of its own.
        key_spans: Marked tokens of the next prompt, as of `token_spans`, or a mask (one span);
            edits see them as `ModelCall.key_spans`.

    Yields:
        The adaptation; set its `key_spans` before every further prompt.

    Raises:
        UnsupportedModelError: The model does not look its attention up in the registries.
        ValueError: An unknown part, or one that is adapted already.
    """
    models = list(outermost_models(model).values())
    if len(models) != 1:
        raise UnsupportedModelError(
            f"adapt takes a module with one transformers model in it, {type(model).__name__} "
            f"has {len(models)}"
        )
    chosen = _checked_parts(models[0], parts)
    adaptation = Adaptation(models[0], chosen, key_spans)
    adaptation.hold()
    try:
        yield adaptation
    finally:
        adaptation.release()


def _checked_parts(model: nn.Module, parts: Sequence[str] | None) -> list[str]:
    chosen = [default_part(model)] if parts is None else list(parts)
    known = part_names(model)
    if unknown := [part for part in chosen if part and part not in known]:
        raise ValueError(f"parts {unknown} are not in {type(model).__name__}; it has {known}")
    taken = [
        site.name
        for site in attention_modules(model)
        if within(site.part, chosen) and site.module in _BINDINGS
    ]
    if taken:
        raise ValueError(
            f"{taken[0]} is adapted, observed or steered already; enter `adapt` once and first"
        )
    return chosen


@_graph_break
def attend_eager_or_fused(
    module: nn.Module,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Float[Tensor, "b n h e"], Float[Tensor, "b h n m"] | None]:
    """The attention function of the registry; the names of its arguments are those of transformers.

    Returns:
        Head outputs, and the weights (after edits and dropout) where the eager computation ran.

    Raises:
        RuntimeError: A causal module got no mask.
        ValueError: The call comes from continuous batching.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        raise RuntimeError(
            f"a causal {type(module).__name__} got no mask, so that tokens would see the future: "
            f"the mask of {NAME!r} is not registered; call register()"
        )
    if kwargs.get("cache") is not None:
        raise ValueError("paged caches of continuous batching are not supported; use generate()")
    inputs = Inputs(
        query=query,
        key=key,
        value=value,
        mask=additive(attention_mask, query.dtype),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        bias=position_bias,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout if module.training else 0.0,
    )
    binding = _BINDINGS.get(module)
    if binding is None:
        return attend_eager(inputs)
    attached = binding.attachments
    call = _model_call(module, binding, inputs) if attached else None
    asked = binding.progress.wants_weights or bool(kwargs.pop("output_attentions", False))
    if binding.eager or asked or not inputs.fusable or (call and _needs_map(attached, call)):
        return attend_eager(inputs, attached, call)
    if call:
        for recorder in attached.recorders:
            record_beside(recorder, seen_by(recorder, call), inputs.addend)
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    output = _fused(module, inputs, is_causal, kwargs)
    if call:
        output = attached.edit_output(output.transpose(1, 2), call).transpose(1, 2).contiguous()
    return output, None


def _fused(
    module: nn.Module, inputs: Inputs, is_causal: bool | None, kwargs: dict[str, object]
) -> Tensor:
    function = ALL_ATTENTION_FUNCTIONS[FUSED]
    output: Tensor = function(
        module,
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.mask,
        scaling=inputs.scale,
        dropout=inputs.dropout,
        is_causal=is_causal,
        **kwargs,
    )[0]
    return output


def _needs_map(attached: Attachments, call: ModelCall) -> bool:
    """Whether an edit at work in this call, or a gradient, needs the explicit weights."""
    return any(
        item.at != "output" and (not isinstance(item.edit, During) or item.edit.applies(call))
        for item in attached.edits
    ) or any(recorder.selection.grad for recorder in attached.recorders)


def _model_call(module: nn.Module, binding: Binding, inputs: Inputs) -> ModelCall:
    return ModelCall(
        index=binding.attachments.next_call(),
        scale=inputs.scale,
        mask=allowed_keys(inputs.mask),
        causal=False,  # the mask has it
        q_offset=inputs.key.shape[2] - inputs.query.shape[2],
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        module=module,
        layer=getattr(module, "layer_idx", None),
        phase=binding.progress.phase,
        step=binding.progress.step,
        key_spans=binding.adaptation.spans_of(binding, inputs.query, inputs.key),
    )
