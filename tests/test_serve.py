"""The server, asked as its users ask it: by requests, by Mistral's and OpenAI's clients, by many at once, and badly."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest
import requests
import schemathesis
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from mistralai.client import Mistral
from mistralai.client.errors import HTTPValidationError, SDKError
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import mixtral_lab
from mixtral_lab.config import LabError
from mixtral_lab.lab import Lab
from mixtral_lab.serve import Limits, make_app, serve
from mixtral_lab.serve.protocol import CANNOT
from mixtral_lab.serve.reply import Trim
from mixtral_lab.tokenizer import MistralCommonTokenizer

QUESTION = [{"role": "user", "content": "Who are you?"}]
PROMPTS = ["Once upon a time", "def add(a, b):", "Was ist ein Router?", "1 + 1 =", "The cat sat on"]


@contextmanager
def serving(lab, api_key=None, **limits):
    """A server on a free port, in a thread; gives its address."""
    app = make_app(lab, Limits(**limits), api_key)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def slowly(lab, seconds=0.01):
    """While open, every step of the model takes so long."""
    hook = lab.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def url(lab):
    with serving(lab) as address:
        yield address


class Apart:
    """`mixtral-lab serve` in a process of its own."""

    def start(self, port):
        command = [sys.executable, "-m", "mixtral_lab.cli", "serve", "mini-mixtral", "--device", "cpu", "--port", port]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("mini-mixtral answers at http://127.0.0.1:"), line
        self.url = line.split()[3].removesuffix("/v1")
        threading.Thread(target=self.process.stdout.read, daemon=True).start()  # or its log would fill the pipe

    def end(self, with_signal):
        self.process.send_signal(with_signal)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def apart():
    server = Apart()
    server.start("0")
    yield server
    server.end(signal.SIGKILL)


def chat(url, expect=200, messages=QUESTION, **fields):
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages, **fields}, timeout=60)
    assert response.status_code == expect, response.text
    return response.json()


def complete(url, expect=200, **fields):
    response = httpx.post(f"{url}/v1/completions", json=fields, timeout=60)
    assert response.status_code == expect, response.text
    return response.json()


def stream(url, path="chat/completions", **fields):
    """The events of a stream, as they stand on the wire."""
    with httpx.stream("POST", f"{url}/v1/{path}", json={"stream": True, **fields}, timeout=60) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def health(url):
    return httpx.get(f"{url}/health").json()


def until(url, seconds=30.0, **expected):
    """Wait until /health says what is expected."""
    end = time.monotonic() + seconds
    while not (found := health(url)).items() >= expected.items():
        assert time.monotonic() < end, f"{found}, expected {expected}"
        time.sleep(0.01)
    return found


# ---------------------------------------------------------------------------------------------------- the documented call


def test_the_documented_call_with_only_the_address_changed(url, lab):
    """https://docs.mistral.ai/api: chat completions, by requests."""
    response = requests.post(
        f"{url}/v1/chat/completions",
        headers={"Content-Type": "application/json", "Accept": "application/json", "Authorization": "Bearer any"},
        json={
            "model": "mistral-large-latest",
            "messages": [{"role": "user", "content": "Who is the most renowned French painter?"}],
        },
        timeout=60,
    )
    assert response.status_code == 200
    found = response.json()
    asked = [{"role": "user", "content": "Who is the most renowned French painter?"}]
    said = lab.chat(asked)
    assert found["object"] == "chat.completion" and found["model"] == "mini-mixtral"
    assert abs(found["created"] - time.time()) < 60
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": said} and choice["finish_reason"] == "stop"
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(lab.tokenizer.chat(asked))
    steps = lab.trace_ids(lab.tokenizer.chat(asked), max_new_tokens=256)
    assert usage["completion_tokens"] == len(steps) - steps.n_prompt + 1  # the trace lacks the end token
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize(
    "messages",
    [
        QUESTION,
        [{"role": "system", "content": "Be brief."}, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": "I am Mini."}, {"role": "user", "content": "What can you do?"}],
        [{"role": "user", "content": "Tell me a story about a dog. \n"}],
        [{"role": "user", "content": "Grüße! 🐕 これは?"}],
    ],
    ids=["question", "system", "turns", "story", "scripts"],
)
def test_the_answer_is_that_of_lab_chat(url, lab, messages):
    said = lab.chat(messages, max_new_tokens=40)
    found = chat(url, messages=messages, max_tokens=40)
    assert found["choices"][0]["message"]["content"] == said
    events = [json.loads(event) for event in stream(url, messages=messages, max_tokens=40)[:-1]]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == said
    assert events[-1]["usage"] == found["usage"]


def test_a_list_of_text_chunks_is_one_message(url, lab):
    chunks = [{"type": "text", "text": "Who are"}, {"type": "text", "text": "you?"}]
    found = chat(url, messages=[{"role": "user", "content": chunks}], max_tokens=20)
    said = lab.chat([{"role": "user", "content": "Who are\n\nyou?"}], max_new_tokens=20)
    assert found["choices"][0]["message"]["content"] == said


def test_a_stream_event_by_event(url, lab):
    *events, last = stream(url, messages=QUESTION, max_tokens=5)
    assert last == "[DONE]"
    events = [json.loads(event) for event in events]
    assert len({event["id"] for event in events}) == 1 and {event["object"] for event in events} == {
        "chat.completion.chunk"
    }
    [choices] = zip(*(event["choices"] for event in events), strict=True)
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""}, {"content": "I"}, {"content": " am"}, {"content": " Mini"},
        {"content": ","}, {"content": " a"}, {"content": ""},
    ]  # fmt: skip
    assert [choice["finish_reason"] for choice in choices] == [None] * 6 + ["length"]
    assert ["usage" in event for event in events] == [False] * 6 + [True]
    assert events[-1]["usage"] == {"prompt_tokens": 8, "completion_tokens": 5, "total_tokens": 13}


# ------------------------------------------------------------------------------------------------------------ completions


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_goes_on_as_in_lab_generate(url, lab, prompt):
    said = lab.generate(prompt, max_new_tokens=20)
    assert complete(url, prompt=prompt, max_tokens=20)["choices"][0]["text"] == said
    assert complete(url, prompt=lab.tokenizer.encode(prompt), max_tokens=20)["choices"][0]["text"] == said
    events = [json.loads(event) for event in stream(url, "completions", prompt=prompt, max_tokens=20)[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == said
    assert {event["object"] for event in events} == {"text_completion"}


def test_several_prompts_and_several_answers(url, lab):
    found = complete(url, prompt=PROMPTS[:3], n=2, max_tokens=8)
    said = [lab.generate(prompt, max_new_tokens=8) for prompt in PROMPTS[:3] for _ in range(2)]
    assert [choice["text"] for choice in found["choices"]] == said
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    assert found["usage"]["prompt_tokens"] == sum(len(lab.tokenizer.encode(prompt)) for prompt in PROMPTS[:3])
    ids = [lab.tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    assert [one["text"] for one in complete(url, prompt=ids, max_tokens=8)["choices"]] == said[:4:2]


def test_a_seed_repeats_a_draw_and_each_answer_has_its_own(url, lab):
    drawn = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_tokens": 12}
    found = complete(url, prompt=PROMPTS[0], n=3, seed=7, **drawn)
    texts = [choice["text"] for choice in found["choices"]]
    alone = [lab.generate(PROMPTS[0], 12, 0.9, 0.95, seed=7 + i, top_k=50) for i in range(3)]
    assert texts == alone and len(set(texts)) == 3
    assert complete(url, prompt=PROMPTS[0], random_seed=8, **drawn)["choices"][0]["text"] == texts[1]
    assert {complete(url, prompt=PROMPTS[0], **drawn)["choices"][0]["text"] for _ in range(4)} != {texts[0]}
    events = [json.loads(event) for event in stream(url, "completions", prompt=PROMPTS[0], n=3, seed=7, **drawn)[:-1]]
    rows = ["".join(c["text"] for e in events for c in e["choices"] if c["index"] == row) for row in range(3)]
    assert rows == texts and ["usage" in event for event in events].index(True) == len(events) - 1


def test_the_coldest_draws_are_greedy(url, lab):
    said = lab.generate(PROMPTS[0], max_new_tokens=8)
    for cold in ({"temperature": 1e-320}, {"temperature": 2.0, "top_p": 1e-320}, {"temperature": 2.0, "top_k": 1}):
        assert complete(url, prompt=PROMPTS[0], max_tokens=8, **cold)["choices"][0]["text"] == said


@pytest.mark.parametrize("stop", [" small", ["zebra", "ixtral", " small"], ["I am Mini, a small Mixtral model."]])
def test_an_answer_ends_before_a_stop_string(url, lab, stop):
    found = chat(url, stop=stop)["choices"][0]
    assert found["message"]["content"] == lab.chat(QUESTION, stop=stop)
    assert found["finish_reason"] == "stop"


def test_an_answer_of_256_tokens_unless_told(lab):
    with serving(lab, new_tokens=300) as url:
        found = complete(url, prompt="Once upon a time there was", temperature=1.5, seed=1)
        assert found["usage"]["completion_tokens"] <= 256
    with serving(lab, new_tokens=3) as url:
        found = complete(url, prompt="Once upon a time there was")
        assert found["usage"]["completion_tokens"] == 3 and found["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("text", ["", " ", "a", "  a  b \n", "\n\n a\tb  c", "  \n"])
def test_trimming_in_pieces_is_strip(text):
    trim = Trim()
    assert "".join(trim.feed(piece) for piece in text) == text.strip()


# ---------------------------------------------------------------------------------------------------------------- clients


@pytest.fixture
def mistral(url):
    with Mistral(api_key="any", server_url=url) as client:
        yield client


@pytest.fixture
def opened(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_client_of_mistral(mistral, lab):
    said = lab.chat(QUESTION)
    found = mistral.chat.complete(model="mistral-small-latest", messages=QUESTION, random_seed=1, n=1)
    assert found.choices[0].message.content == said and found.choices[0].finish_reason == "stop"
    assert found.usage.prompt_tokens == 8 and found.usage.completion_tokens == 12
    chunks = [event.data for event in mistral.chat.stream(model="mistral-small-latest", messages=QUESTION)]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == said
    assert chunks[-1].usage == found.usage and chunks[-1].choices[0].finish_reason == "stop"
    [card] = mistral.models.list().data
    assert card.id == "mini-mixtral" and card.capabilities.completion_chat and not card.capabilities.completion_fim
    assert card.max_context_length == 2048
    assert mistral.models.retrieve(model_id="mini-mixtral") == card


def test_errors_in_the_client_of_mistral(mistral):
    with pytest.raises(HTTPValidationError) as found:
        mistral.chat.complete(model="m", messages=QUESTION, temperature=9)
    assert found.value.status_code == 422
    [detail] = found.value.data.detail
    assert detail.loc == ["temperature"] and detail.msg == "Input should be less than or equal to 2"
    for call in (mistral.chat.complete, mistral.chat.stream):
        with pytest.raises(SDKError, match="'assistant' was expected") as found:
            call(model="m", messages=[*QUESTION, *QUESTION])
        assert found.value.status_code == 400 and json.loads(found.value.body)["type"] == "invalid_request_error"
    with pytest.raises(SDKError, match="no fill-in-the-middle tokens"):
        mistral.fim.complete(model="codestral-latest", prompt="def f():", suffix="return a")
    with pytest.raises(SDKError, match="gives no embeddings"):
        mistral.embeddings.create(model="mistral-embed", inputs=["a"])
    with pytest.raises(SDKError, match="There is no model 'other' here, only mini-mixtral") as found:
        mistral.models.retrieve(model_id="other")
    assert found.value.status_code == 404


def test_the_client_of_openai(opened, lab):
    said = lab.chat(QUESTION)
    found = opened.chat.completions.create(model="gpt-4o", messages=QUESTION, max_completion_tokens=100, seed=1)
    assert found.choices[0].message.content == said and found.choices[0].finish_reason == "stop"
    chunks = list(opened.chat.completions.create(model="gpt-4o", messages=QUESTION, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == said
    assert chunks[-1].usage == found.usage and found.usage.total_tokens == 20
    text = opened.completions.create(model="m", prompt=PROMPTS[0], max_tokens=8)
    assert text.choices[0].text == lab.generate(PROMPTS[0], max_new_tokens=8)
    pieces = opened.completions.create(model="m", prompt=PROMPTS[0], max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text
    [card] = opened.models.list()
    assert card.id == "mini-mixtral" and card == opened.models.retrieve("mini-mixtral")


def test_errors_in_the_client_of_openai(opened):
    with pytest.raises(openai.UnprocessableEntityError, match="temperature: Input should be less than") as found:
        opened.chat.completions.create(model="m", messages=QUESTION, temperature=9)
    assert (found.value.type, found.value.param) == ("invalid_request_error", "temperature")
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError, match="'assistant' was expected"):
            opened.chat.completions.create(model="m", messages=[*QUESTION, *QUESTION], stream=streamed)
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="tools is not supported here: the model was not") as found:
        opened.chat.completions.create(model="m", messages=QUESTION, tools=[tool])
    assert (found.value.code, found.value.param) == ("unsupported", "tools")
    with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
        opened.embeddings.create(model="m", input="a")
    with pytest.raises(openai.NotFoundError, match="There is no model 'other'") as found:
        opened.models.retrieve("other")
    assert found.value.code == "model_not_found"


def test_with_a_key(lab):
    with serving(lab, api_key="secret-é") as url:
        assert health(url)["status"] == "ok"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-é".encode()}):
            for method, path in (("GET", "models"), ("POST", "chat/completions")):
                found = httpx.request(method, f"{url}/v1/{path}", headers=headers)
                assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
                assert found.json()["code"] == "invalid_api_key" and found.json()["object"] == "error"
        right = {"Authorization": "Bearer secret-é".encode()}
        assert httpx.get(f"{url}/v1/models", headers=right).status_code == 200
    with serving(lab, api_key="secret") as url:
        assert Mistral(api_key="secret", server_url=url).models.list().data[0].id == "mini-mixtral"
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="secret").models.list().data[0].id == "mini-mixtral"
        with pytest.raises(SDKError, match="The key is missing or wrong"):
            Mistral(api_key="other", server_url=url).models.list()
        with pytest.raises(openai.AuthenticationError, match="The key is missing or wrong"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="other").models.list()


# --------------------------------------------------------------------------------------------------------- routed experts


def test_routed_experts_are_what_trace_records(url, lab, opened):
    for prompt in PROMPTS:
        fields = {"prompt": prompt, "max_tokens": 9, "return_routed_experts": True, "return_token_ids": True}
        found = mixtral_lab.Trace.from_vllm(complete(url, **fields), tokenizer=lab.tokenizer)
        recorded = lab.trace(prompt, max_new_tokens=8)  # the ninth token is written, but never read
        assert torch.equal(found.experts, recorded.experts) and torch.equal(found.ids, recorded.ids)
        assert found.tokens == recorded.tokens and found.n_prompt == recorded.n_prompt
        assert found.model == "mini-mixtral"
    extra = {"return_routed_experts": True, "return_token_ids": True}
    answer = opened.chat.completions.create(model="m", messages=QUESTION, extra_body=extra)
    found, recorded = mixtral_lab.Trace.from_vllm(answer), lab.trace_ids(lab.tokenizer.chat(QUESTION), 256)
    assert torch.equal(found.experts, recorded.experts) and torch.equal(found.ids, recorded.ids)


def test_routed_experts_of_each_answer_and_of_a_single_token(url, lab):
    fields = {"return_routed_experts": True, "return_token_ids": True, "temperature": 1.0, "n": 3, "seed": 3}
    answer = chat(url, max_tokens=30, **fields)
    assert len({len(choice["token_ids"]) for choice in answer["choices"]}) > 1  # they end at different lengths
    for choice in range(3):
        found = mixtral_lab.Trace.from_vllm(answer, choice)
        whole = answer["prompt_token_ids"] + answer["choices"][choice]["token_ids"][:-1]
        assert found.ids.tolist() == whole
        assert torch.equal(found.experts, lab.trace_ids(whole).experts)
    one = complete(url, prompt="Once", max_tokens=1, return_routed_experts=True)
    assert one["choices"][0]["routed_experts"] == []
    assert torch.equal(mixtral_lab.Trace.from_vllm(one).experts, lab.trace("Once").experts)
    assert "routed_experts" not in str(complete(url, prompt="Once", max_tokens=1))


def test_where_routed_experts_are_refused(url):
    complete(url, 400, prompt="a", stream=True, return_routed_experts=True)
    assert complete(url, 400, prompt=["a", "b"], return_routed_experts=True)["param"] == "return_routed_experts"
    with serving(mixtral_lab.load("mini-mistral", device="cpu")) as dense:
        assert "is a dense model" in chat(dense, 400, return_routed_experts=True)["message"]
        assert chat(dense, max_tokens=5)["usage"]["completion_tokens"] == 5


def test_routing_is_recorded_of_the_right_request(url, lab):
    """Hooks hang on the model that all requests share, yet each gets its own."""
    asked = [{"prompt": prompt, "max_tokens": 12, "return_routed_experts": True} for prompt in PROMPTS]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda fields: complete(url, **fields), asked))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert torch.equal(mixtral_lab.Trace.from_vllm(answer).experts, lab.trace(prompt, max_new_tokens=11).experts)


# ------------------------------------------------------------------------------------------------------ fill in the middle


def test_fill_in_the_middle_where_the_tokenizer_can():
    torch.manual_seed(1)
    tokenizer = MistralCommonTokenizer.from_version("v3")
    config = mixtral_lab.Config(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, hidden=32, vocab=tokenizer.vocab, context=128,
        n_experts=4, n_choices=2,
    )  # fmt: skip
    model = mixtral_lab.Transformer(config)
    lab = Lab(model, tokenizer, "random")
    ids = tokenizer.fill_in("def f(", "return x")
    with serving(lab) as url, Mistral(api_key="any", server_url=url) as client:
        assert client.models.list().data[0].capabilities.completion_fim
        found = client.fim.complete(model="m", prompt="def f(", suffix="return x", max_tokens=6)
        assert found.usage.prompt_tokens == len(ids)
        written = lab.trace_ids(ids, max_new_tokens=6).ids[len(ids) :]
        assert found.choices[0].message.content == tokenizer.decode([tokenizer.encode("a", bos=False)[0], *written])[1:]


# ------------------------------------------------------------------------------------------------------------ what is bad


@pytest.mark.parametrize("field", CANNOT)
def test_what_cannot_be_done_is_refused_and_neutral_values_are_not(url, field):
    if field not in ("suffix",):  # a field of its own elsewhere
        found = chat(url, 400, **{field: "something"})
        assert found["message"].startswith(f"{field} is not supported here: ") and found["param"] == field
    for neutral in CANNOT[field][0]:
        chat(url, max_tokens=1, **{field: neutral})


def test_unknown_fields_are_let_through(url):
    chat(url, max_tokens=1, metadata={"a": 1}, user="me", store=False, stream_options={"include_usage": True})
    chat(url, max_tokens=1, messages=[{"role": "user", "content": "Hi", "name": "Ann", "prefix": False}])


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"messages": []}, 422, "messages: List should have at least 1 item"),
        ({"messages": 3}, 422, "messages: Input should be a valid list"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 422, "Input should be 'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, 422, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": None}]}, 422, "messages.0.content: Input should be a valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}, 422, "should be 'text'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half a surrogate pair"),
        ({"messages": QUESTION * 2}, 400, "Message 2 is by 'user', but 'assistant' was expected"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "a"}]}, 400, "must end with a message by 'user'"),
        ({"temperature": -1}, 422, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": "0"}, 422, "temperature: Input should be a valid number"),
        ({"top_p": 0}, 422, "top_p: Input should be greater than 0"),
        ({"top_k": 0}, 422, "top_k: Input should be greater than or equal to 1"),
        ({"max_tokens": 0}, 422, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 5000}, 400, "max_tokens is 5000; at most 4096 are allowed"),
        ({"max_tokens": 2041}, 400, "The prompt has 8 tokens and max_tokens is 2041, but the model reads at most 2048"),
        ({"n": 0}, 422, "n: Input should be greater than or equal to 1"),
        ({"n": 17}, 400, "17 texts were asked for at once; at most 16"),
        ({"seed": -1}, 422, "seed: Input should be greater than or equal to 0"),
        ({"seed": 1, "random_seed": 2}, 422, "two names for one number"),
        ({"stop": ""}, 422, "stop: String should have at least 1 character"),
        ({"stop": ["a"] * 17}, 422, "stop: "),
        ({"stop": {}}, 422, "stop: Input should be a valid string, or: Input should be a valid list"),
        ({"stream": "yes"}, 422, "stream: Input should be a valid boolean"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "but the model reads at most 2048 together"),
    ],
)  # fmt: skip
def test_bad_requests_get_a_reason_in_the_form_of_the_api(url, fields, status, said):
    body = json.dumps({"messages": QUESTION, **fields})
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    found = response.json()
    assert response.status_code == status and said in found["message"], found
    assert found["object"] == "error" and found["type"] == "invalid_request_error" and found["code"]
    assert ("detail" in found) == (status == 422)


@pytest.mark.parametrize(
    ("prompt", "status"),
    [("", 422), ([], 422), ([[]], 422), ([4096], 400), ([-1], 422), ([1, "a"], 422), (["a"] * 17, 400), (None, 422)],
)
def test_bad_prompts(url, prompt, status):
    assert complete(url, status, prompt=prompt)["object"] == "error"


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{bad", "application/json", 400, "invalid_json"),
        (b"", "application/json", 422, "invalid_request"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json"),
        (b'{"temperature": NaN, "messages": []}', "application/json", 422, "invalid_request"),
        (b'{"messages": []}', "text/plain", 415, "not_json"),
        (b"a=1", "application/x-www-form-urlencoded", 415, "not_json"),
    ],
)
def test_bodies_that_are_no_json(url, content, kind, status, code):
    response = httpx.post(f"{url}/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert (response.status_code, response.json()["code"]) == (status, code), response.text


def test_requests_that_are_too_large(lab):
    with serving(lab, request_bytes=1000, prompt_tokens=20) as url:
        text = "a" * 2000
        assert chat(url, 413, messages=[{"role": "user", "content": text}])["code"] == "too_large"
        pieces = (json.dumps({"prompt": text}).encode() for _ in range(3))  # no Content-Length
        response = httpx.post(f"{url}/v1/completions", content=pieces, headers={"Content-Type": "application/json"})
        assert response.status_code == 413 and "1,000 bytes" in response.json()["message"]
        assert chat(url, 400, messages=[{"role": "user", "content": "word " * 50}])["code"] == "prompt_too_long"
        assert complete(url, prompt="Once", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_paths_that_do_not_exist(url):
    found = httpx.get(f"{url}/v1/nothing")
    assert found.status_code == 404 and found.json()["message"].startswith("There is no GET /v1/nothing")
    found = httpx.get(f"{url}/v1/chat/completions")
    assert found.status_code == 405 and found.headers["allow"] == "POST" and found.json()["object"] == "error"
    assert httpx.get(f"{url}/docs").status_code == 404  # its scripts would come from a CDN


@pytest.fixture(scope="module")
def described(lab):
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(lab, Limits(new_tokens=2)))


OPERATIONS = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/fim/completions"),
    ("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", "/v1/models/{model_id}"), ("GET", "/health"),
]  # fmt: skip
CHECKS = [
    schemathesis.checks.not_a_server_error, status_code_conformance, content_type_conformance,
    response_headers_conformance, response_schema_conformance, negative_data_rejection,
]  # fmt: skip


def test_every_operation_is_described_and_tried(described):
    found = {(method.upper(), path) for path, methods in described.raw_schema["paths"].items() for method in methods}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*one, GenerationMode.POSITIVE) for one in OPERATIONS]
    + [(*one, GenerationMode.NEGATIVE) for one in OPERATIONS if one[0] == "POST"],
    ids=str,
)
def test_whatever_is_sent_the_answer_is_as_described(described, method, path, mode):
    """schemathesis draws requests from the OpenAPI description, fitting ones and others."""
    operation = described[path][method]
    seen = []

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def every(case):
        seen.append(case.call_and_validate(checks=CHECKS).status_code)

    every()
    if "{" in path:  # no model has a name that is drawn; but "." leads to the list of them
        assert 404 in seen
        return
    answered = path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
    assert (200 in seen) == (answered and mode.is_positive), sorted(set(seen))


# ---------------------------------------------------------------------------------------------------------- many at once


def test_32_clients_at_once_each_get_their_own_answer(apart, lab):
    url = apart.url
    messages = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a in range(8) for b in range(4)]
    said = [lab.chat(one, max_new_tokens=6) for one in messages]
    assert len(set(said)) > 8

    def client(number):
        found = []
        with httpx.Client(timeout=60) as session:
            for turn in range(2):
                which = (number + 5 * turn) % 32
                body = {"messages": messages[which], "max_tokens": 6}
                answer = session.post(f"{url}/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                found.append((answer.json()["choices"][0]["message"]["content"], said[which]))
        return found

    before = health(url)
    with ThreadPoolExecutor(32) as pool:
        results = [pair for pairs in pool.map(client, range(32)) for pair in pairs]
    assert len(results) == 64 and all(found == expected for found, expected in results)
    after = health(url)
    assert after["finished"] - before["finished"] == 64 and after["failed"] == before["failed"]


def test_requests_take_turns(lab):
    """A short answer that comes later is there before a long one that is being written."""
    with serving(lab) as url, slowly(lab), ThreadPoolExecutor(1) as pool:
        long = pool.submit(complete, url, prompt="Once upon a time", max_tokens=40)
        until(url, active=1)
        complete(url, prompt="Once", max_tokens=3)
        assert not long.done()
        assert long.result()["usage"]["completion_tokens"] == 40


def test_a_full_line_turns_requests_away(lab):
    fields = {"prompt": "Once upon a time", "max_tokens": 30}
    with serving(lab, active=1, waiting=1) as url, slowly(lab), ThreadPoolExecutor(2) as pool:
        first = pool.submit(complete, url, **fields)
        until(url, active=1)
        second = pool.submit(complete, url, **fields)
        until(url, waiting=1)
        third = httpx.post(f"{url}/v1/completions", json=fields)
        assert third.status_code == 429 and int(third.headers["retry-after"]) > 0
        assert third.json()["code"] == "line_full" and third.json()["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="a", max_retries=0).completions.create(model="m", prompt="a")
        assert first.result() and second.result()
        assert until(url, finished=2)["turned_away"] == 2


def test_a_request_that_waits_too_long_is_given_up(lab):
    fields = {"prompt": "Once upon a time", "max_tokens": 30}
    with serving(lab, active=1, wait=0.1) as url, slowly(lab), ThreadPoolExecutor(1) as pool:
        first = pool.submit(complete, url, **fields)
        until(url, active=1)
        for streamed in (False, True):
            second = httpx.post(f"{url}/v1/completions", json=fields | {"stream": streamed})
            assert second.status_code == 503 and int(second.headers["retry-after"]) > 0
            assert second.json()["code"] == "waited_too_long"
        assert first.result()["usage"]["completion_tokens"] == 30
        assert until(url, finished=1, expired=2, waiting=0)


def test_who_leaves_is_written_for_no_longer(lab):
    fields = {"prompt": "Once upon a time", "max_tokens": 2000}
    with serving(lab, active=1) as url, slowly(lab):
        with httpx.stream("POST", f"{url}/v1/completions", json=fields | {"stream": True}) as response:
            lines = response.iter_lines()  # held: once it is collected, httpx hangs up
            next(lines)
            until(url, active=1)
        until(url, active=0, left=1)
        with suppress(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=fields, timeout=0.3)
        written = until(url, active=0, left=2)["tokens"]
        with httpx.stream("POST", f"{url}/v1/completions", json=fields | {"stream": True}) as response:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=fields, timeout=0.3)  # leaves while in line
            assert until(url, left=3, waiting=0, active=1)
        written = until(url, active=0, left=4)["tokens"]
        time.sleep(0.2)
        assert health(url)["tokens"] == written < 200
        assert complete(url, prompt="Once", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_model_that_fails_ends_one_request_alone(lab):
    def fail(_module, args):
        if args[0].shape[-1] > 1 and args[0].shape[-1] != 4:
            return
        raise RuntimeError("out of memory")

    hook = lab.model.register_forward_pre_hook(fail)
    try:
        with serving(lab) as url:
            found = complete(url, 500, prompt="Once upon a time there was a dog", max_tokens=5)
            assert found["type"] == "server_error" and "out of memory" in found["message"]
            *_, last = stream(url, "completions", prompt="Once upon a time there was a dog", max_tokens=5)
            assert json.loads(last)["error"]["code"] == "generation_failed"
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="a", max_retries=0)
            with pytest.raises(openai.APIError, match="out of memory"):
                list(client.chat.completions.create(model="m", messages=QUESTION, stream=True))
            hook.remove()
            assert complete(url, prompt="Once", max_tokens=2)["usage"]["completion_tokens"] == 2
            assert health(url)["failed"] == 3
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------------------- the command line


def test_killed_and_started_again_on_the_same_port(apart):
    url, port = apart.url, apart.url.rpartition(":")[2]
    said = chat(url, max_tokens=20)["choices"][0]["message"]["content"]
    fields = {"prompt": "Once", "max_tokens": 2000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=fields) as response:
        lines = response.iter_lines()
        next(lines)
        assert apart.end(signal.SIGKILL) == -signal.SIGKILL  # in the middle of an answer
        with pytest.raises(httpx.HTTPError):
            list(lines)
    apart.start(port)
    assert apart.url == url and chat(url, max_tokens=20)["choices"][0]["message"]["content"] == said
    assert apart.end(signal.SIGTERM) in (0, -signal.SIGTERM)


def test_a_port_that_is_taken(lab):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(LabError, match=r"Address already in use\. Choose"),
    ):
        serve(lab, taken.getsockname()[1])
    with pytest.raises(LabError, match="port 70000: "):
        serve(lab, 70000)


def test_the_open_network_needs_a_key(lab):
    for host in ("0.0.0.0", "192.0.2.1", "example.org"):
        with pytest.raises(LabError, match="give a key"):
            serve(lab, 0, host)
    with pytest.raises(LabError, match="Cannot listen on 192"):
        serve(lab, 0, "192.0.2.1", api_key="secret")  # with a key it tries: the address is not this machine's
    with pytest.raises(LabError, match="active is 0"):
        Limits(active=0)


def test_streams_that_are_read_to_the_end_are_finished(lab):
    with serving(lab) as url:
        for _ in range(6):
            assert stream(url, "completions", prompt="Once", max_tokens=3)[-1] == "[DONE]"
        until(url, active=0, finished=6, left=0)


def test_a_short_prompt_is_not_cut_short_by_a_long_one(url, lab):
    prompt, long = "Once upon a time, there was a little", "one " * 2035
    alone = complete(url, prompt=prompt, temperature=0)["choices"][0]
    first, second = complete(url, prompt=[prompt, long], temperature=0)["choices"]
    assert first["text"] == alone["text"] and first["finish_reason"] == alone["finish_reason"]
    assert second["finish_reason"] == "length"
