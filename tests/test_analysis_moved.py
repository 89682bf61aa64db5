"""Which tokens changed their experts, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtral_lab.analysis import AnalysisError, moved, moved_share
from mixtral_lab.trace import Trace


def trace(experts, text="abc", n_experts=8):
    logits = torch.zeros(*np.shape(experts)[:2], n_experts)
    return Trace.from_arrays(text, torch.tensor(experts), torch.full(np.shape(experts), 0.5), logits)


BEFORE = [[[2, 5], [0, 1], [3, 4]], [[7, 6], [7, 6], [1, 2]]]
AFTER = [[[5, 2], [0, 2], [3, 4]], [[7, 6], [6, 5], [4, 3]]]


def test_order_does_not_matter_and_membership_does():
    found = moved(trace(BEFORE), trace(AFTER))
    assert found.tolist() == [[False, True, False], [False, True, True]]
    assert not moved(trace(BEFORE), trace(BEFORE)).any()


def test_the_share_is_over_the_tokens_of_all_texts():
    long = trace([[[0, 1]] * 6, [[0, 1]] * 6], "abcdef")
    assert moved_share([trace(BEFORE), long], [trace(AFTER), long]).tolist() == pytest.approx([1 / 9, 2 / 9])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: moved(trace(BEFORE), trace([[[0, 1]] * 3])), "2 and 1 layers"),
        (lambda: moved(trace(BEFORE), trace(AFTER, n_experts=9)), "2 of 8 and 2 of 9 experts"),
        (lambda: moved_share([], []), "0 traces before"),
        (lambda: moved_share([trace(BEFORE)], []), "1 traces before and 0 after"),
    ],
)
def test_traces_that_cannot_be_compared(act, message):
    with pytest.raises(AnalysisError, match=message):
        act()


def test_other_tokens_are_refused():
    before, after = trace(BEFORE), trace(AFTER)
    after.ids[0] += 1
    with pytest.raises(AnalysisError, match="different tokens"):
        moved(before, after)
