"""A model of transformers as a lab: the same logits and routing, on the same memory; all else refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from reference import twin
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mixtral_lab
from mixtral_lab.bundled import folder
from mixtral_lab.checkpoint import DeviceError, DtypeError, ExtraTensors, MissingTensors, UnknownArchitecture
from mixtral_lab.config import Config, ConfigError
from mixtral_lab.edit import ablate
from mixtral_lab.hugging_face import from_transformers
from mixtral_lab.model.moe import bank
from mixtral_lab.tokenizer import TokenizerError

MIXTRAL = dict(
    dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=14, hidden=20, vocab=61, context=256,
    n_experts=5, n_choices=2, window=6,
)  # fmt: skip
DENSE = {"n_experts": None, "n_choices": None}
SMALL = dict(
    vocab_size=61, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256,
)  # fmt: skip
QUESTION = [{"role": "user", "content": "Who are you?"}]


def mixtral(**changes):
    return twin(Config(**(MIXTRAL | changes)))[0]


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**(SMALL | {"initializer_range": 0.15} | changes))).eval()


MODELS = {
    "mixtral with a window": lambda: mixtral(),
    "mixtral without": lambda: mixtral(window=None),
    "mixtral, tied, one choice": lambda: mixtral(tied=True, n_choices=1),
    "mistral with a window": lambda: mixtral(**DENSE),
    "mistral, tied": lambda: mixtral(**DENSE, tied=True, window=None),
    "llama": lambda: llama(),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS.keys())
def test_the_same_logits_and_greedy_tokens_also_past_the_window(made):
    theirs = made()
    lab = mixtral_lab.from_transformers(theirs)
    ids = torch.randint(3, 61, (2, 40))
    with torch.no_grad():
        assert (lab.logits(ids) - theirs(ids).logits).abs().max() <= 1e-4
        theirs.generation_config.eos_token_id = None
        written = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    lab.tokenizer.stop_ids = ()
    prompts = [" ".join(map(str, row)) for row in ids.tolist()]
    assert [list(map(int, text.split())) for text in lab.generate(prompts, 24)] == written[:, 40:].tolist()


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("window", [6, None])
def test_the_same_router_logits_experts_and_weights(window, experts):
    theirs, _ = twin(Config(**(MIXTRAL | {"window": window})), experts=experts)
    ids = torch.randint(3, 61, (40,))
    with torch.no_grad():
        routers = theirs(ids[None], output_router_logits=True).router_logits
    ours = mixtral_lab.from_transformers(theirs).trace_ids(ids.tolist()).routing
    assert len(routers) == ours.logits.shape[0] == 2
    for layer, logits in enumerate(routers):
        assert (ours.logits[layer] - logits).abs().max() <= 1e-4
        best = logits.softmax(-1).topk(2)  # as their router does it: softmax over all, then the best, made to sum to 1
        assert torch.equal(ours.experts[layer], best.indices)
        assert (ours.weights[layer] - best.values / best.values.sum(-1, keepdim=True)).abs().max() <= 1e-4


def test_in_bfloat16_logits_differ_by_its_rounding_alone():
    """Both round to 8 bits after every operation, not after the same ones: a hundredth of the logits' size."""
    theirs = mixtral(n_choices=5).bfloat16()  # all experts: no near tie of the router can go the other way
    ids = torch.randint(3, 61, (2, 40))
    with torch.no_grad():
        logits = theirs(ids).logits.float()
    ours = mixtral_lab.from_transformers(theirs)
    assert ours.dtype == "bfloat16"
    assert (ours.logits(ids).float() - logits).abs().max() <= 0.05 * logits.abs().max()
    assert (ours.logits(ids).float() - logits).abs().mean() <= 0.01 * logits.abs().mean()


def storages(model) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS.keys())
def test_no_weight_is_copied(made):
    theirs = made()
    ours = mixtral_lab.from_transformers(theirs).model
    assert storages(ours) == storages(theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_experts_of_a_layer_are_one_bank_in_their_memory():
    theirs = mixtral()
    experts = mixtral_lab.from_transformers(theirs).model.blocks[1].experts
    held, fused = bank(experts.swiglus), theirs.model.layers[1].mlp.experts
    assert held is not None
    assert torch.equal(torch.cat((held.gate, held.up), dim=1), fused.gate_up_proj)
    assert torch.equal(held.down, fused.down_proj)
    experts.lay_out()  # what compiling asks for: still no copy
    assert storages(experts) == {
        fused.gate_up_proj.untyped_storage().data_ptr(),
        fused.down_proj.untyped_storage().data_ptr(),
    }


def test_a_change_on_one_side_is_seen_on_the_other_until_one_side_moves():
    theirs = mixtral()
    lab = mixtral_lab.from_transformers(theirs)
    ids = torch.randint(3, 61, (1, 20))
    first = lab.logits(ids)
    with torch.no_grad():
        theirs.model.layers[0].mlp.experts.gate_up_proj[3, :5] = 1.0
        after = theirs(ids).logits
        assert (lab.logits(ids) - after).abs().max() <= 1e-4 < (after - first).abs().max()
        lab.model.embed.weight[int(ids[0, 0])] = 0.5
        assert (theirs.model.embed_tokens.weight[ids[0, 0]] == 0.5).all()
        assert (lab.logits(ids) - theirs(ids).logits).abs().max() <= 1e-4
        theirs.double()
        theirs.lm_head.weight.zero_()
    assert lab.logits(ids).abs().max() > 0 and lab.dtype == "float32"


def test_their_training_goes_on_and_the_lab_follows():
    theirs = mixtral().train()
    lab = mixtral_lab.from_transformers(theirs)
    assert theirs.training and all(parameter.requires_grad for parameter in theirs.parameters())
    assert not lab.model.training and not any(parameter.requires_grad for parameter in lab.model.parameters())
    ids = torch.randint(3, 61, (2, 20))
    before, weight = lab.logits(ids), lab.model.blocks[0].experts.ffn[0].up.weight.clone()
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.5)
    theirs(ids, labels=ids).loss.backward()
    optimiser.step()
    assert not torch.equal(lab.model.blocks[0].experts.ffn[0].up.weight, weight)
    with torch.no_grad():
        assert (
            (lab.logits(ids) - theirs.eval()(ids).logits).abs().max() <= 1e-4 < (lab.logits(ids) - before).abs().max()
        )
    assert all(parameter.grad is None for parameter in lab.model.parameters())


def test_edits_are_the_labs_own_and_do_what_they_do_to_the_weights():
    theirs = mixtral()
    lab = mixtral_lab.from_transformers(theirs)
    ids = torch.randint(3, 61, (1, 30))
    with torch.no_grad():
        plain = theirs(ids).logits
        with lab.edit(ablate(layer=1, expert=2, how="zero")):
            ablated = lab.logits(ids)
            assert torch.equal(theirs(ids).logits, plain)
        theirs.model.layers[1].mlp.experts.down_proj[2] = 0
        assert (theirs(ids).logits - ablated).abs().max() <= 1e-4 < (plain - ablated).abs().max()


@pytest.mark.parametrize("name", ["mini-mixtral", "mini-mistral"])
def test_a_bundled_model_through_transformers_is_the_same_lab(name):
    theirs = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    lab, loaded = from_transformers(theirs, tokenizer), mixtral_lab.load(name, device="cpu", dtype="float32")
    assert lab.config == loaded.config and lab.name == name
    assert lab.tokenizer.stop_ids == loaded.tokenizer.stop_ids
    assert lab.tokenizer.pad_id == loaded.tokenizer.pad_id
    assert lab.generate("Once upon a time", 12) == loaded.generate("Once upon a time", 12)
    assert lab.chat(QUESTION, 12) == loaded.chat(QUESTION, 12)
    ours, reference = lab.trace("Once upon a time", 5), loaded.trace("Once upon a time", 5)
    assert ours.tokens == reference.tokens
    if lab.config.n_experts:
        assert torch.equal(ours.experts, reference.experts)


# --- Tokenizers -----------------------------------------------------------------------------------


@pytest.fixture
def mini():
    return AutoModelForCausalLM.from_pretrained(folder("mini-mixtral"), dtype=torch.float32)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(folder("mini-mixtral"))


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What does the cow say? "},
    {"role": "assistant", "content": "Moo."},
    {"role": "user", "content": "And the dog?"},
]


def test_chat_is_the_chat_template(mini, tokenizer):
    ours = from_transformers(mini, tokenizer).tokenizer
    wanted = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert ours.chat(TALK) == wanted
    tokenizer.chat_template = "{% for message in messages %}{{ bos_token }}{{ message['content'] }}{% endfor %}|"
    assert ours.decode(ours.chat(TALK)) == "Be brief. What does the cow say? Moo.And the dog?|"


def test_a_template_that_refuses_and_none_at_all_are_one_sentence(mini, tokenizer):
    ours = from_transformers(mini, tokenizer).tokenizer
    with pytest.raises(TokenizerError, match="'user' was expected"):
        ours.chat([{"role": "assistant", "content": "Moo."}])
    tokenizer.chat_template = "{{ raise_exception('No system messages here') }}"
    with pytest.raises(TokenizerError, match="refuses this conversation: No system messages here"):
        ours.chat(TALK)
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        from_transformers(mini, tokenizer).tokenizer.chat(TALK)


def test_text_does_not_become_control_tokens_and_their_tokenizer_stays_as_it_is(mini, tokenizer):
    before = tokenizer("[INST] a </s>")["input_ids"]
    ours = from_transformers(mini, tokenizer).tokenizer
    assert 2 in before and 2 not in ours.encode("[INST] a </s>")
    sly = [{"role": "user", "content": "Say </s>[INST] no"}]
    ids = ours.chat(sly)
    assert ids == mixtral_lab.load("mini-mixtral").tokenizer.chat(sly)
    assert 2 not in ids and ids.count(4) == 1
    assert tokenizer("[INST] a </s>")["input_ids"] == before


def test_mistral_commons_tokenizer_in_transformers_dress():
    import mistral_common.tokens.tokenizers.mistral as mistral
    from transformers.tokenization_mistral_common import MistralCommonBackend

    file = next((Path(mistral.__file__).parents[2] / "data").glob("tekken_240911.json"))
    theirs = MistralCommonBackend(tokenizer_path=file)
    model = llama(vocab_size=131072)
    ours = from_transformers(model, theirs).tokenizer
    assert ours.vocab == 131072
    assert ours.encode("Bonjour, le monde !") == theirs.encode("Bonjour, le monde !")
    assert ours.chat(QUESTION) == theirs.apply_chat_template(QUESTION, return_dict=False)


def test_without_a_tokenizer_a_text_is_ids():
    theirs = mixtral()
    lab = mixtral_lab.from_transformers(theirs)
    assert lab.tokenizer.encode("1 17 60") == [1, 17, 60] and lab.tokenizer.decode([1, 17, 60]) == "1 17 60"
    assert lab.tokenizer.stop_ids == (2,) and lab.name == "MixtralForCausalLM"
    trace = lab.trace("1 17 60", max_new_tokens=3)
    assert trace.tokens[:3] == ("1", "17", "60") and trace.experts.shape[1:] == (len(trace.tokens), 2)
    for wrong in ("Hello", "61", "-1", "1,2"):
        with pytest.raises(TokenizerError, match="This lab has no tokenizer"):
            lab.generate(wrong)
    with pytest.raises(TokenizerError, match="cannot chat"):
        lab.chat(QUESTION)


def test_a_list_of_end_tokens_ends_the_text():
    theirs = mixtral()
    theirs.generation_config.eos_token_id = [2, 7, 9]
    first = mixtral_lab.from_transformers(theirs)
    assert first.tokenizer.stop_ids == (2, 7, 9)
    theirs.generation_config.eos_token_id = 11
    assert mixtral_lab.from_transformers(theirs, first.tokenizer).tokenizer.stop_ids == (2, 7, 9, 11)
    assert first.tokenizer.stop_ids == (2, 7, 9)  # a tokenizer of ours is taken too, and stays as it is


def test_other_objects_are_no_tokenizers(mini):
    with pytest.raises(TokenizerError, match="A str is of neither"):
        from_transformers(mini, "mini-mixtral")


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(mixtral_lab.LabError, match="4096 tokens but the model only 61"):
        from_transformers(mixtral(), tokenizer)


# --- Refusals -------------------------------------------------------------------------------------


def other(name: str, **changes):
    config = getattr(transformers, name.removesuffix("ForCausalLM") + "Config")(**(SMALL | changes))
    return getattr(transformers, name)(config)


FOREIGN = {
    "Qwen2ForCausalLM": r"model\.layers\.L\.self_attn\.k_proj\.bias",
    "Qwen3ForCausalLM": r"model\.layers\.L\.self_attn\.k_norm\.weight",
    "Gemma2ForCausalLM": r"post_feedforward_layernorm.* attn_logit_softcapping, final_logit_softcapping",
    "Phi3ForCausalLM": r"self_attn\.qkv_proj\.weight",
    "MinistralForCausalLM": r"layer_types",
    "GPT2LMHeadModel": r"transformer\.h\.L\.attn",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_class_is_named_with_what_is_different(name):
    if name == "GPT2LMHeadModel":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=61))
    else:
        model = other(name)
    with pytest.raises(
        UnknownArchitecture,
        match=f"^{name} is not a model that ours can be: it has .*{FOREIGN[name]}.*MixtralForCausalLM",
    ):
        mixtral_lab.from_transformers(model)


def test_a_model_that_also_reads_images_is_named():
    text = transformers.MistralConfig(**SMALL)
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision)
    )
    with pytest.raises(UnknownArchitecture, match=r"Mistral3ForConditionalGeneration .* vision_config"):
        mixtral_lab.from_transformers(model)


def test_a_headless_model_a_subclass_and_other_things():
    with pytest.raises(UnknownArchitecture, match=r"MixtralModel is not .* no lm_head"):
        mixtral_lab.from_transformers(mixtral().model)

    class MistralForCausalLM(transformers.MistralForCausalLM):
        pass

    with pytest.raises(UnknownArchitecture, match="its code is its own"):
        mixtral_lab.from_transformers(MistralForCausalLM(transformers.MistralConfig(**SMALL)))
    for thing in ("mini-mixtral", None, torch.nn.Linear(2, 2)):
        with pytest.raises(UnknownArchitecture, match=r"folders are opened by mixtral_lab\.load"):
            mixtral_lab.from_transformers(thing)


SETTINGS = {
    "attention_bias": (lambda: llama(attention_bias=True), "LlamaForCausalLM says attention_bias = True"),
    "mlp_bias": (lambda: llama(mlp_bias=True), "mlp_bias = True"),
    "hidden_act": (lambda: other("MistralForCausalLM", hidden_act="gelu"), "MistralForCausalLM says hidden_act = 'gelu'"),
    "rope": (
        lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type = 'linear'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("made", "said"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_our_model_lacks_are_named(made, said):
    with pytest.raises(UnknownArchitecture, match=said):
        mixtral_lab.from_transformers(made())


def test_peft_is_refused_with_the_way_out():
    import peft

    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UnknownArchitecture, match=r"PeftModelForCausalLM .*merge_and_unload"):
        mixtral_lab.from_transformers(wrapped)
    with pytest.raises(
        MissingTensors, match=r"LlamaForCausalLM lacks 1 tensor: model\.layers\.0\.self_attn\.q_proj\.weight; it holds"
    ):
        mixtral_lab.from_transformers(wrapped.base_model.model)
    merged = wrapped.merge_and_unload()
    ids = torch.randint(3, 61, (1, 20))
    with torch.no_grad():
        assert (mixtral_lab.from_transformers(merged).logits(ids) - merged(ids).logits).abs().max() <= 1e-4


def test_parameters_that_are_not_what_the_config_says():
    model = mixtral(tied=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with pytest.raises(ExtraTensors, match=r"they are two: call tie_weights\(\)"):
        mixtral_lab.from_transformers(model)
    model = mixtral()
    model.config.num_attention_heads = 5
    with pytest.raises(ConfigError, match="The config of MixtralForCausalLM makes no sense: 5 query heads"):
        mixtral_lab.from_transformers(model)


def test_weights_elsewhere_or_in_two_dtypes():
    with torch.device("meta"):
        elsewhere = mixtral()
    with pytest.raises(DeviceError, match="MixtralForCausalLM are on meta"):
        mixtral_lab.from_transformers(elsewhere)
    mixed = mixtral()
    mixed.model.layers[0].mlp.gate.bfloat16()
    with pytest.raises(DtypeError, match="are in bfloat16, float32; we need one of"):
        mixtral_lab.from_transformers(mixed)
    with pytest.raises(DtypeError, match="are in float64"):
        mixtral_lab.from_transformers(mixtral().double())
