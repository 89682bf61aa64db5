"""Maps hold the patterns that went in, head by head, and nothing above the diagonal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtral_lab.figures.attention import attention_patterns, attention_reach, rotary_angles
from mixtral_lab.figures.colours import FigureError

TOKENS = ["<s>", "a<b", "␣c", "d$", "e"]
KV, GROUP = 4, 2


@pytest.fixture
def pattern():
    shares = torch.rand(KV, GROUP, len(TOKENS), len(TOKENS), generator=torch.Generator().manual_seed(0)).tril()
    return (shares / shares.sum(-1, keepdim=True)).numpy()


def test_every_head_has_its_map(pattern):
    figure = attention_patterns(pattern, TOKENS, layer=3, model="made-up", dtype="float32")
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [f"<b>head {2 * kv + member} (kv {kv})</b>" for member in range(GROUP) for kv in range(KV)]
    shown = iter(figure.data)
    for member in range(GROUP):
        for kv in range(KV):
            z = np.array(next(shown).z)
            assert np.isnan(z[np.triu_indices(len(TOKENS), 1)]).all()
            np.testing.assert_allclose(np.nan_to_num(z), pattern[kv, member])
    assert figure.layout.coloraxis.cmax == pytest.approx(pattern[..., 1:].max())


@pytest.mark.parametrize("heads", [[5], [7, 0], [1, 2, 3]])
def test_some_heads_alone(pattern, heads):
    figure = attention_patterns(pattern, TOKENS, layer=0, heads=heads)
    flat = pattern.reshape(KV * GROUP, len(TOKENS), len(TOKENS))
    for head, trace in zip(heads, figure.data, strict=True):
        np.testing.assert_allclose(np.nan_to_num(np.array(trace.z)), flat[head])
        assert trace.text[1][0] == "token 1 “a&lt;b” looks at 0 “&lt;s&gt;”"
        assert f"head {head}" in trace.hovertemplate
    named = figure.layout.xaxis.ticktext is not None
    assert named == (len(heads) <= 2)


def test_one_token_is_a_map_too():
    assert len(attention_patterns(np.ones((1, 1, 1, 1)), ["a"], 0).data) == 1


def test_what_cannot_be_drawn(pattern):
    with pytest.raises(FigureError, match="4 tokens twice"):
        attention_patterns(pattern, TOKENS[:-1], 0)
    for heads in ([8], [-1], []):
        with pytest.raises(FigureError, match="there are 0 to 7"):
            attention_patterns(pattern, TOKENS, 0, heads=heads)
    with pytest.raises(FigureError, match="groups of 2"):
        attention_reach(np.ones((2, 3)), group=2)


def test_angles_and_reach_are_those_given():
    cosines = np.cos(np.outer([1.0, 0.1], np.arange(7)))
    np.testing.assert_allclose(np.array(rotary_angles(cosines, 10.0).data[0].z), cosines)
    distance = np.array([[1.0, 20.4], [3.6, 0.0]])
    (heat,) = attention_reach(distance, group=2).data
    np.testing.assert_allclose(np.array(heat.z), distance[::-1])  # layer 0 is at the bottom
    assert [list(row) for row in heat.text] == [["4", "0"], ["1", "20"]]
