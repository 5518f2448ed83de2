"""What the conformance suite does not ask of the pointer head."""

import pytest
import torch

from heed_core import observe
from heed_core.attention.pointer import PointerHead


def test_the_site_states_the_probabilities_of_all_slots():
    head = PointerHead(6, heads=2, extra_slots=1)
    there = torch.tensor([[True, True, True, False]])
    with observe(head) as record:
        logits = head(torch.randn(1, 3, 6), torch.randn(1, 4, 6), memory_mask=there)
    assert logits[..., 3].isneginf().all()
    torch.testing.assert_close(record["probe"], logits.softmax(-1)[:, None])


def test_keys_that_are_kept_give_the_logits_of_the_memory():
    head = PointerHead(6, heads=2, extra_slots=1)
    x, memory = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    assert torch.equal(head(x, keys=head.project(memory)), head(x, memory))


def test_one_head_has_nothing_to_mix():
    head = PointerHead(6, heads=1, extra_slots=2)
    assert sum(p.numel() for p in head.parameters()) == 2 * (6 * 6 + 6)
    assert torch.equal(
        head(torch.randn(1, 2, 6), torch.randn(1, 3, 6))[..., 3:].abs().sum(), torch.zeros(())
    )


@pytest.mark.bad_input
def test_memory_and_keys_exclude_each_other():
    head = PointerHead(6)
    memory = torch.randn(1, 3, 6)
    for given in ({}, {"memory": memory, "keys": head.project(memory)}):
        with pytest.raises(ValueError, match="either memory or keys"):
            head(torch.randn(1, 2, 6), **given)
    with pytest.raises(ValueError, match="mix must be"):
        PointerHead(6, mix="sum")
