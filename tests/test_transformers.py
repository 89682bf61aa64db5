"""Folders both ways: ours in transformers, as Mistral's model cards use it, and those that transformers writes in ours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MixtralConfig, pipeline

import mixtral_lab
from mixtral_lab.bundled import folder
from mixtral_lab.checkpoint import UnknownArchitecture
from mixtral_lab.config import PRESETS, Config
from mixtral_lab.tokenizer import BPETokenizer

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


def test_the_text_generation_pipeline_writes_and_answers_as_our_lab(both):
    """By path alone, as in a model card: `pipeline("text-generation", model="data/mini-mixtral")`."""
    _, _, lab = both
    write = pipeline("text-generation", model=str(folder(lab.name)), dtype=torch.float32, device="cpu")
    settings = {"max_new_tokens": 20, "do_sample": False}
    prompt = "Once upon a time"
    assert write(prompt, **settings)[0]["generated_text"] == prompt + lab.generate(prompt, 20)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does the cow say?"}]
    said = write(messages, **settings)[0]["generated_text"]
    assert said[:2] == messages
    assert said[2]["role"] == "assistant"
    assert said[2]["content"].strip() == lab.chat(messages, max_new_tokens=20)


# --- The family at small scale --------------------------------------------------------------------

NAMES = [name for name in PRESETS if not name.startswith("mini")]


def shrunk(config: Config) -> Config:
    """Every width a 64th, two layers, all ratios kept: heads of Nemo's and Small's kind stay narrower than dim / heads."""
    return replace(
        config,
        dim=config.dim // 64,
        n_layers=2,
        head_dim=config.head_dim // 64,
        hidden=config.hidden // 64,
        vocab=config.vocab // 64,
        context=512,
        window=config.window and config.window // 64,
    )


@pytest.fixture(scope="module", params=NAMES)
def random_folder(request, tmp_path_factory):
    """A folder that transformers wrote: random weights of a published shape, and a tokenizer."""
    config, path = shrunk(PRESETS[request.param].config), tmp_path_factory.mktemp(request.param)
    experts = (
        {}
        if config.n_experts is None
        else {"num_local_experts": config.n_experts, "num_experts_per_tok": config.n_choices}
    )
    torch.manual_seed(0)
    theirs = (MixtralConfig if experts else MistralConfig)(
        vocab_size=config.vocab,
        hidden_size=config.dim,
        intermediate_size=config.hidden,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        sliding_window=config.window,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
        initializer_range=0.15,
        **experts,
    )
    AutoModelForCausalLM.from_config(theirs).save_pretrained(path)
    texts = [it["text"] for domain, held in mixtral_lab.excerpts().items() if domain != "chat" for it in held]
    tokenizer = BPETokenizer.train(texts, vocab=config.vocab)
    assert tokenizer.vocab == config.vocab  # so whatever a random model writes is a token
    tokenizer.save(path)
    return path, config


def test_a_small_model_of_every_published_shape_matches_transformers(random_folder):
    path, config = random_folder
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    lab = mixtral_lab.load(path, device="cpu", dtype="float32")
    assert lab.config == config
    ids = tokenizer(TEXT * 4, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 80 and (config.window or 64) == 64
    with torch.no_grad():
        logits = theirs(ids).logits
        assert (logits - lab.logits(ids)).abs().max() <= 1e-4
        assert (logits - mixtral_lab.from_transformers(theirs, tokenizer).logits(ids)).abs().max() <= 1e-4
        written = theirs.generate(**tokenizer(TEXT, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    read = len(lab.tokenizer.encode(TEXT))
    assert tokenizer.decode(written[0, read:], skip_special_tokens=True) == lab.generate(TEXT, 24)


def test_what_sets_nemo_small_and_large_apart_is_there_at_small_scale():
    for name in ("mistral-nemo-12b", "mistral-small-24b"):
        config = shrunk(PRESETS[name].config)
        assert config.n_heads * config.head_dim < config.dim and config.vocab == 2048 and config.window is None
    large = shrunk(PRESETS["mistral-large-123b"].config)
    assert large.group == 12 and large.window is None and not large.tied


def test_a_small_that_reads_images_is_refused_by_folder(tmp_path):
    """As from Mistral Small 3.1 on: `Mistral3ForConditionalGeneration`, the text model under `text_config`."""
    widths = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config=MistralConfig(vocab_size=300, num_key_value_heads=1, **widths),
        vision_config=transformers.PixtralVisionConfig(image_size=28, patch_size=14, **widths),
    )
    transformers.Mistral3ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mistral3"
    with pytest.raises(
        UnknownArchitecture, match="of type 'mistral3' that reads images or sounds as well; this package knows mistral"
    ):
        mixtral_lab.load(tmp_path)
