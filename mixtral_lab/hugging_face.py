"""A model that `transformers` already holds becomes a lab, on the same weights.

The other way needs no code: our folders are Hugging Face checkpoints, which `AutoModelForCausalLM.from_pretrained` reads.
`transformers` itself is never imported here: a model is known by its class, its config and its parameters.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsInt

import tokenizers
import torch
from torch import Tensor, nn

from mixtral_lab.checkpoint import (
    HUGGING_FACE,
    HUGGING_FACE_FUSED,
    MODEL_TYPES,
    DeviceError,
    DtypeError,
    ExtraTensors,
    Source,
    Stored,
    UnknownArchitecture,
    check_tensors,
    hugging_face_config,
    match,
    some,
)
from mixtral_lab.config import Config
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.tokenizer import (
    BPETokenizer,
    Messages,
    MistralCommonTokenizer,
    Tokenizer,
    TokenizerError,
    check_messages,
)
from mixtral_lab.weights import DTYPES

KINDS = {architecture: kind for kind, (architecture, _) in MODEL_TYPES.items()}  # by the name of the class
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
SETTINGS_OF_OTHERS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "layer_types",
    "vision_config",
    "audio_config",
)
CALLS_IT = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def from_transformers(model: Any, tokenizer: Any = None) -> Lab:
    """A lab on the weights of a `MistralForCausalLM`, `MixtralForCausalLM` or `LlamaForCausalLM` of transformers.

    Nothing is copied. Every weight of the lab is a view of the model's memory: an expert's gate and up are halves of its
    slice of transformers' `gate_up_proj` (`expert 2*hidden dim`), its down one of `down_proj`. So a weight changed in
    place on one side (an optimiser's step, `lab.model.embed.weight[5] = 0`) is changed on both. That ends where one side
    gets new memory: `.to()` another dtype or device, `resize_token_embeddings`, a weight assigned anew. Gradients, hooks, edits
    and train or eval mode are each side's own: the lab's weights are frozen and in eval mode.

    `tokenizer` is the tokenizer that `transformers` gives with the model; its chat template is the lab's. Without one,
    a prompt is token ids written as numbers (`lab.generate("1 17 250")`), and so is what the lab writes. A text ends at the
    tokenizer's end tokens and at those of the model's `generation_config`.

    Raises `UnknownArchitecture` for any other class or for settings that our model does not have, naming what is different;
    `CheckpointError` and its kinds if the parameters are not those that the config promises; `DeviceError` or `DtypeError` if
    they are spread over devices or dtypes; `TokenizerError` for a tokenizer of neither the `tokenizers` library nor mistral-common.
    """
    config = _config(model)
    ours = _on_the_same_weights(model, config)
    ends = _end_ids(model)
    words = TokenIds(config.vocab) if tokenizer is None else _tokenizer(tokenizer)
    words.stop_ids = tuple(dict.fromkeys([*words.stop_ids, *ends]))
    return Lab(ours, words, Path(str(getattr(model.config, "_name_or_path", ""))).name or type(model).__name__)


def _config(model: Any) -> Config:
    """Our config of a transformers model, which is one that our model can be."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnknownArchitecture(
            f"from_transformers takes a model that transformers has loaded, not a {kind}; folders are opened by mixtral_lab.load."
        )
    settings: Any = model.config
    raw = settings.to_dict()
    if kind not in KINDS or not type(model).__module__.startswith("transformers.models."):
        raise UnknownArchitecture(
            f"{kind} is not a model that ours can be: {_what_is_different(model, raw)}; "
            f"transformers' own {', '.join(KINDS)} can be taken over."
        )
    return hugging_face_config(f"The config of {kind}", raw | {"model_type": KINDS[kind], "architectures": None})


def _what_is_different(model: nn.Module, raw: dict[str, Any]) -> str:
    """What a foreign class has that our model has no place for, as far as names tell."""
    if hasattr(model, "merge_and_unload"):
        return "peft wraps it and adds to its weights (merge_and_unload() gives the model without peft)"
    names = {NUMBER.sub("L", name) for name, _ in model.named_parameters(remove_duplicate=False)}
    if "lm_head.weight" not in names:
        return "it has no lm_head, so it gives no logits"
    strange = sorted(names - {theirs.partition("[")[0] for theirs in HUGGING_FACE_FUSED.names.values()})
    settings = [name for name in SETTINGS_OF_OTHERS if raw.get(name)]
    found = [f"parameters such as {some(strange, 3)}"] if strange else []
    found += [f"settings such as {', '.join(settings)}"] if settings else []
    return "it has " + " and ".join(found) if found else "its parameters have the same names, but its code is its own"


def _on_the_same_weights(model: nn.Module, config: Config) -> Transformer:
    theirs = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    if config.tied:
        head, embed = theirs.pop("lm_head.weight", None), theirs.get("model.embed_tokens.weight")
        if head is not None and embed is not None and head.data_ptr() != embed.data_ptr():
            raise ExtraTensors(
                f"The config of {type(model).__name__} says that lm_head is the embedding, but they are two: call tie_weights()."
            )
    devices = {str(it.device) for it in theirs.values()}
    if len(devices) != 1 or devices == {"meta"}:
        raise DeviceError(
            f"The weights of {type(model).__name__} are on {some(sorted(devices))}; we need them on one device."
        )
    dtypes = {it.dtype for it in theirs.values()}
    if len(dtypes) != 1 or not dtypes <= CALLS_IT.keys():
        names = some(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise DtypeError(
            f"The weights of {type(model).__name__} are in {names}; we need one of {', '.join(DTYPES)} for all."
        )

    def read(name: str, expert: int | None) -> Tensor:
        return theirs[name] if expert is None else theirs[name][expert]

    stored = {
        name: Stored(name, tuple(it.shape), CALLS_IT[it.dtype], it.numel() * it.itemsize) for name, it in theirs.items()
    }
    source = Source(Path(type(model).__name__), config, (HUGGING_FACE_FUSED, HUGGING_FACE), stored, read)
    found = match(source)
    check_tensors(source, found)
    state = {}
    for ours, place in found.places.items():
        tensor = read(place.tensor, place.expert)
        state[ours] = tensor if place.half is None else tensor.chunk(2)[place.half]
    found.model.load_state_dict(state, assign=True)
    return found.model.eval().requires_grad_(False)


def _end_ids(model: Any) -> list[int]:
    """The ids at which `model.generate` ends a text."""
    settings = getattr(model, "generation_config", None) or model.config
    ends = getattr(settings, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


# --- Tokenizers -----------------------------------------------------------------------------------


def _tokenizer(tokenizer: Any) -> Tokenizer:
    """A transformers tokenizer as one of ours; what it is given is not changed."""
    if isinstance(tokenizer, Tokenizer):
        return copy.copy(tokenizer)
    if isinstance(getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer):
        return TransformersTokenizer(tokenizer)
    if hasattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer"):  # transformers' wrapper of mistral-common
        return MistralCommonTokenizer(tokenizer.tokenizer)
    raise TokenizerError(
        f"A {type(tokenizer).__name__} is of neither the tokenizers library nor mistral-common: "
        "give one that AutoTokenizer loads, or none."
    )


class TransformersTokenizer(BPETokenizer):
    """A tokenizer of transformers: ids from its own `tokenizers` backend, chat from its own template.

    As everywhere in this package, text never turns into control tokens, which transformers would read out of it. A message
    that holds the name of one (`</s>`) is therefore encoded by our own code, where the template's format is one that we know.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # ours to set up
        template = tokenizer.chat_template
        super().__init__(
            backend,
            tokenizer.bos_token,
            tokenizer.eos_token,
            tokenizer.pad_token,
            chat_template=template.get("default") if isinstance(template, dict) else template,
        )
        self._theirs = tokenizer

    def chat(self, messages: Messages) -> list[int]:
        system, texts = check_messages(messages)
        said = [*texts, system or ""]
        if not self._template or any(name in text for name in self._names.values() for text in said):
            return super().chat(messages)
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            ids: list[int] = self._theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template may raise whatever it likes
            raise TokenizerError(f"The chat template refuses this conversation: {error}.") from error
        return ids


class TokenIds(Tokenizer):
    """No tokenizer: a text is token ids written as numbers, "1 17 250"."""

    leading_space = True  # every token stands for a space and its number

    def __init__(self, vocab: int) -> None:
        super().__init__([f" {token_id}".encode() for token_id in range(vocab)], {}, None, None, None)

    def _text_ids(self, text: str) -> list[int]:
        words = text.split()
        wrong = [word for word in words if not (word.isascii() and word.isdigit() and int(word) < self.vocab)]
        if wrong:
            raise TokenizerError(
                f"This lab has no tokenizer, so a text is ids from 0 to {self.vocab - 1}, as in '1 17 250', "
                f"but {wrong[0]!r} is none; from_transformers(model, tokenizer) reads words."
            )
        return [int(word) for word in words]

    def pieces(self, ids: Iterable[SupportsInt]) -> list[str]:
        return [str(int(token_id)) for token_id in ids]

    def chat(self, messages: Messages) -> list[int]:
        raise TokenizerError("This lab has no tokenizer, so it cannot chat: use from_transformers(model, tokenizer).")
