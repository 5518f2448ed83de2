"""The text tower of MoRE: an encoder of text with low-rank adapters, and its tokenizer.

The tower and a tokenizer are all in the model: the architecture of a checkpoint folder is in its
settings and the tokenizer lies in its state as bytes, so that a trained model needs no other file.
Without a checkpoint the tower is a random RoBERTa and its tokens are the bytes of UTF-8.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from heed_core.errors import InputError, reason_of
from heed_medical.more.encoders import (
    architecture_of,
    build_encoder,
    most_tokens,
    read_configuration,
    read_weights,
    tokenizer_json,
    transformers_library,
    with_adapters,
)
from heed_medical.more.towers import initial_std

START, PADDING, END = 0, 1, 2
"""Numbers of the special tokens among bytes, as RoBERTa's."""
SPECIALS = 4
BYTE_VOCABULARY = 256 + SPECIALS
FEWEST = 8
"""Tokens of a text, special ones among them."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower; the defaults are those of RoBERTa-base with MoRE's adapters."""

    vocabulary: int = 50265
    dim: int = 768
    """Channels of a token."""
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    """Channels inside the feed-forward."""
    positions: int = 514
    """Longest text + 2."""
    dropout: float = 0.1
    norm_eps: float = 1e-5
    max_tokens: int = 512
    """Longer texts are cut."""
    lora_rank: int = 16
    """Of the adapters of query and value, which are trained with all biases; 0: no adapters, the
    whole tower is trained."""
    lora_alpha: int = 8
    lora_dropout: float = 0.1
    pool: Literal["mean", "mean-all"] = "mean"
    """Mean over the tokens of a text; mean-all: over the padding to max_tokens too, as released."""
    prompt_tokens: int = 128
    """Length to which prompts and queries are cut, and padded with mean-all."""
    tokenizer_bytes: int = 0
    """Size of the tokenizer's file in the model; 0: tokens are bytes. Settled by the checkpoint."""
    padding: int = PADDING
    """Number of the token that fills up. Settled by the checkpoint."""
    architecture: str = ""
    """JSON of the encoder in transformers; empty: a RoBERTa of the sizes above. Settled by the
    checkpoint, with its sizes and dropout."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "dim", "depth", "heads", "hidden", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_tokens", "prompt_tokens"):
            if getattr(self, name) < FEWEST:
                raise ValueError(f"{name} must be at least {FEWEST}, got {getattr(self, name)}")
        for name in ("lora_rank", "tokenizer_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads={self.heads}, got {self.dim}")
        if not self.architecture and self.positions < self.max_tokens + 2:
            raise ValueError(
                f"positions must be max_tokens + 2 = {self.max_tokens + 2} at least, got "
                f"{self.positions}"
            )
        if not self.tokenizer_bytes and self.vocabulary < BYTE_VOCABULARY:
            raise ValueError(f"bytes need a vocabulary of {BYTE_VOCABULARY}, got {self.vocabulary}")


Text = tuple[str, str]
"""The report of an X-ray and of an ECG; either may be empty."""


class Tokens(NamedTuple):
    """Texts as numbers."""

    ids: Int64[Tensor, "b n"]
    mask: Bool[Tensor, "b n"]
    """True for a token, False for padding."""
    types: Int64[Tensor, "b n"]
    """0 in the first text of a pair, 1 in the second, where the tokenizer tells them apart."""


class TextTower(nn.Module):
    """An encoder of text, and the mean of its last hidden states.

    Raises:
        MissingExtra: The libraries transformers or peft are not installed.
        ValueError: The encoder of a checkpoint has no place for adapters.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        encoder = build_encoder(config.architecture) if config.architecture else _roberta(config)
        self._typed = _takes_types(encoder)
        if config.lora_rank:
            encoder = with_adapters(
                encoder,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
            )
        self.encoder = encoder
        self.register_buffer("tokenizer", torch.zeros(config.tokenizer_bytes, dtype=torch.uint8))
        self._parsed: Any = None

    def forward(
        self,
        ids: Int64[Tensor, "b n"],
        mask: Bool[Tensor, "b n"],
        types: Int64[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b d"]:
        """The sentence vectors of tokens as of `tokens`."""
        typed = {"token_type_ids": types} if self._typed and types is not None else {}
        found = self.encoder(input_ids=ids, attention_mask=mask.long(), **typed)
        hidden = found.last_hidden_state
        if self.config.pool == "mean-all":
            vectors = hidden.mean(dim=1)
        else:
            share = mask.unsqueeze(2).to(hidden.dtype)
            vectors = (hidden * share).sum(dim=1) / share.sum(dim=1).clamp(min=1)
        pooler = getattr(self.encoder, "pooler", None)
        if self.training and pooler is not None:  # unused, but its bias is trained: DDP wants a
            unused = [p for p in pooler.parameters() if p.requires_grad]  # gradient
            vectors = vectors + 0.0 * sum(p.sum() for p in unused)
        return cast(Tensor, vectors)

    def tokens(self, texts: Sequence[Text], *, prompt: bool = False) -> Tokens:
        """Numbers of tokens, on the device of the tower.

        Args:
            texts: Pairs of reports.
            prompt: Whether they are prompts or queries, which are shorter than reports.
        """
        most = self.config.max_tokens
        if prompt:
            most = min(most, self.config.prompt_tokens)
        rows = [self._numbered(text, most) for text in texts]
        longest = max(len(ids) for ids, _ in rows)
        if self.config.pool == "mean-all":
            longest = most
        ids = torch.full((len(rows), longest), self.config.padding)
        types = torch.zeros_like(ids)
        for number, (row, kinds) in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            types[number, : len(row)] = torch.tensor(kinds)
        device = self.encoder.get_input_embeddings().weight.device
        lengths = torch.tensor([len(row) for row, _ in rows]).unsqueeze(1)
        mask = torch.arange(longest) < lengths
        return Tokens(ids.to(device), mask.to(device), types.to(device))

    def encode(self, text: Text) -> list[int]:
        """A pair of texts, cut at the longer: among bytes `<s> a </s></s> b </s>`."""
        return self._numbered(text, self.config.max_tokens)[0]

    def _numbered(self, text: Text, most: int) -> tuple[list[int], list[int]]:
        """The numbers of the tokens, `most` at most, and of their types."""
        if self.config.tokenizer_bytes:
            found = self._encoding(text, most)
            return found.ids, found.type_ids
        parts = [[SPECIALS + byte for byte in part.encode()] for part in text if part]
        parts = _cut_longest(parts, most - 2 * max(len(parts), 1))
        row = [START]
        for number, part in enumerate(parts):
            row += [*([END] if number else []), *part, END]
        row = row if parts else [START, END]
        return row, [0] * len(row)

    def words(self, text: Text) -> list[str]:
        """Each token of a pair as text, with the white space before it; special ones are empty."""
        if not self.config.tokenizer_bytes:
            ids = self.encode(text)
            return [bytes([i - SPECIALS]).decode("latin-1") if i >= SPECIALS else "" for i in ids]
        found = self._encoding(text, self.config.max_tokens)
        parts = [part for part in text if part]
        return [
            "" if number is None else _piece(parts[number], *span)
            for number, span in zip(found.sequence_ids, found.offsets, strict=True)
        ]

    def _encoding(self, text: Text, most: int) -> Any:
        """What the tokenizer makes of a pair, of which either may be empty."""
        if self._parsed is None:
            from tokenizers import Tokenizer

            document = bytes(cast(Tensor, self.tokenizer).cpu().numpy()).decode()
            self._parsed = Tokenizer.from_str(document)
            self._parsed.no_padding()
        self._parsed.enable_truncation(most, strategy="longest_first")
        return self._parsed.encode(*([part for part in text if part] or [""]))

    def load_folder(self, folder: Path) -> None:
        """Take weights and tokenizer from a checkpoint folder of transformers.

        Raises:
            InputError: The folder is not of an encoder of this architecture.
        """
        theirs = read_weights(folder)
        own = self.encoder.state_dict()
        names = {name: name.replace(".base_layer.", ".") for name in own if ".lora_" not in name}
        wrong = [
            name
            for name, other in names.items()
            if "pooler" not in other
            and (other not in theirs or theirs[other].shape != own[name].shape)
        ]
        if wrong:
            raise InputError(
                f"is not the model of the settings: {wrong[0]} differs",
                path=folder,
                remedy="let --training.text-folder settle the settings of the text tower",
            )
        weights = {n: theirs[other] for n, other in names.items() if other in theirs}
        self.encoder.load_state_dict(weights, strict=False)
        document, _ = tokenizer_json(folder, self.config.vocabulary)
        blob = torch.frombuffer(bytearray(document), dtype=torch.uint8)
        if len(blob) != self.config.tokenizer_bytes:
            raise InputError("has another tokenizer than at the start of training", path=folder)
        cast(Tensor, self.tokenizer).copy_(blob)
        self._parsed = None


def folder_config(folder: Path, config: TextConfig) -> TextConfig:
    """`config` with the architecture and sizes of a checkpoint folder.

    Raises:
        InputError: It is not a folder of an encoder of text with a tokenizer, or adapters are
            wanted and it has no place for them.
    """
    found = read_configuration(folder)
    architecture = architecture_of(found)
    document, padding = tokenizer_json(folder, found.vocab_size)
    try:
        room = most_tokens(found, architecture)
        settled = replace(
            config,
            vocabulary=found.vocab_size,
            dim=found.hidden_size,
            depth=getattr(found, "num_hidden_layers", config.depth),
            heads=getattr(found, "num_attention_heads", config.heads),
            hidden=getattr(found, "intermediate_size", getattr(found, "hidden_dim", config.hidden)),
            positions=getattr(found, "max_position_embeddings", config.positions),
            max_tokens=config.max_tokens if room is None else min(config.max_tokens, room),
            norm_eps=getattr(found, "layer_norm_eps", config.norm_eps),
            tokenizer_bytes=len(document),
            padding=padding,
            architecture=architecture,
        )
        with torch.device("meta"):
            TextTower(settled)
    except (KeyError, TypeError, ValueError) as error:
        path = folder / "config.json"
        raise InputError(f"makes no text tower ({reason_of(error)})", path=path) from error
    return settled


def _roberta(config: TextConfig) -> Any:
    transformers = transformers_library()
    return transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            max_position_embeddings=config.positions,
            type_vocab_size=1,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            layer_norm_eps=config.norm_eps,
            initializer_range=initial_std(config.dim),
            bos_token_id=START,
            pad_token_id=PADDING,
            eos_token_id=END,
        )
    )


def _takes_types(encoder: Any) -> bool:
    """Whether an encoder tells the two texts of a pair apart."""
    several = (getattr(encoder.config, "type_vocab_size", 0) or 0) > 1
    return several and "token_type_ids" in inspect.signature(encoder.forward).parameters


def _piece(text: str, start: int, end: int) -> str:
    """A part of a text, with a space where white space is before it."""
    apart = start > 0 and text[start - 1].isspace() and not text[start:end][:1].isspace()
    return (" " if apart else "") + text[start:end]


def _cut_longest(parts: list[list[int]], most: int) -> list[list[int]]:
    """Take tokens off the end of the longer part until all have room."""
    parts = [list(part) for part in parts]
    while (extra := sum(map(len, parts)) - most) > 0:
        lengths = sorted(map(len, parts))
        longest = max(parts, key=len)
        other = lengths[-2] if len(lengths) > 1 else 0
        del longest[len(longest) - min(extra, max(len(longest) - other, 1)) :]
    return parts
