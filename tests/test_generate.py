"""The next-token loop: sampling, stopping, chunks, limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import random_model
from test_parity import mixtral

from mixtral_lab.generate import PromptError, Sampling, generate_ids, pick, prefill, probabilities


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return random_model(mixtral())


def written(model, prompts, new=12, **options):
    return [list(row) for row in zip(*generate_ids(model, prompts, new, **options), strict=True)]


def test_greedy_takes_the_best_and_agrees_with_reading_it_all_again(model):
    prompt = [5, 9, 2, 44]
    new = written(model, [prompt])[0]
    ids = list(prompt)
    for token in new:
        with torch.no_grad():
            assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids.append(token)


@given(st.floats(0.1, 3.0), st.floats(0.05, 1.0), st.integers(1, 12), st.integers(0, 999))
def test_probabilities_against_an_obvious_version(temperature, top_p, top_k, seed):
    torch.manual_seed(seed)
    logits = torch.randn(1, 12)
    got = probabilities(logits, Sampling(temperature, top_p, top_k))[0]
    p = (logits[0].double() / temperature).softmax(-1)
    ranked = sorted(range(12), key=lambda i: -p[i].item())[:top_k]
    total = sum(p[i].item() for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if mass >= top_p:
            break
        kept.append(i)
        mass += p[i].item() / total
    wanted = torch.zeros(12)
    for i in kept:
        wanted[i] = p[i] / sum(p[j] for j in kept)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


def test_temperature_zero_puts_everything_on_the_best():
    assert probabilities(torch.tensor([[0.1, 3.0, 2.9]]), Sampling()).tolist() == [[0.0, 1.0, 0.0]]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampling = Sampling(temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([pick(logits, sampling, [generator]) for _ in range(4000)])
    share = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(share, probabilities(logits, sampling)[0], atol=0.03, rtol=0)


def test_a_seed_repeats_and_a_batch_draws_as_its_first_row_alone(model):
    options = {"sampling": Sampling(temperature=1.5, seed=7)}
    first = written(model, [[3, 4]], **options)
    assert written(model, [[3, 4]], **options) == first
    assert written(model, [[3, 4], [9, 9, 9]], **options)[0] == first[0]
    assert written(model, [[3, 4]], sampling=Sampling(temperature=1.5, seed=8)) != first


def test_a_stop_token_ends_its_own_text_only(model):
    prompts = [[5, 9, 2], [8, 1, 30, 12]]
    free = written(model, prompts, new=16)
    stop = free[0][5]
    rows = written(model, prompts, new=16, stop_ids=[stop])
    end = free[0].index(stop)
    assert rows[0][: end + 1] == free[0][: end + 1]
    assert set(rows[0][end + 1 :]) <= {None}
    if stop not in free[1]:
        assert rows[1] == free[1]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_nothing(model, chunk):
    ids = torch.randint(61, (2, 23))
    whole = prefill(model, ids, model.new_cache(2, 40))
    parts = prefill(model, ids, model.new_cache(2, 40), chunk=chunk)
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)
    assert written(model, ids.tolist(), chunk=chunk) == written(model, ids.tolist())


def test_a_window_goes_on_beyond_the_context_and_without_one_it_stops_there():
    short = {"context": 10, "n_layers": 1}
    assert len(written(random_model(mixtral(window=4, **short)), [[1] * 12], new=5)[0]) == 5
    windowless = random_model(mixtral(window=None, **short))
    assert len(written(windowless, [[1] * 7], new=50)[0]) == 4  # 7 read, 3 more read after being written, 1 unread
    with pytest.raises(PromptError, match="11 tokens, but this model reads at most 10"):
        written(windowless, [[1] * 11])


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "prompt is empty"),
        ([[]], "prompt is empty"),
        ([[1], []], "prompt is empty"),
        ([[1, 61]], "Token id 61 does not exist: this model's ids are 0 to 60"),
        ([[-1]], "Token id -1 does not exist"),
    ],
)
def test_bad_prompts_are_named(model, prompts, says):
    with pytest.raises(PromptError, match=says):
        list(generate_ids(model, prompts, 3))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_sampling_that_means_nothing_is_named(wrong, says):
    with pytest.raises(PromptError, match=says):
        Sampling(**wrong)


def test_nothing_asked_nothing_written(model):
    assert list(generate_ids(model, [[1]], 0)) == []


@pytest.mark.parametrize("sampling", [Sampling(1e-320), Sampling(1e-6), Sampling(2.0, top_p=1e-320)])
def test_the_coldest_draws_are_greedy(sampling):
    logits = torch.tensor([[1.0, 30.0, 2.0, 29.0]])
    assert torch.equal(probabilities(logits, sampling), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    assert pick(logits, sampling, [torch.Generator().manual_seed(0)]).tolist() == [1]
