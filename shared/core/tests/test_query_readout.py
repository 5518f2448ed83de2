"""Read-outs by queries: the decoder layer of torch, and fixed maps."""

import pytest
import torch

from heed_core import masks, observe
from heed_core.attention.query_readout import CrossAttentionReadout, factorised_pool
from heed_core.positions import masked_sine_grid, sine_grid
from heed_core.weights import attention_from_torch


def test_queries_do_not_see_each_other():
    torch.manual_seed(0)
    readout, tokens = CrossAttentionReadout(3, 8, heads=2, ffn=16).eval(), torch.randn(2, 5, 8)
    before = readout(tokens)
    with torch.no_grad():
        readout.codes[1] += 1.0
    after = readout(tokens)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_it_is_a_decoder_layer_of_torch_without_self_attention():
    torch.manual_seed(0)
    readout = CrossAttentionReadout(3, 8, heads=2, ffn=16).double().eval()
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    readout.attention.load_state_dict(attention_from_torch(theirs.state_dict()))
    tokens, codes = torch.randn(2, 5, 8).double(), torch.randn(5, 8).double()
    query = (readout.query_norm.bias + readout.codes).expand(2, -1, -1)
    state = theirs(query, tokens + codes, tokens)[0]
    state = state + readout.feed(readout.feed_norm(state))
    found = readout(tokens, positions=codes)
    torch.testing.assert_close(found, readout.final_norm(state), rtol=1e-12, atol=1e-12)


def test_weights_of_a_query_sum_to_one():
    readout = CrossAttentionReadout(3, 8, heads=2, ffn=16).eval()
    with observe(readout) as record:
        readout(torch.randn(2, 5, 8))
    torch.testing.assert_close(record["attention.attend"].sum(-1), torch.ones(2, 2, 3))


def test_fixed_maps_pool_like_a_double_loop():
    features, maps = torch.randn(2, 5, 3), torch.randn(4, 5)
    found = factorised_pool(features, maps)
    for b in range(2):
        for q in range(4):
            wanted = sum(maps[q, i] * features[b, i] for i in range(5))
            torch.testing.assert_close(found[b, q], wanted)


@pytest.mark.bad_input
def test_maps_of_another_size_are_refused():
    with pytest.raises(ValueError, match="maps must be"):
        factorised_pool(torch.zeros(1, 5, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="queries and ffn"):
        CrossAttentionReadout(0, 8, heads=2, ffn=4)


def test_the_code_of_a_padded_picture_counts_its_real_cells():
    whole = masked_sine_grid(torch.ones(1, 3, 5, dtype=torch.bool), 8)
    torch.testing.assert_close(whole[0], sine_grid((3, 5), 8, normalise=True))
    padded = masks.padding(torch.tensor([3]), 5)[:, 0].expand(1, 3, 5)
    torch.testing.assert_close(
        masked_sine_grid(padded, 8)[0, :, :3], sine_grid((3, 3), 8, normalise=True)
    )
