"""A trace by itself: made from arrays or from what an engine returned, read by name, honest about what it lacks."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import mixtral_lab
from mixtral_lab import Trace
from mixtral_lab.analysis import assignment_counts, choices
from mixtral_lab.config import LabError
from mixtral_lab.engines import EngineError
from mixtral_lab.figures import tokens_by_expert
from mixtral_lab.tokenizer import TokenizerError
from mixtral_lab.trace import FORMAT, TraceError, frame

STORY = "Once upon a time, there was a little"


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def real(lab):
    """What the model itself did: a prompt, and 12 tokens that it wrote."""
    return lab.trace(STORY, max_new_tokens=12)


def rows_of(trace: Trace) -> np.ndarray:
    """`seq layer choice`, as engines order the axes."""
    return trace.experts.numpy().transpose(1, 0, 2)


def npy(rows: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, rows)
    return base64.b64encode(file.getvalue()).decode()


def vllm_022(trace: Trace) -> dict:
    written = trace.ids[trace.n_prompt :].tolist()
    return {
        "model": "mini-mixtral",
        "prompt_token_ids": trace.ids[: trace.n_prompt].tolist(),
        "choices": [{"token_ids": [*written, 99], "routed_experts": npy(rows_of(trace).astype(np.int32))}],
    }


def vllm_021(trace: Trace) -> dict:
    rows = rows_of(trace).astype(np.int16)
    response = vllm_022(trace)
    response["choices"][0]["routed_experts"] = rows[trace.n_prompt :].tolist()
    return {**response, "prompt_routed_experts": rows[: trace.n_prompt].tolist()}


def sglang(trace: Trace) -> dict:
    found = base64.b64encode(rows_of(trace).astype("<i4").tobytes()).decode()
    written = len(trace) - trace.n_prompt
    return {"routed_experts": found, "prompt_tokens": trace.n_prompt, "completion_tokens": written + 1}


def jsonl(trace: Trace, probabilities: bool) -> str:
    p = trace.routing.logits.softmax(-1).tolist()
    chosen = trace.experts.tolist()
    records = [
        {"layer": layer, "token_idx": token, "experts": chosen[layer][token]}
        | ({"gating_probs": p[layer][token]} if probabilities else {})
        for token in range(len(trace))
        for layer in range(trace.n_layers)
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


def imported(kind: str, trace: Trace, lab, tmp_path) -> Trace:
    """The same run, as if an engine had made it."""
    again = json.loads(json.dumps({"vllm 0.22": vllm_022, "vllm 0.21": vllm_021}.get(kind, sglang)(trace)))
    options = {"tokenizer": lab.tokenizer, "n_experts": 8}
    if kind.startswith("vllm"):
        return Trace.from_vllm(again, **options)
    if kind == "sglang":
        return Trace.from_sglang(again, 8, 2, ids=[*trace.ids.tolist(), 99], **options)
    path = tmp_path / "routing.jsonl"
    path.write_text(jsonl(trace, probabilities=kind == "jsonl with probabilities"))
    return Trace.from_jsonl(path, ids=trace.ids.tolist(), **options)


ENGINES = ("vllm 0.22", "vllm 0.21", "sglang", "jsonl", "jsonl with probabilities")


@pytest.mark.parametrize("kind", ENGINES)
def test_a_real_run_comes_back_exactly(kind, real, lab, tmp_path):
    found = imported(kind, real, lab, tmp_path)
    assert torch.equal(found.experts, real.experts)
    assert found.tokens == real.tokens
    assert torch.equal(found.ids, real.ids)
    assert found.n_experts == 8
    if not kind.startswith("jsonl"):
        assert found.n_prompt == real.n_prompt
    path = found.save(tmp_path / "found.safetensors")
    assert torch.equal(Trace.load(path).experts, real.experts)


@pytest.mark.parametrize("kind", ENGINES[:4])
def test_with_only_the_chosen_experts_what_can_be_computed_is(kind, real, lab, tmp_path):
    found = imported(kind, real, lab, tmp_path)
    assert (assignment_counts(*choices(found)) == assignment_counts(*choices(real))).all()
    figure = tokens_by_expert(found)
    assert "expert" in str(figure.data[0].hovertemplate)
    table = found.frame()
    assert table.expert.tolist() == real.frame().expert.tolist()
    assert table.weight.isna().all() and table.logit.isna().all()
    for asked, site in (("routing", "router.logits"), ("weights", "router.weights")):
        with pytest.raises(TraceError, match=rf"no 'layers\.\*\.{site}' in layer 0: recorded are router.experts"):
            _ = found.routing if asked == "routing" else found["layers.*.router.weights"]


def test_probabilities_of_all_experts_bring_weights_and_logits(real, lab, tmp_path):
    found = imported("jsonl with probabilities", real, lab, tmp_path)
    torch.testing.assert_close(found.routing.weights, real.routing.weights, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.routing.logits, real.routing.logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_without_ids_or_without_a_tokenizer_tokens_are_named(real):
    response = vllm_022(real)
    found = Trace.from_vllm(response)
    assert found.tokens[:2] == (f"#{real.ids[0]}", f"#{real.ids[1]}")
    del response["prompt_token_ids"], response["choices"][0]["token_ids"]
    found = Trace.from_vllm(response)
    assert found.tokens[:2] == ("@0", "@1")
    assert set(found.ids.tolist()) == {-1}
    assert found.n_prompt == len(found)
    assert found.n_experts == int(real.experts.max()) + 1
    assert "mini-mixtral in unknown dtype" in repr(found)


def test_a_later_start_and_explicit_ids(real, lab):
    response = vllm_022(real)
    response["choices"][0]["routed_experts"] = npy(rows_of(real)[3:])
    found = Trace.from_vllm(response, prompt_start=3, tokenizer=lab.tokenizer)
    assert torch.equal(found.experts, real.experts[:, 3:])
    assert found.tokens == real.tokens[3:]
    assert found.n_prompt == real.n_prompt - 3
    with pytest.raises(EngineError, match="they must be as many, or one fewer"):
        Trace.from_vllm(response)


def test_what_does_not_fit_the_model_is_named(real, lab, tmp_path):
    with pytest.raises(TraceError, match="out of range: with 2 experts, they are 0 to 1"):
        Trace.from_vllm(vllm_022(real), n_experts=2)
    with pytest.raises(TokenizerError, match="Token id 5000 does not exist"):
        Trace.from_vllm(vllm_022(real), ids=[5000] * len(real), tokenizer=lab.tokenizer)
    with pytest.raises(EngineError, match=f"experts of {2 * len(real)} tokens were recorded, but the text has"):
        Trace.from_sglang(sglang(real), 4, 2)
    with pytest.raises(TraceError, match="no file"):
        Trace.from_jsonl(tmp_path / "missing.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not text in UTF-8"):
        Trace.from_jsonl(tmp_path / "bytes")


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.booleans())
def test_arrays_come_back_by_name(layers, seq, k, with_weights, with_logits):
    logits = torch.randn(layers, seq, 5)
    best = logits.topk(k)
    weights = best.values.softmax(-1)
    trace = Trace.from_arrays(
        [str(n) for n in range(seq)],
        best.indices,
        weights if with_weights else None,
        logits if with_logits else None,
        n_experts=5,
    )
    assert torch.equal(trace.experts, best.indices)
    assert torch.equal(trace[f"layers.{layers - 1}.router.experts"], best.indices[-1])
    for site, given_values, there in (("weights", weights, with_weights), ("logits", logits, with_logits)):
        if there:
            assert torch.equal(trace[f"layers.*.router.{site}"], given_values)
        else:
            assert trace.get(f"layers.*.router.{site}") is None
    assert len(trace) == trace.n_prompt == seq
    table = frame([trace, trace])
    assert len(table) == 2 * layers * seq * k
    assert table.weight.isna().all() == (not with_weights)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": ["a"]}, r"tokens have shape \(1,\), but experts \(1, 2, 2\) need \(2,\)"),
        ({"ids": [1]}, "ids have shape"),
        ({"experts": torch.zeros(2, 2, dtype=torch.long)}, "whole numbers of shape"),
        ({"experts": torch.zeros(1, 2, 2)}, "float32"),
        ({"experts": torch.zeros(1, 2, 2, dtype=torch.bool)}, "bool"),
        ({"experts": torch.tensor([[[0, -1], [0, 1]]])}, "Expert -1 is out of range"),
        ({"n_experts": 3}, "Expert 3 is out of range: with 3 experts"),
        ({"weights": torch.ones(1, 2, 3)}, r"weights have shape \(1, 2, 3\)"),
        ({"logits": torch.ones(2, 2, 4)}, r"logits have shape \(2, 2, 4\)"),
        ({"logits": torch.ones(1, 2, 4), "n_experts": 5}, "logits have shape"),
    ],
)
def test_arrays_that_contradict_each_other_are_named(change, says):
    fitting = {"tokens": ["a", "b"], "experts": torch.tensor([[[0, 3], [2, 1]]])}
    assert Trace.from_arrays(**fitting).n_experts == 4
    with pytest.raises(TraceError, match=says):
        Trace.from_arrays(**(fitting | change))


def test_a_missing_site_says_where_it_is_missing(lab):
    trace = lab.trace(STORY, sites=["layers.1.residual.after"])
    with pytest.raises(TraceError, match=r"no 'layers\.\*\.residual\.after' in layer 0: recorded are residual\.after"):
        _ = trace["layers.*.residual.after"]
    with pytest.raises(TraceError, match=r"no 'logits': recorded are .*sites=\['logits'\]"):
        _ = trace["logits"]
    with pytest.raises(LabError, match=r"no 'layers\.\*\.router\.experts'"):
        _ = trace.experts


def test_a_value_that_stands_at_two_sites_is_written_at_both(lab, tmp_path):
    whole = lab.trace(STORY, sites="*")
    again = Trace.load(whole.save(tmp_path / "all.safetensors"))
    assert again.recorded.keys() == whole.recorded.keys()
    for name, value in whole.recorded.items():
        assert torch.equal(again.recorded[name], value), name
    assert torch.equal(again["layers.0.residual.after"], again["layers.1.residual.before"])


def test_files_that_are_not_whole_and_folders_that_are_not_there(real, tmp_path):
    with pytest.raises(TraceError, match="There is no folder"):
        real.save(tmp_path / "nowhere" / "trace.safetensors")
    save_file({"ids": torch.arange(3)}, tmp_path / "half.safetensors", metadata={"format": FORMAT})
    with pytest.raises(TraceError, match="not whole"):
        Trace.load(tmp_path / "half.safetensors")


def test_a_prompt_longer_than_the_text():
    with pytest.raises(TraceError, match="n_prompt is 3, but there are 2 tokens"):
        Trace.from_arrays(["a", "b"], torch.tensor([[[0, 1], [2, 1]]]), n_prompt=3)


def test_a_file_beside_it_is_left_alone(real, tmp_path):
    beside = tmp_path / "trace.safetensors.partial"
    beside.write_text("mine")
    real.save(tmp_path / "trace.safetensors")
    assert beside.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
