"""What serving engines return, read to exactly the experts that went in; everything malformed is named."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_lab.engines import EngineError, read_jsonl, read_sglang, read_vllm

# two tokens, three layers, two choices: `seq layer choice`
ROWS = np.array([[[0, 1], [2, 3], [4, 5]], [[1, 0], [3, 7], [5, 6]]], np.int32)


def npy(rows, **options) -> str:
    file = io.BytesIO()
    np.save(file, rows, **options)
    return base64.b64encode(file.getvalue()).decode()


def raw(rows) -> str:
    return base64.b64encode(np.asarray(rows).astype("<i4").tobytes()).decode()


def vllm(found, **more) -> dict:
    return {"model": "m", "choices": [{"index": 0, "text": "x", "routed_experts": found}], **more}


def routes(seq: int, layers: int, k: int, n_experts: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.array([[random.permutation(n_experts)[:k] for _ in range(layers)] for _ in range(seq)])


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["u1", "<i2", "<i4", ">i4", "<i8"]))
def test_every_form_gives_back_what_went_in(seq, layers, k, kind):
    rows = routes(seq, layers, k, n_experts=8)
    expected = rows.transpose(1, 0, 2).tolist()
    before = (seq + 1) // 2  # tokens of the prompt
    lists = vllm(rows[before:].tolist(), prompt_routed_experts=rows[:before].tolist())
    for found in (
        read_vllm(vllm(npy(rows.astype(kind)))),
        read_vllm(vllm(npy(np.asfortranarray(rows.astype(kind))))),
        read_vllm(lists),
        read_sglang({"routed_experts": raw(rows)}, layers, k),
    ):
        assert found.experts.tolist() == expected
        assert found.experts.dtype == np.int64
        assert found.weights is None and found.logits is None and found.ids is None


def test_vllm_ids_prompt_and_the_last_token():
    both = {"prompt_token_ids": [11], "choices": [{"routed_experts": npy(ROWS), "token_ids": [12]}]}
    assert read_vllm(both)[3:5] == ([11, 12], 1)
    both["choices"][0]["token_ids"] = [12, 13]  # 13 was written last and never fed back
    assert read_vllm(both)[3:5] == ([11, 12], 1)
    both["choices"][0]["token_ids"] = [12, 13, 14]
    with pytest.raises(EngineError, match="experts of 2 tokens were recorded, but the text has 4 tokens"):
        read_vllm(both)
    assert read_vllm(both, ids=[1, 2, 3])[3:5] == ([1, 2], 1)  # what the caller says counts
    inside = {"choices": [{"routed_experts": npy(ROWS), "token_ids": [], "prompt_token_ids": [11, 12]}]}
    assert read_vllm(inside)[3:5] == ([11, 12], 2)
    assert read_vllm(vllm(npy(ROWS), usage={"prompt_tokens": 1, "completion_tokens": 2}))[3:5] == (None, 1)
    with pytest.raises(EngineError, match="prompt has 3 tokens"):
        read_vllm(vllm(npy(ROWS), usage={"prompt_tokens": 3}))


def test_vllm_prompt_start_cuts_the_text_where_the_rows_begin():
    response = {"prompt_token_ids": [11, 12, 13], "choices": [{"routed_experts": npy(ROWS), "token_ids": [14, 15]}]}
    assert read_vllm(response, prompt_start=2)[3:5] == ([13, 14], 1)
    with pytest.raises(EngineError, match="experts of 2 tokens from token 1 on"):
        read_vllm(response, prompt_start=1)
    with pytest.raises(EngineError, match="prompt_start is 4"):
        read_vllm(response, prompt_start=4)


def test_vllm_nested_lists_with_one_part_only():
    answer = {"prompt_token_ids": [11, 12], "choices": [{"routed_experts": ROWS.tolist(), "token_ids": [13, 14, 15]}]}
    found = read_vllm(answer)  # the prompt's routing was not returned
    assert found.ids == [13, 14]
    assert found.n_prompt == 0
    assert found.experts.tolist() == ROWS.transpose(1, 0, 2).tolist()
    found = read_vllm({**answer, "prompt_routed_experts": ROWS.tolist(), "choices": [{"routed_experts": []}]})
    assert found.n_prompt == 2


def test_vllm_any_choice_and_a_clients_object():
    response = vllm(npy(ROWS))
    response["choices"].append({"routed_experts": npy(ROWS[:1])})
    assert read_vllm(SimpleNamespace(model_dump=lambda: response), choice=1).experts.shape == (3, 1, 2)
    for wrong in (2, -1):
        with pytest.raises(EngineError, match=f"no choice {wrong}: the response has 2"):
            read_vllm(response, wrong)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        ("text", "must be the answer's JSON as a dict, but it is str"),
        ({"error": {"message": "no"}}, "no choices, but error"),
        ({"choices": []}, "no choices"),
        ({"choices": ["x"]}, r"choices\[0\] must be"),
        ({"choices": [{"text": "x"}]}, "no routed_experts, but text: start vLLM with --enable-return-routed-experts"),
        (vllm("not base64!"), "not base64"),
        (vllm(base64.b64encode(b"hello").decode()), "not the base64 of a .npy file"),
        (vllm(raw(ROWS)), "not the base64 of a .npy file"),
        (vllm(npy(ROWS.astype(np.float32))), "whole numbers of shape .*float32"),
        (vllm(npy(ROWS > 2)), "bool"),
        (vllm(npy(ROWS[0])), r"of shape \(3, 2\)"),
        (vllm(npy(ROWS[:0])), "of 0 tokens"),
        (vllm(npy(np.array([[[{}]]]), allow_pickle=True)), "object"),
        (vllm(npy(np.array([[[0, -1]]]))), "-1 is no expert"),
        (vllm(npy(np.array([[[0, 70_000]]]))), "70000 is no expert"),
        (vllm(npy(np.array([[[3, 3]]]))), r"Token 0 chose \[3, 3\] in layer 0"),
        (vllm([[[0, 1]], [[0]]]), "ragged"),
        (vllm([[[0, 1], [2, 3]], [[0, 1]]]), "ragged"),
        (vllm([[0, 1]]), r"nested as tokens, layers, choices, but it is int64 of shape \(1, 2\)"),
        (vllm([[["a", "b"]]]), "routed_experts must be whole numbers"),
        (vllm([[[0.5, 1]]]), "float64"),
        (vllm({"data": "x"}), "object"),
        (vllm([]), "of 0 tokens"),
        (vllm([[[0, 1]]], prompt_routed_experts=[[[0, 1], [1, 2]]]), "for 2 layers with 2 choices, the answer's for 1"),
        (vllm(npy(ROWS), prompt_token_ids="ab"), "prompt_token_ids must be a list of token ids"),
        (vllm(npy(ROWS), prompt_token_ids=[1.5]), "prompt_token_ids must be a list of token ids"),
    ],
)
def test_malformed_vllm_responses_are_named(response, says):
    with pytest.raises(EngineError, match=says):
        read_vllm(response)


def test_a_cut_off_array_and_a_boasting_header_are_named():
    data = base64.b64decode(npy(ROWS))
    for wrong in (data[:-4], data + b"0000", data[:20], data[:6], b"", data.replace(b"(2, 3, 2)", b"(2, 9**9, 2)")):
        with pytest.raises(EngineError):
            read_vllm(vllm(base64.b64encode(wrong).decode()))
    with pytest.raises(EngineError, match="was it cut off"):
        read_vllm(vllm(base64.b64encode(data[:-4]).decode()))
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999, 3, 2), }"
    boast = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + ROWS.tobytes()
    with pytest.raises(EngineError, match="was it cut off"):
        read_vllm(vllm(base64.b64encode(boast).decode()))


@given(st.data())
def test_broken_bytes_never_bring_another_error(data):
    whole = bytearray(base64.b64decode(npy(ROWS)))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    text = base64.b64encode(whole[: data.draw(st.integers(0, len(whole)))]).decode()
    for read in (lambda: read_vllm(vllm(text)), lambda: read_sglang({"routed_experts": text}, 3, 2)):
        with contextlib.suppress(EngineError):
            assert read().experts.ndim == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["layer", "token_idx", "experts", "gating_probs", "choices"]), inner)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_read_or_named(value):
    for read in (
        lambda: read_vllm(value),
        lambda: read_vllm(vllm(value)),
        lambda: read_vllm(vllm([[[0, 1]]], prompt_routed_experts=value)),
        lambda: read_vllm(vllm([[[0, 1]]], prompt_token_ids=value, usage=value)),
        lambda: read_sglang(value, 1, 1),
        lambda: read_sglang({"routed_experts": value}, 1, 1),
        lambda: read_jsonl([json.dumps(value)]),
        lambda: read_jsonl([json.dumps({"layer": 0, "token_idx": 0, "experts": value, "gating_probs": value})]),
    ):
        with contextlib.suppress(EngineError):
            assert read().experts.size


def test_sglang_counts_its_tokens():
    assert read_sglang({"routed_experts": raw(ROWS), "prompt_tokens": 1, "completion_tokens": 2}, 3, 2).n_prompt == 1
    assert read_sglang({"routed_experts": raw(ROWS)}, 3, 2, ids=[5, 6, 7]).ids == [5, 6]
    assert read_sglang({"routed_experts": raw(ROWS)}, 3, 2, ids=(5, 6)).ids == [5, 6]
    with pytest.raises(EngineError, match="experts of 2 tokens were recorded, but the text has 5 tokens"):
        read_sglang({"routed_experts": raw(ROWS), "prompt_tokens": 1, "completion_tokens": 4}, 3, 2)


@pytest.mark.parametrize(
    ("meta_info", "n_layers", "k", "says"),
    [
        ([], 3, 2, "meta_info must be"),
        ({"id": 1}, 3, 2, "no routed_experts in base64, but id"),
        ({"text": "x", "meta_info": {"routed_experts": ""}}, 3, 2, 'give its "meta_info" alone'),
        ({"routed_experts": None}, 3, 2, "no routed_experts in base64"),
        ({"routed_experts": "%"}, 3, 2, "not base64"),
        ({"routed_experts": ""}, 3, 2, "has 0 bytes"),
        ({"routed_experts": raw(ROWS)}, 5, 2, "48 bytes, which is no whole number of tokens: with 5 layers"),
        ({"routed_experts": raw(ROWS)}, 0, 2, "must be 1 or more"),
        ({"routed_experts": raw([[[0, 1], [2, 0]]])}, 1, 4, "one expert twice"),
        ({"routed_experts": base64.b64encode(ROWS.astype(">i4").tobytes()).decode()}, 3, 2, "is no expert"),
    ],
)
def test_malformed_sglang_answers_are_named(meta_info, n_layers, k, says):
    with pytest.raises(EngineError, match=says):
        read_sglang(meta_info, n_layers, k)


def lines(*records) -> list[str]:
    return [
        json.dumps(dict(zip(("layer", "token_idx", "experts", "gating_probs"), one, strict=False))) for one in records
    ]


def test_json_lines_by_hand():
    found = read_jsonl(["", *lines((1, 0, [2, 0]), (0, 0, [1, 2])), "\n"])
    assert found.experts.tolist() == [[[1, 2]], [[2, 0]]]
    assert found.weights is None
    # Of the chosen: 0.2 and 0.6 become weights 1/4 and 3/4, best first.
    found = read_jsonl(lines((0, 0, [1, 2], [0.2, 0.6])))
    assert found.experts.tolist() == [[[2, 1]]]
    assert found.weights == pytest.approx(np.array([[[0.75, 0.25]]]))
    assert found.logits is None
    # Of all: expert 3's probability is 0, its logit minus infinity.
    found = read_jsonl(lines((0, 0, [0, 2], [0.2, 0.5, 0.3, 0.0])))
    assert found.experts.tolist() == [[[2, 0]]]
    assert found.weights == pytest.approx(np.array([[[0.6, 0.4]]]))
    assert np.exp(found.logits[0, 0]) == pytest.approx(np.array([0.2, 0.5, 0.3, 0.0]))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 6), st.data())
def test_json_lines_of_drawn_routers(seq, layers, n_experts, data):
    """Softmax of drawn logits, written as lines in any order, comes back as the same choices, weights and logits."""
    k = data.draw(st.integers(1, n_experts - 1))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    logits = random.normal(size=(layers, seq, n_experts))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    records = []
    for layer in range(layers):
        for token in range(seq):
            best = sorted(range(n_experts), key=lambda e: -logits[layer, token, e])[:k]
            records.append((layer, token, random.permutation(best).tolist(), p[layer, token].tolist()))
    found = read_jsonl(lines(*[records[i] for i in random.permutation(len(records))]), ids=list(range(seq)))
    for layer in range(layers):
        for token in range(seq):
            best = sorted(range(n_experts), key=lambda e: -logits[layer, token, e])[:k]
            assert found.experts[layer, token].tolist() == best
            powers = [np.exp(logits[layer, token, e]) for e in best]
            assert found.weights[layer, token].tolist() == pytest.approx(
                [one / sum(powers) for one in powers], rel=1e-5
            )
    shift = found.logits - logits
    np.testing.assert_allclose(shift, shift[..., :1].repeat(n_experts, -1), atol=1e-5)
    assert found.ids == list(range(seq))


@pytest.mark.parametrize(
    ("given_lines", "says"),
    [
        ([], "no line with a record"),
        (["{"], "Line 1 is not JSON"),
        (["", "[1]"], "Line 2 is not a record"),
        (['{"layer": 0, "experts": [1]}'], "Line 1 has no token_idx, but layer, experts"),
        (lines((-1, 0, [1])), "layer is -1"),
        (lines((0, "a", [1])), "token_idx is 'a'"),
        (lines((True, 0, [1])), "layer is True"),
        (lines((0, 0, [])), r"experts are \[\]"),
        (lines((0, 0, [1.5])), r"experts are \[1.5\]"),
        (lines((0, 0, [2, 2])), "one expert twice"),
        (lines((0, 0, [1], ["a"])), "gating_probs are"),
        (['{"layer": 0, "token_idx": 0, "experts": [1], "gating_probs": [NaN]}'], "gating_probs are"),
        (lines((0, 0, [1], [-0.1, 1.1])), "gating_probs are"),
        (lines((0, 0, [0, 1], [0.5])), "2 experts but 1 gating_probs"),
        (lines((0, 0, [0], [3.0, 2.0])), "sum to 5"),
        (lines((0, 0, [0], [0.1, 0.1])), "sum to 0.2"),
        (lines((0, 0, [5], [0.5, 0.5])), "Expert 5 was chosen, but there are gating_probs of 2"),
        (lines((0, 0, [0], [0.0, 1.0])), "all have probability 0"),
        (lines((0, 0, [0]), (0, 0, [1])), "Line 2 tells of layer 0, token 0 again, after line 1"),
        (
            lines((0, 0, [0]), (1, 1, [1])),
            "2 records for 2 layers and 2 tokens, which need 4: layer 0, token 1 is missing",
        ),
        (lines((1, 0, [0])), "layer 0, token 0 is missing"),
        (lines((0, 0, [0]), (0, 1, [0, 1])), "Line 2 has 2 experts and 0 gating_probs, but line 1 has 1 and 0"),
        (
            lines((0, 0, [0], [0.5])) + lines((0, 1, [0])),
            "Line 2 has 1 experts and 0 gating_probs, but line 1 has 1 and 1",
        ),
    ],
)
def test_malformed_json_lines_are_named(given_lines, says):
    with pytest.raises(EngineError, match=says):
        read_jsonl(given_lines)


def test_json_lines_that_boast_of_a_far_token_cost_nothing():
    with pytest.raises(EngineError, match="is missing"):
        read_jsonl(lines((2**30, 2**30, [0])))
