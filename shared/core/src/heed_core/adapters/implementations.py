"""Where a Hugging Face transformers model attends, and on which implementation its parts run.

The parts of a composite model are its sub-configurations (`text_config` -> "text", `vision_config`
-> "vision"); a part of a part is written with a dot. "" is the whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from heed_core.errors import MissingExtra

try:
    from transformers import PreTrainedModel
except ModuleNotFoundError as missing:
    raise MissingExtra("transformers", "heed-core[transformers]") from missing

from transformers.cache_utils import StaticLayer

Phase = Literal["prefill", "decode"]
"""Decode: one new token per row, after others that are in the cache. Prefill: anything else."""


class UnsupportedModelError(TypeError):
    """The model does not look its attention up in the registries, so nothing can be attached."""


@runtime_checkable
class Config(Protocol):
    """What of a transformers configuration is used here."""

    _attn_implementation: str | None
    sub_configs: dict[str, object]
    is_encoder_decoder: bool


@dataclass(frozen=True, kw_only=True)
class AttentionModule:
    """One attention module of a model."""

    name: str
    module: nn.Module
    owner: nn.Module
    """The innermost model around it, whose forward call is one step."""
    part: str

    @property
    def implementation(self) -> str | None:
        """The attention implementation that it looks up."""
        return cast(Config, self.module.config)._attn_implementation


def outermost_models(module: nn.Module) -> dict[str, nn.Module]:
    """The transformers models in a module, by path, without the models inside them."""
    if isinstance(module, PreTrainedModel):
        return {"": module}
    return {
        f"{child_name}.{name}".rstrip("."): found
        for child_name, child in module.named_children()
        for name, found in outermost_models(child).items()
    }


def attention_modules(model: nn.Module) -> list[AttentionModule]:
    """All modules of a transformers model that look their attention function up by name."""
    parts = {id(config): part for part, config in _config_tree(_config(model), "")}
    found = []
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[name] = module
        if not _looks_up_attention(module):
            continue
        path = name.split(".")
        above = [".".join(path[:depth]) for depth in range(len(path) - 1, -1, -1)]
        around = [owners[prefix] for prefix in above if prefix in owners]
        known = [parts[id(_config(owner))] for owner in around if id(_config(owner)) in parts]
        part = parts.get(id(module.config), known[0])
        found.append(AttentionModule(name=name, module=module, owner=around[0], part=part))
    return found


def default_part(model: nn.Module) -> str:
    """The part that reads or writes text; "", the whole, where there is none of its own."""
    config = _config(model)
    try:
        text = config.get_text_config()  # type: ignore[attr-defined]
    except ValueError:  # both an encoder and a decoder of text
        text = config.get_text_config(decoder=True)  # type: ignore[attr-defined]
    return next((part for part, other in _config_tree(config, "") if other is text), "")


def part_names(model: nn.Module) -> list[str]:
    """The names of all parts below the whole."""
    return [part for part, _ in _config_tree(_config(model), "") if part]


def within(part: str, chosen: Sequence[str]) -> bool:
    """Whether a part is one of the chosen, or inside one."""
    return any(one in ("", part) or part.startswith(f"{one}.") for one in chosen)


@dataclass
class Switch:
    """A change of parts of a model to an attention implementation, which can be taken back."""

    model: nn.Module
    parts: Sequence[str]
    name: str
    before: list[tuple[Config, str | None]] = field(default_factory=list)

    def on(self) -> None:
        """Change the parts.

        Raises:
            UnsupportedModelError: The model cannot change its implementation.
        """
        self.before = [(config, config._attn_implementation) for config in _configs(self.model)]
        try:
            request = _request(_config(self.model), "", self.parts, self.name)
            cast(PreTrainedModel, self.model).set_attn_implementation(request)
            wrong = [
                f"{site.name} runs {site.implementation!r}"
                for site in attention_modules(self.model)
                if within(site.part, self.parts) and site.implementation != self.name
            ]
            if wrong:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} did not change its attention implementation to "
                    f"{self.name!r}: {wrong[0]} (and {len(wrong) - 1} more)"
                )
        except BaseException:
            self.off()
            raise

    def off(self) -> None:
        """Change the parts back."""
        changed = [(c, old) for c, old in self.before if c._attn_implementation == self.name]
        # Setting one reaches into its sub-configurations; those come later in the list.
        for config, implementation in changed:
            config._attn_implementation = implementation
        self.before = []


@dataclass
class Progress:
    """How far the generation of one model is, told by the calls of its forward."""

    phase: Phase = "prefill"
    step: int = 0
    """Forward calls since the cache was empty."""
    past: int = 0
    """Tokens per row in the cache when the call began."""
    tokens: int = 0
    """New tokens per row in the call; 0 where the model reads none."""
    wants_weights: bool = False
    """Whether the caller asked transformers itself for attention weights."""

    def begin(self, owner: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Note the call of `owner.forward` that begins; a forward pre-hook with keywords.

        Raises:
            ValueError: The cache does not grow with the sequence.
        """
        given = _named_arguments(owner, args, kwargs)
        cache = given.get("past_key_values")
        cache = getattr(cache, "self_attention_cache", cache)
        if any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", ())):
            raise ValueError(
                f"the cache is a {type(cache).__name__} of fixed size, in which the positions of "
                "the keys cannot be told; use a cache that grows (cache_implementation='dynamic')"
            )
        self.past = 0 if cache is None else int(cache.get_seq_length())  # type: ignore[attr-defined]
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        self.tokens = tokens.shape[1] if isinstance(tokens, Tensor) else 0
        self.step = self.step + 1 if self.past else 0
        self.phase = "decode" if self.past and self.tokens == 1 else "prefill"
        asked = given.get("output_attentions")
        self.wants_weights = bool(
            getattr(_config(owner), "output_attentions", False) if asked is None else asked
        )


def _named_arguments(
    owner: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> dict[str, object]:
    names = list(inspect.signature(owner.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _looks_up_attention(module: nn.Module) -> bool:
    # A module that uses the registry names its method in the code of its forward.
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    uses = code is not None and "get_interface" in code.co_names
    return uses and hasattr(getattr(module, "config", None), "_attn_implementation")


def _config(model: nn.Module) -> Config:
    return cast(Config, model.config)


def _sub_configs(config: Config) -> Iterator[tuple[str, Config]]:
    for key in config.sub_configs:
        if (below := getattr(config, key, None)) is not None:
            yield key, below


def _config_tree(config: Config, part: str) -> Iterator[tuple[str, Config]]:
    yield part, config
    for key, below in _sub_configs(config):
        name = key.removesuffix("_config")
        yield from _config_tree(below, f"{part}.{name}" if part else name)


def _configs(model: nn.Module) -> list[Config]:
    """Every configuration that modules of the model read, the outer before the inner."""
    tree = [config for _, config in _config_tree(_config(model), "")]
    models = [_config(module) for module in model.modules() if isinstance(module, PreTrainedModel)]
    modules = [_config(site.module) for site in attention_modules(model)]
    return list({id(config): config for config in [*tree, *models, *modules]}.values())


def _request(
    config: Config, part: str, chosen: Sequence[str], name: str
) -> str | dict[str, object]:
    """What `set_attn_implementation` wants: by sub-configuration, so that other parts stay."""
    own = name if within(part, chosen) else config._attn_implementation
    below: dict[str, object] = {}
    for key, sub in _sub_configs(config):
        short = key.removesuffix("_config")
        below[key] = _request(sub, f"{part}.{short}" if part else short, chosen, name)
    return {"": own, **below} if below or not part else cast(str, own)
