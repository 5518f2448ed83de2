"""Caches alone; that decoding with them equals a full forward is tested with the blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_core.cache import CrossCache, KVCache, LayerCache, StackCache, StateCache, WindowCache


def pair(tokens: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, tokens, 4), torch.randn(batch, 3, tokens, 5)


def kv_cache(max_len: int = 12, batch: int = 2) -> KVCache:
    return KVCache(batch, 3, max_len, 4, value_dim=5)


@given(steps=st.lists(st.integers(0, 4), max_size=6))
@settings(max_examples=30, deadline=None)
def test_append_gives_everything_so_far(steps: list[int]) -> None:
    cache = kv_cache(max_len=sum(steps) + 1)
    keys, values = pair(sum(steps))
    done = 0
    for step in steps:
        got = cache.append(keys[:, :, done : done + step], values[:, :, done : done + step])
        done += step
        assert cache.length == done
        assert torch.equal(got[0], keys[:, :, :done])
        assert torch.equal(got[1], values[:, :, :done])


def test_memory_is_reserved_once() -> None:
    cache = kv_cache()
    places = set()
    for _ in range(4):
        keys, values = cache.append(*pair(3))
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1


def test_crop_then_append_overwrites() -> None:
    cache = kv_cache()
    keys, values = pair(6)
    cache.append(keys, values)
    cache.crop(2)
    assert cache.length == 2
    new_keys, new_values = pair(3)
    got, _ = cache.append(new_keys, new_values)
    assert torch.equal(got, torch.cat([keys[:, :, :2], new_keys], dim=2))


@pytest.mark.parametrize("index", [[1, 0], [1, 1], [0], [1, 0, 1, 1]])
def test_reorder_picks_rows(index: list[int]) -> None:
    cache = kv_cache()
    keys, values = pair(4)
    cache.append(keys, values)
    cache.reorder(torch.tensor(index))
    assert cache.batch == len(index)
    assert torch.equal(cache.keys, keys[index])
    assert torch.equal(cache.values, values[index])
    cache.append(*pair(2, batch=len(index)))
    assert torch.equal(cache.keys[:, :, :4], keys[index])


def test_clones_live_apart() -> None:
    cache = kv_cache()
    keys, values = pair(3)
    cache.append(keys, values)
    twin = cache.clone()
    twin.append(*pair(2))
    twin.keys.zero_()
    assert cache.length == 3
    assert torch.equal(cache.keys, keys)


@given(window=st.integers(1, 5), steps=st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_window_returns_what_new_tokens_may_see(window: int, steps: list[int]) -> None:
    cache = WindowCache(2, 3, window, 4, value_dim=5)
    keys, values = pair(sum(steps))
    done = 0
    for step in steps:
        first = max(0, done - (window - 1))
        got = cache.append(keys[:, :, done : done + step], values[:, :, done : done + step])
        done += step
        assert torch.equal(got[0], keys[:, :, first:done])
        assert torch.equal(got[1], values[:, :, first:done])
        assert cache.length == done
        assert cache.keys.shape[2] == min(window, done)


def test_window_crops_only_where_nothing_is_missing() -> None:
    cache = WindowCache(2, 3, 4, 4, value_dim=5)
    keys, values = pair(9)
    cache.append(keys[:, :, :4], values[:, :, :4])
    cache.crop(2)
    got, _ = cache.append(keys[:, :, 4:5], values[:, :, 4:5])
    assert torch.equal(got, torch.cat([keys[:, :, :2], keys[:, :, 4:5]], dim=2))
    cache.append(keys[:, :, 5:], values[:, :, 5:])
    assert cache.length == 7
    # the window holds tokens 3 ... 6: those of a token at 6 are there, those of one at 5 are not
    cache.clone().crop(6)
    with pytest.raises(ValueError, match="window of 4 has dropped the first 3"):
        cache.crop(5)
    twin = cache.clone()
    twin.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(twin.keys, cache.keys[[1, 1, 0]])
    twin.append(*pair(1, batch=3))
    assert cache.length == 7


def test_state_cache_updates_goes_back_and_picks_rows() -> None:
    start = {"outer": torch.zeros(2, 4, 4), "sum": torch.zeros(2, 4)}
    cache = StateCache(start)
    state = {"outer": torch.randn(2, 4, 4), "sum": torch.randn(2, 4)}
    cache.update(state, tokens=3)
    twin = cache.clone()
    twin.reorder(torch.tensor([1, 0]))
    assert torch.equal(twin["sum"], state["sum"].flip(0))
    assert torch.equal(cache["sum"], state["sum"])
    cache.crop(3)
    assert cache.length == 3
    with pytest.raises(ValueError, match="a state holds no single tokens"):
        cache.crop(1)
    cache.crop(0)
    assert torch.equal(cache["outer"], start["outer"])
    assert twin.length == 3


def test_cross_cache_is_filled_once() -> None:
    cache = CrossCache()
    assert not cache.filled
    assert cache.batch is None
    with pytest.raises(ValueError, match="is empty"):
        cache.get()
    keys, values = pair(5)
    cache.store(keys, values)
    twin = cache.clone()
    twin.reorder(torch.tensor([1]))
    assert torch.equal(twin.get()[0], keys[1:])
    assert torch.equal(cache.get()[0], keys)
    with pytest.raises(ValueError, match="is filled"):
        cache.store(keys, values)


def test_stack_cache_does_everything_to_every_layer() -> None:
    stack = StackCache([LayerCache(kv_cache(), CrossCache()), LayerCache(kv_cache())])
    for layer in stack.layers:
        layer.own.append(*pair(4))
    stack[0].context.store(*pair(6))
    twin = stack.clone()
    stack.crop(3)
    stack.reorder(torch.tensor([1, 0]))
    assert [layer.length for layer in stack.layers] == [3, 3]
    assert torch.equal(stack[1].own.keys, twin[1].own.keys[:, :, :3].flip(0))
    assert torch.equal(stack[0].context.get()[0], twin[0].context.get()[0].flip(0))
    assert twin.length == 4
    assert len(stack) == 2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: KVCache(2, 3, 0, 4), "max_len must be at least 1"),
        (lambda: WindowCache(2, 3, 0, 4), "window must be at least 1"),
        (lambda: kv_cache().append(*pair(13)), "13 new ones do not fit in max_len=12"),
        (lambda: kv_cache().append(pair(2)[0], pair(3)[1]), "value must be"),
        (lambda: kv_cache().append(*pair(2, batch=1)), "key must be \\(batch 2"),
        (lambda: kv_cache().append(*(x.double() for x in pair(2))), "the cache torch.float32"),
        (
            lambda: kv_cache().append(*(x.requires_grad_() for x in pair(2))),
            "decode under torch.no_grad",
        ),
        (lambda: kv_cache().crop(1), "between 0 and the 0"),
        (lambda: kv_cache().reorder(torch.tensor([0.0])), "index must be a 1-d integer"),
        (lambda: kv_cache().reorder(torch.tensor([[0]])), "index must be a 1-d integer"),
        (lambda: StateCache({}), "at least one"),
        (
            lambda: StateCache({"a": torch.zeros(1)}).update({"b": torch.zeros(1)}, tokens=1),
            "must name \\['a'\\]",
        ),
        (
            lambda: StateCache({"a": torch.zeros(1)}).update({"a": torch.zeros(2)}, tokens=1),
            "keep its shape",
        ),
        (lambda: StackCache([]), "at least one"),
    ],
)
def test_misuse_is_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
