"""The folders in data/ as a transformers user meets them, written as in Mistral's model cards."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtral_lab
from mixtral_lab.bundled import folder

TEXT = "Once upon a time, there was a little house. The answer is 12 + 30 = 42.\n"


@pytest.fixture(scope="module", params=["mini-mixtral", "mini-mistral"])
def both(request):
    path = folder(request.param)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return tokenizer, model, mixtral_lab.load(request.param, device="cpu", dtype="float32")


def test_the_same_ids_and_logits_also_past_the_window(both):
    tokenizer, model, lab = both
    ids = tokenizer(TEXT * 8, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == lab.tokenizer.encode(TEXT * 8)
    assert ids.shape[1] > 200  # mini-mistral's window is 128
    with torch.no_grad():
        assert (model(ids).logits - lab.logits(ids)).abs().max() <= 1e-4


def test_chat_template_and_generate_give_what_our_chat_gives(both):
    tokenizer, model, lab = both
    messages = [
        {"role": "user", "content": "What does the cow say?"},
        {"role": "assistant", "content": "The cow says moo."},
        {"role": "user", "content": "Tell me a story."},
    ]
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    assert inputs["input_ids"][0].tolist() == lab.tokenizer.chat(messages)
    written = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() == lab.chat(messages, max_new_tokens=40)
