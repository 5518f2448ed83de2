"""Caches for decoding token by token.

| cache | keeps | of use for |
| --- | --- | --- |
| `KVCache` | every key and value, in memory reserved once | causal self-attention |
| `WindowCache` | the last `window` keys and values | causal sliding windows |
| `StateCache` | named tensors of fixed size | linear attention, state spaces |
| `CrossCache` | the context's keys and values, computed once | cross-attention |
| `LayerCache`, `StackCache` | the caches of one block, of a stack | `heed_core.blocks.Decoder` |

Contract: feeding a causal module one token at a time with its cache gives what one forward over
the whole sequence gives. Keys are kept *after* rotary codes. `length` counts the tokens seen,
which is also the position of the next one. `crop` takes back tokens (speculative decoding),
`reorder` picks batch rows (beam search), `clone` copies.

A cache holds no gradients: decode under `torch.no_grad()` or `torch.inference_mode()`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def restores_cache(call: Callable[P, R]) -> Callable[P, R]:
    """A call whose `cache` is as before where it raises.

    Else its tokens would stay, and would be there twice once it is made again, corrected.
    """

    @wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        cache = kwargs.get("cache")
        if cache is None or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        before = [(part, dict(vars(part))) for part in _parts(cache)]
        try:
            return call(*args, **kwargs)
        except BaseException:  # also who interrupts it may go on
            for part, held in before:  # nothing held is written to, but for places behind `length`
                vars(part).update(held)
            raise

    return guarded


def _parts(cache: object) -> Iterator[object]:
    """A cache and the caches that it is made of."""
    yield cache
    if isinstance(cache, StackCache):
        for layer in cache.layers:
            yield from _parts(layer)
    elif isinstance(cache, LayerCache):
        yield cache.own
        if cache.context is not None:
            yield cache.context


def _check_length(length: int, current: int) -> None:
    if not 0 <= length <= current:
        raise ValueError(f"length must be between 0 and the {current} tokens kept, got {length}")


def _check_pair(key: Tensor, value: Tensor, like: tuple[int, int, int, int]) -> None:
    """Refuse keys and values that do not fit `like` = (batch, kv_heads, key width, value width)."""
    batch, heads, key_dim, value_dim = like
    for name, tensor, width in (("key", key, key_dim), ("value", value, value_dim)):
        allowed = (batch, heads, key.shape[-2] if key.dim() == 4 else -1, width)
        if tuple(tensor.shape) != allowed:
            raise ValueError(
                f"{name} must be (batch {batch}, kv_heads {heads}, tokens, width {width}) with as "
                f"many tokens as key, got {tuple(tensor.shape)}"
            )
    _check_detached(key=key, value=value)


def _check_detached(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, and a cache holds no gradients; decode under "
                "torch.no_grad()"
            )


def _check_rows(index: Tensor, batch: int) -> None:
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"index must be a 1-d integer tensor of rows below {batch}, got {index.dtype} of shape "
            f"{tuple(index.shape)}"
        )


def check_sequences(cache: KVCache | StateCache, batch: int) -> None:
    """Raise a ValueError if a call has another number of sequences than its cache."""
    if cache.batch != batch:
        raise ValueError(
            f"the cache holds {cache.batch} sequences and the call has {batch}; make the cache for "
            "them, or reorder it"
        )


class KVCache:
    """Keys and values of all tokens so far, in memory that is reserved once.

    Args:
        batch: Sequences decoded together.
        kv_heads: Key/value heads (fewer than query heads with grouped attention).
        max_len: Tokens that fit; one more raises `ValueError`.
        head_dim: Channels of a key.
        value_dim: Channels of a value; `head_dim` if not given.
        dtype: Of keys and values as the module computes them; other dtypes are refused.
        device: Where the memory is.

    Example:
        >>> cache = KVCache(2, 4, 128, 16)
        >>> keys, values = cache.append(torch.randn(2, 4, 3, 16), torch.randn(2, 4, 3, 16))
        >>> keys.shape, cache.length
        (torch.Size([2, 4, 3, 16]), 3)
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        _check_positive(batch=batch, kv_heads=kv_heads, max_len=max_len, head_dim=head_dim)
        self._keys = torch.zeros(batch, kv_heads, max_len, head_dim, dtype=dtype, device=device)
        self._values = torch.zeros(batch, kv_heads, max_len, value_dim, dtype=dtype, device=device)
        self.length = 0

    @property
    def batch(self) -> int:
        """Sequences decoded together."""
        return self._keys.shape[0]

    @property
    def max_len(self) -> int:
        """Tokens that fit."""
        return self._keys.shape[2]

    @property
    def keys(self) -> Float[Tensor, "b g m d"]:
        """The keys so far, a view."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Float[Tensor, "b g m e"]:
        """The values so far, a view."""
        return self._values[:, :, : self.length]

    def append(
        self, key: Float[Tensor, "b g n d"], value: Float[Tensor, "b g n e"]
    ) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m e"]]:
        """Add tokens; all keys and values so far come back, as views of the cache.

        Raises:
            ValueError: The tokens do not fit, or their shape or dtype is not the cache's.
        """
        batch, heads, _, width = self._keys.shape
        _check_pair(key, value, (batch, heads, width, self._values.shape[3]))
        for name, tensor in (("key", key), ("value", value)):
            if tensor.dtype != self._keys.dtype or tensor.device != self._keys.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}, the cache {self._keys.dtype} on "
                    f"{self._keys.device}; create the cache with the dtype and device of the model"
                )
        stop = self.length + key.shape[2]
        if stop > self.max_len:
            raise ValueError(
                f"the cache is full: {self.length} tokens kept and {key.shape[2]} new ones do not "
                f"fit in max_len={self.max_len}; create it longer, or crop it"
            )
        self._keys[:, :, self.length : stop] = key
        self._values[:, :, self.length : stop] = value
        self.length = stop
        return self.keys, self.values

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens only."""
        _check_length(length, self.length)
        self.length = length

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Put row `index[i]` at row i; another number of rows changes the batch."""
        _check_rows(index, self.batch)
        if index.shape[0] == self.batch:
            # Rows of tokens to come need no move.
            self.keys.copy_(self.keys.index_select(0, index))
            self.values.copy_(self.values.index_select(0, index))
        else:
            self._keys = self._keys.index_select(0, index)
            self._values = self._values.index_select(0, index)

    def clone(self) -> KVCache:
        """A copy that shares no memory."""
        twin = copy.copy(self)
        twin._keys, twin._values = self._keys.clone(), self._values.clone()
        return twin


class ScoredKVCache(KVCache):
    """Keys, values and the scores of the keys, which decoding then need not compute again.

    Args:
        batch: Sequences decoded together.
        kv_heads: Key/value heads.
        max_len: Tokens that fit.
        head_dim: Channels of a key and a value.
        dtype: Of keys and values; scores are float32 at least.
        device: Where the memory is.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(batch, kv_heads, max_len, head_dim, dtype=dtype, device=device)
        exact = torch.promote_types(self.keys.dtype, torch.float32)
        self._scores = torch.zeros(batch, kv_heads, max_len, dtype=exact, device=device)

    def append_scored(
        self,
        key: Float[Tensor, "b g n d"],
        value: Float[Tensor, "b g n d"],
        scores: Float[Tensor, "b g n"],
    ) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m d"], Float[Tensor, "b g m"]]:
        """Add tokens; all keys, values and scores so far come back."""
        before = self.length
        keys, values = self.append(key, value)
        self._scores[..., before : self.length] = scores
        return keys, values, self._scores[..., : self.length]

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Put row `index[i]` at row i; another number of rows changes the batch."""
        super().reorder(index)
        self._scores = self._scores.index_select(0, index)

    def clone(self) -> ScoredKVCache:
        """A copy that shares no memory."""
        twin = cast(ScoredKVCache, super().clone())
        twin._scores = self._scores.clone()
        return twin


class WindowCache:
    """Keys and values of the last `window` tokens, for attention that looks back no further.

    A token sees itself and the `window - 1` tokens before it. With one new token, `append` returns
    exactly the keys that it may see; with several, the keys that any of them may see, and the
    caller masks the rest (bottom-right aligned).

    Args:
        batch: Sequences decoded together.
        kv_heads: Key/value heads.
        window: Tokens that a token may see, itself included.
        head_dim: Channels of a key.
        value_dim: Channels of a value; `head_dim` if not given.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        window: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        _check_positive(batch=batch, kv_heads=kv_heads, window=window, head_dim=head_dim)
        self.window = window
        self.keys: Float[Tensor, "b g w d"] = torch.zeros(
            batch, kv_heads, 0, head_dim, dtype=dtype, device=device
        )
        self.values: Float[Tensor, "b g w e"] = torch.zeros(
            batch, kv_heads, 0, value_dim, dtype=dtype, device=device
        )
        self.length = 0

    @property
    def batch(self) -> int:
        """Sequences decoded together."""
        return self.keys.shape[0]

    def append(
        self, key: Float[Tensor, "b g n d"], value: Float[Tensor, "b g n e"]
    ) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m e"]]:
        """Add n tokens; the keys and values that they may see come back: n + window - 1 at most."""
        batch, heads, kept, width = self.keys.shape
        _check_pair(key, value, (batch, heads, width, self.values.shape[3]))
        seen = max(0, kept - (self.window - 1))
        keys = torch.cat([self.keys[:, :, seen:], key], dim=2)
        values = torch.cat([self.values[:, :, seen:], value], dim=2)
        self.keys = torch.cat([self.keys, key], dim=2)[:, :, -self.window :].clone()
        self.values = torch.cat([self.values, value], dim=2)[:, :, -self.window :].clone()
        self.length += key.shape[2]
        return keys, values

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens only.

        Raises:
            ValueError: Tokens that those would see have left the window.
        """
        _check_length(length, self.length)
        dropped = self.length - self.keys.shape[2]
        if length != self.length and dropped > max(0, length - (self.window - 1)):
            raise ValueError(
                f"cannot crop to length {length}: the window of {self.window} has dropped the "
                f"first {dropped} tokens; clone the cache before the tokens that may be taken back"
            )
        self.keys = self.keys[:, :, : length - dropped]
        self.values = self.values[:, :, : length - dropped]
        self.length = length

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Put row `index[i]` at row i; another number of rows changes the batch."""
        _check_rows(index, self.batch)
        self.keys = self.keys.index_select(0, index)
        self.values = self.values.index_select(0, index)

    def clone(self) -> WindowCache:
        """A copy that shares no memory."""
        twin = copy.copy(self)
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        return twin


class StateCache:
    """Named tensors of fixed size that sum up all tokens so far; batch first.

    Args:
        state: Name -> tensor before the first token.

    Example:
        >>> cache = StateCache({"outer": torch.zeros(1, 8, 8)})
        >>> cache.update({"outer": torch.ones(1, 8, 8)}, tokens=1)
        >>> cache["outer"].sum().item(), cache.length
        (64.0, 1)
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            raise ValueError("state must name at least one tensor, got none")
        _check_detached(**state)
        self._state = dict(state)
        self._start = dict(state)
        self.length = 0

    @property
    def batch(self) -> int:
        """Sequences decoded together."""
        return next(iter(self._state.values())).shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def update(self, state: Mapping[str, Tensor], *, tokens: int) -> None:
        """Replace every tensor, `tokens` tokens later; shapes and names stay."""
        if state.keys() != self._state.keys():
            raise ValueError(f"state must name {sorted(self._state)}, got {sorted(state)}")
        for name, tensor in state.items():
            if tensor.shape != self._state[name].shape:
                raise ValueError(
                    f"state {name!r} must keep its shape {tuple(self._state[name].shape)}, got "
                    f"{tuple(tensor.shape)}"
                )
        _check_detached(**state)
        self._state = dict(state)
        self.length += tokens

    def crop(self, length: int) -> None:
        """Go back to the start (0) or stay (`self.length`); a sum gives no single token back."""
        if length == 0:
            self._state, self.length = dict(self._start), 0
        elif length != self.length:
            raise ValueError(
                f"cannot crop {self.length} tokens to {length}: a state holds no single tokens; "
                "only 0 is possible, or clone the cache before the tokens that may be taken back"
            )

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Put row `index[i]` at row i; another number of rows changes the batch."""
        _check_rows(index, self.batch)
        self._state = {name: tensor.index_select(0, index) for name, tensor in self._state.items()}
        self._start = {name: tensor.index_select(0, index) for name, tensor in self._start.items()}

    def clone(self) -> StateCache:
        """A copy that shares no memory."""
        twin = copy.copy(self)
        twin._state = {name: tensor.clone() for name, tensor in self._state.items()}
        twin._start = dict(self._start)
        return twin


class CrossCache:
    """Keys and values of the context of a cross-attention: computed once, used by all steps.

    One row serves any number of sequences: `LayerCache.own.reorder` then multiplies the sequences
    and leaves the context alone.
    """

    def __init__(self) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None

    @property
    def filled(self) -> bool:
        """Whether the context's keys and values are stored."""
        return self._pair is not None

    @property
    def batch(self) -> int | None:
        """Rows of the stored context; None before it is stored."""
        return None if self._pair is None else self._pair[0].shape[0]

    def get(self) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m e"]]:
        """The stored keys and values."""
        if self._pair is None:
            raise ValueError("the cross cache is empty: the first step must be given the context")
        return self._pair

    def store(self, key: Float[Tensor, "b g m d"], value: Float[Tensor, "b g m e"]) -> None:
        """Store the context's keys and values, once."""
        if self._pair is not None:
            raise ValueError("the cross cache is filled; create a new one for another context")
        _check_pair(key, value, (key.shape[0], key.shape[1], key.shape[-1], value.shape[-1]))
        self._pair = (key, value)

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Put row `index[i]` at row i; another number of rows changes the batch."""
        if self._pair is not None:
            key, value = self._pair
            _check_rows(index, key.shape[0])
            self._pair = (key.index_select(0, index), value.index_select(0, index))

    def clone(self) -> CrossCache:
        """A copy; the stored tensors are never written to, so that both may hold them."""
        return copy.copy(self)


class LayerCache:
    """The caches of one block: its own tokens, and the context if it has cross-attention."""

    def __init__(self, own: KVCache | WindowCache, context: CrossCache | None = None) -> None:
        self.own = own
        self.context = context

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.own.length

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens only; the context stays."""
        self.own.crop(length)

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Put row `index[i]` at row i, of tokens and context."""
        self.own.reorder(index)
        if self.context is not None:
            self.context.reorder(index)

    def clone(self) -> LayerCache:
        """A copy that shares no memory that is written to."""
        return LayerCache(self.own.clone(), None if self.context is None else self.context.clone())


class StackCache:
    """The caches of a stack's blocks, in order; every operation goes to all of them."""

    def __init__(self, layers: Iterable[LayerCache]) -> None:
        self.layers = list(layers)
        if not self.layers:
            raise ValueError("layers must hold at least one cache, got none")

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.layers[0].length

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens only."""
        for layer in self.layers:
            layer.crop(length)

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Put row `index[i]` at row i."""
        for layer in self.layers:
            layer.reorder(index)

    def clone(self) -> StackCache:
        """A copy that shares no memory that is written to."""
        return StackCache(layer.clone() for layer in self.layers)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
