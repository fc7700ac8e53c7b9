"""The chosen gamma is tried, and answers have room for it."""

from ch16.parts.speculative_decoding.sizes import sizes_for
from common.gpu import detect


def test_the_chosen_gamma_is_tried_and_tokens_are_taken():
    sizes = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=6)
    assert sizes.gammas == (1, 4, 6, 8) and (sizes.loop_tokens, sizes.tokens) == (24, 24)
    longer = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=25)
    assert (longer.loop_tokens, longer.tokens) == (27, 27), "a draft of 25 fits into the answer"
    assert sizes_for(detect("cpu"), quick=False, tokens=None, gamma=100).tokens == 102
    assert sizes_for(detect("cpu"), quick=False, tokens=77, gamma=4).loop_tokens == 77
