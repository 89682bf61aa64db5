"""Text to token ids and back, and conversations to ids: our tokenizer, Mistral's own, and a GGUF file's.

One idea carries all of them: a token stands for some *bytes*, or for none when it is a control token such as
`<s>`. Decoding, readable pieces and streaming follow from that table, so they are written once, in
`Tokenizer`. The families differ in how they cut up a text and in how they mark who speaks.

Text never turns into control tokens: `encode("[INST]")` gives the ids of six ordinary characters. Only `chat`
writes control tokens, so nobody can end their turn from inside their own message. (`transformers` does read
them out of text; apart from such texts it and we give the same ids.)
"""

from __future__ import annotations

import codecs
import copy
import functools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mixtral_lab.config import LabError

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]")  # ids 0 to 5 of our own tokenizer

# Our byte-level BPE never merges across these cuts. A space joins the word or sign after it, every digit
# stands alone, and line breaks stay apart from the indentation that follows them.
CUTS = (
    r"'(?:[sdmt]|ll|ve|re)(?!\p{L})"  # English endings: 's, 'll
    r"| ?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|[\r\n]+"
    r"|[^\S\r\n]+(?![^\s\p{N}])"  # spaces, leaving the last one to the word after them
    r"|[^\S\r\n]+"
)

# Our chat format for `transformers`; `instruct_parts` is the same thing in Python.
CHAT_TEMPLATE = """\
{#- mixtral_lab -#}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}{%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('After an optional system message, user and assistant must take turns, user first.') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set text = system + '\n\n' + message['content'] if loop.first else message['content'] -%}
{{- '[INST] ' + text | trim + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message['content'] | trim + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

# Pieces show white space as these signs. Where a text holds such a sign itself, its bytes are shown instead.
SHOWN = {" ": "␣", "\n": "⏎", "\t": "⇥"}
SIGNS = frozenset("␣⏎⇥⟨⟩")

# A checkpoint folder's tokenizer files, the most telling first.
MISTRAL_FILES = (
    "tekken.json",
    "tokenizer.model.v7",
    "tokenizer.model.v3",
    "tokenizer.model.v2",
    "tokenizer.model.v1",
    "tokenizer.model",
)

# What a model may write to say that it is done, besides the file's own end token.
ENDINGS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>")

Messages = Sequence[Mapping[str, Any]]  # [{"role": "user", "content": "Hello"}, ...]


class TokenizerError(LabError, ValueError):
    """A tokenizer was given ids, files or chat messages that it cannot use."""


class Tokenizer(ABC):
    """What the rest of the package asks of any tokenizer.

    `vocab` counts the tokens. `bos_id` is what `encode` and `chat` put first, if the model wants that.
    `stop_ids` end a generation; `pad_id` fills up a batch (the end token where there is no pad token).
    `leading_space`: `encode` puts a space before every text, as sentencepiece does; `decode` takes it away.
    """

    def __init__(
        self,
        token_bytes: list[bytes],
        control_names: Mapping[int, str],
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
    ) -> None:
        self._bytes = token_bytes
        self._names = dict(control_names)
        self.vocab = len(token_bytes)
        self.bos_id, self.eos_id = bos_id, eos_id
        endings = [eos_id, *(i for name in ENDINGS for i, known in self._names.items() if known == name)]
        self.stop_ids = tuple(dict.fromkeys(i for i in endings if i is not None))
        self.pad_id: int = next((i for i in (pad_id, eos_id) if i is not None), 0)

    @functools.cached_property
    def leading_space(self) -> bool:
        return self._bytes[self._text_ids("a")[0]].startswith(b" ")

    @abstractmethod
    def _text_ids(self, text: str) -> list[int]:
        """Ids of a text, without control tokens."""

    @abstractmethod
    def chat(self, messages: Messages) -> list[int]:
        """Ids of a conversation, ready for the assistant's next words.

        `messages` are `{"role", "content"}` records: an optional system message, then user and assistant in
        turns, a user message last. Raises `TokenizerError` for any other order.
        """

    def chat_training_ids(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them the assistant wrote: answers and end tokens.

        The assistant's message comes last. Raises `TokenizerError` for another order, or without a chat format.
        """
        raise TokenizerError("This tokenizer has no chat format, so no conversation can be learned in it.")

    def fill_in(self, before: str, after: str) -> list[int]:
        """Ids that ask for the text between `before` and `after` ("fill in the middle").

        Raises `TokenizerError` where the tokenizer has no tokens for this.
        """
        raise TokenizerError(
            "This tokenizer has no fill-in-the-middle tokens ([PREFIX] and [SUFFIX]): its model only writes on at the end."
        )

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, after the model's first token if it has one and `bos` is true."""
        _check_whole(text)
        return ([self.bos_id] if bos and self.bos_id is not None else []) + self._text_ids(text)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text that ids stand for, without control tokens; broken characters become U+FFFD."""
        stream = TextStream(self)
        return "".join([stream.feed(token_id) for token_id in ids]) + stream.flush()

    def pieces(self, ids: Iterable[SupportsInt]) -> list[str]:
        """One readable string per token: `["<s>", "def", "␣f", "():", "⏎", "⇥", "⟨E2 82⟩", "⟨AC⟩"]`.

        Spaces, line breaks and tabs are shown as signs; control tokens by name; whatever is not a whole,
        printable character as its bytes. So the pieces in a row tell the text byte for byte.
        """
        return [self._names.get(int(i)) or readable(self.token_bytes(i)) for i in ids]

    def token_bytes(self, token_id: SupportsInt) -> bytes:
        """The bytes that a token stands for (they may end inside a character); none for control tokens."""
        token_id = int(token_id)
        if not 0 <= token_id < self.vocab:
            raise TokenizerError(f"Token id {token_id} does not exist: this tokenizer's ids are 0 to {self.vocab - 1}.")
        return self._bytes[token_id]

    def up_to(self, vocab: int) -> Tokenizer:
        """The same tokenizer for a model with more rows than there are tokens: each row left over is a control token without text.

        Such rows round up the size of a model's tables; hardly ever does it write one.
        """
        if vocab <= self.vocab:
            return self
        rest, wider = range(self.vocab, vocab), copy.copy(self)
        wider._bytes = [*self._bytes, *(b"" for _ in rest)]
        wider._names = self._names | {token_id: f"<unused {token_id}>" for token_id in rest}
        wider.vocab = vocab
        return wider

    def is_control(self, token_id: int) -> bool:
        """Whether a token is markup (`<s>`, `[INST]`) rather than text."""
        return int(token_id) in self._names


def _check_whole(text: str) -> None:
    """Raise `TokenizerError` for a text that has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The character at position {error.start} is half a surrogate pair, which UTF-8 cannot hold."
        ) from None


class TextStream:
    """Text from ids that arrive one by one; a character comes out once all of its bytes are there.

    Everything that `feed` and `flush` return, joined, is `decode(ids)`. With `continues=True` the ids go on
    from an earlier text, so a space at their start is a real one.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.leading_space and not continues

    def feed(self, token_id: SupportsInt) -> str:
        """The characters that this token completes."""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._drop_space:
            data, self._drop_space = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD if the last character was left unfinished, else nothing."""
        return self._decoder.decode(b"", final=True)


def readable(data: bytes) -> str:
    """Bytes as a reader can see them: a space and the first two bytes of € are `"␣⟨E2 82⟩"`."""
    shown = []
    for char in data.decode("utf-8", errors="surrogateescape"):
        if char in SHOWN:
            shown.append(SHOWN[char])
        elif char.isprintable() and char not in SIGNS:
            shown.append(char)
        else:
            shown.append(f"⟨{char.encode('utf-8', errors='surrogateescape').hex(' ').upper()}⟩")
    return "".join(shown).replace("⟩⟨", " ")


def check_messages(messages: Messages, last: str = "user") -> tuple[str | None, list[str]]:
    """The system text (None for none), then the turns: user, assistant, user, ... up to one by `last`.

    Raises `TokenizerError`, which says which message is wrong and what was expected in its place.
    """
    texts: list[str] = []
    system: str | None = None
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            raise TokenizerError(f"Message {number} must be a record with a 'role' and a text as 'content'.")
        _check_whole(content)
        if role == "system" and number == 1:
            system = content
            continue
        expected = "assistant" if len(texts) % 2 else "user"
        if role != expected:
            raise TokenizerError(
                f"Message {number} is by {role!r}, but {expected!r} was expected: "
                "after an optional system message, user and assistant take turns, user first."
            )
        texts.append(content)
    if not texts or len(texts) % 2 != (last == "user"):
        found = "there is no message" if not texts else f"the last is by {'user' if len(texts) % 2 else 'assistant'!r}"
        raise TokenizerError(f"The conversation must end with a message by {last!r}, but {found}.")
    return system, texts


class BPETokenizer(Tokenizer):
    """A byte-pair encoding held by the `tokenizers` library: our own, or any folder's `tokenizer.json`.

    Ours is byte-level with 4,096 tokens: six control tokens, the 256 bytes, then the merges. A conversation
    is `<s>[INST] question [/INST] answer</s>[INST] next [/INST]`, white space around each message trimmed; a
    system message goes before the first question, with an empty line between.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos: str | None = "<s>",
        eos: str | None = "</s>",
        pad: str | None = "<pad>",
        chat_template: str | None = CHAT_TEMPLATE,
    ) -> None:
        backend.encode_special_tokens = True  # to the library this means: special tokens in a text are text
        self._backend = backend
        self._template = chat_template
        added = backend.get_added_tokens_decoder()
        kind = json.dumps(json.loads(backend.to_str())["decoder"])
        if '"ByteLevel"' not in kind and '"ByteFallback"' not in kind:
            raise TokenizerError("This tokenizer.json is neither a byte-level nor a byte-fallback BPE.")
        to_bytes = _byte_level_bytes if '"ByteLevel"' in kind else _sentencepiece_bytes
        table, names = [], {}
        for token_id in range(backend.get_vocab_size()):
            token = backend.id_to_token(token_id)
            if token is None:
                raise TokenizerError(f"The vocabulary has a hole: no token has the id {token_id}.")
            if token_id in added and added[token_id].special:
                names[token_id] = token
            is_added = token_id in added
            table.append(b"" if token_id in names else token.encode() if is_added else to_bytes(token))
        ids = {name: token_id for token_id, name in names.items()}
        first = backend.encode("a").ids[:1]
        super().__init__(
            table,
            names,
            bos_id=ids[bos] if bos in ids and first == [ids[bos]] else None,
            eos_id=ids.get(eos or ""),
            pad_id=ids.get(pad or ""),
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int = 4096) -> BPETokenizer:
        """Learn our tokenizer's merges from texts; from few texts come fewer than `vocab` tokens."""
        least = len(SPECIALS) + 256
        if vocab < least:
            raise TokenizerError(f"vocab is {vocab}, but the control tokens and the 256 bytes alone are {least}.")
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        cuts = pre_tokenizers.Split(Regex(CUTS), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([cuts, to_bytes])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=24,  # no token for a whole line of dashes
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIALS.index("<s>"))]
        )
        return cls(backend)

    @classmethod
    def load(cls, folder: str | Path) -> BPETokenizer:
        """Read `tokenizer.json`, and names of control tokens from `tokenizer_config.json` if it is there."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder} holds no tokenizer.json.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is not a tokenizer that the tokenizers library can read: {error}.") from error
        config: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").is_file():
            try:
                config = dict(json.loads((folder / "tokenizer_config.json").read_text("utf-8")))
            except (ValueError, TypeError) as error:
                raise TokenizerError(f"{folder / 'tokenizer_config.json'} is malformed: {error}.") from error
        template = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text("utf-8")
        bos, eos, pad = (
            _name(config.get(key, usual))
            for key, usual in (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"))
        )
        return cls(backend, bos, eos, pad, chat_template=template if isinstance(template, str) else None)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`; `transformers.AutoTokenizer` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.bos_id is not None,
            "clean_up_tokenization_spaces": False,
            "chat_template": self._template,
        }
        for role, token_id in (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)):
            if token_id in self._names:
                config[f"{role}_token"] = self._names[token_id]
        if "<unk>" in self._names.values():
            config["unk_token"] = "<unk>"
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def chat(self, messages: Messages) -> list[int]:
        system, texts = check_messages(messages)
        return self._conversation(system, texts)[0]

    def chat_training_ids(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them the assistant wrote: answers and end tokens."""
        system, texts = check_messages(messages, last="assistant")
        return self._conversation(system, texts)

    def _conversation(self, system: str | None, texts: list[str]) -> tuple[list[int], list[bool]]:
        ids = [] if self.bos_id is None else [self.bos_id]
        learned = [False] * len(ids)
        for part, by_assistant in self._parts(system, texts):
            new = [part] if isinstance(part, int) else self._text_ids(part)
            ids += new
            learned += [by_assistant] * len(new)
        return ids, learned

    def _parts(self, system: str | None, texts: list[str]) -> list[Part]:
        """The conversation in the format that the chat template asks for."""
        template, control = self._template or "", {name: token_id for token_id, name in self._names.items()}
        if "<|im_start|>" in template and {"<|im_start|>", "<|im_end|>"} <= control.keys():
            default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^{}']*?)<\|im_end\|>", template)
            system = default[1] if system is None and default else system
            return chatml_parts(system, texts, control["<|im_start|>"], control["<|im_end|>"])
        if "[INST]" in template and "[SYSTEM_PROMPT]" not in template and self.eos_id is not None:
            marks = (control["[INST]"], control["[/INST]"]) if "[INST]" in control else None
            return instruct_parts(system, texts, marks, self.eos_id, ours="mixtral_lab" in template)
        raise TokenizerError(
            "The chat template is neither ours, Mistral's v1 to v3 nor ChatML: encode your own prompt."
            if template
            else "This tokenizer has no chat template, so its model only continues texts: use encode."
        )


Part = tuple[int | str, bool]  # a control id or a text, and whether the assistant wrote it


def instruct_parts(
    system: str | None, texts: list[str], marks: tuple[int, int] | None, end: int, ours: bool
) -> list[Part]:
    """Our chat format, or Mistral's v3; v1 where there are no `marks`: its [INST] is ordinary characters.

    Ours and v1 put the system text into the first question, v3 into the last.
    """
    host = 0 if ours or marks is None else (len(texts) - 1) // 2 * 2
    parts: list[Part] = []
    for turn, text in enumerate(texts):
        if turn == host and system:
            text = f"{system}\n\n{text}"
        if turn % 2:
            parts += [
                (f" {text.strip()}" if ours else text.rstrip(" ") if marks else text, True),
                (end, True),
            ]
        elif marks is None:
            parts += [(f"[INST] {text} [/INST]", False)]
        else:
            parts += [(marks[0], False), (f" {text.strip()} " if ours else text, False), (marks[1], False)]
    return parts


def chatml_parts(system: str | None, texts: list[str], start: int, end: int) -> list[Part]:
    """`<|im_start|>user`, line break, text, `<|im_end|>`, line break; the assistant's turn likewise."""
    parts: list[Part] = []
    if system is not None:
        parts += [(start, False), (f"system\n{system}", False), (end, False), ("\n", False)]
    for turn, text in enumerate(texts):
        if turn % 2:
            parts += [(text, True), (end, True), ("\n", False)]
        else:
            parts += [(start, False), (f"user\n{text}", False), (end, False), ("\n", False)]
            parts += [(start, False), ("assistant\n", False)]
    return parts


class GGUFTokenizer(BPETokenizer):
    """The tokenizer inside a GGUF file: byte-level ("gpt2": SmolLM2) or sentencepiece ("llama": Mixtral)."""

    @classmethod
    def load(cls, path: str | Path) -> GGUFTokenizer:
        """Read the `tokenizer.*` entries of a GGUF file and build the tokenizer from them."""
        from gguf import GGUFReader

        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"There is no file {path}.")
        try:
            fields = GGUFReader(path).fields
            meta = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
        except Exception as error:  # the reader trusts its input: anything from IndexError to OverflowError
            raise TokenizerError(f"{path} is not a GGUF file that can be read: {error}.") from error
        ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
        kind = ggml.get("model")
        if kind is None:
            raise TokenizerError(f"{path} holds no tokenizer: looked for tokenizer.ggml.model.")
        build = {"gpt2": _byte_level_backend, "llama": _sentencepiece_backend}.get(str(kind))
        if build is None:
            raise TokenizerError(f"{path} has a tokenizer of the kind {kind!r}; 'gpt2' and 'llama' can be read.")
        try:
            backend = build(ggml)
        except KeyError as error:
            raise TokenizerError(f"{path} lacks tokenizer.ggml.{error.args[0]}, which '{kind}' needs.") from None
        except Exception as error:
            raise TokenizerError(f"{path} holds a tokenizer that contradicts itself: {error}.") from error
        tokens = ggml["tokens"]
        named = {role: ggml.get(f"{role}_token_id") for role in ("bos", "eos", "padding")}
        for role, token_id in named.items():
            if token_id is not None and not 0 <= token_id < len(tokens):
                raise TokenizerError(f"{path} names {token_id} as its {role} token, but has {len(tokens)} tokens.")
        bos, eos, pad = (None if token_id is None else tokens[token_id] for token_id in named.values())
        if bos is not None and ggml.get("add_bos_token", kind == "llama"):
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, named["bos"])]
            )
        return cls(backend, bos, eos, pad, chat_template=meta.get("tokenizer.chat_template"))


# How the text before ByteLevel is cut, by the name in `tokenizer.ggml.pre`.
GGUF_CUTS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "gpt-2": [],
    "default": [],
}


def _byte_level_backend(ggml: dict[str, Any]) -> tokenizers.Tokenizer:
    cuts = GGUF_CUTS.get(ggml.get("pre", "default"))
    if cuts is None:
        raise ValueError(f"it cuts texts as {ggml['pre']!r} does, and only {sorted(GGUF_CUTS)} are known")
    vocab = {token: token_id for token_id, token in enumerate(ggml["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return _with_added(backend, ggml)


def _sentencepiece_backend(ggml: dict[str, Any]) -> tokenizers.Tokenizer:
    tokens, scores, types = ggml["tokens"], ggml["scores"], ggml["token_type"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    # The file has no merges: any two tokens may merge into a third, and the better score goes first.
    normal = [token for token, kind in zip(tokens, types, strict=True) if kind == 1]
    known = set(normal)
    best_first = sorted(normal, key=lambda token: -scores[vocab[token]])
    merges = [
        (token[:cut], token[cut:])
        for token in best_first
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    unknown = tokens[ggml.get("unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True, ignore_merges=False)
    )
    space: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if ggml.get("add_space_prefix", True):
        space.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(space)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_added(backend, ggml)


def _with_added(backend: tokenizers.Tokenizer, ggml: dict[str, Any]) -> tokenizers.Tokenizer:
    """Tell the backend which tokens are control tokens (kinds 2 and 3) or fixed words (kind 4)."""
    for token, kind in zip(ggml["tokens"], ggml["token_type"], strict=True):
        if kind in (2, 3):
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == 4:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend


class MistralCommonTokenizer(Tokenizer):
    """Mistral's own tokenizer, v1 to Tekken, through mistral-common, which is the truth about its ids."""

    def __init__(self, mistral: Any) -> None:
        self._mistral = mistral
        inner = mistral.instruct_tokenizer.tokenizer
        self._inner = inner
        self.version: str = inner.version.value
        names = {i: inner.id_to_piece(i) for i in sorted({*inner.special_ids, inner.unk_id})}
        if hasattr(inner, "id_to_byte_piece"):  # Tekken
            table = [b"" if i in names else inner.id_to_byte_piece(i) for i in range(inner.n_words)]
        else:
            table = [b"" if i in names else _sentencepiece_bytes(inner.id_to_piece(i)) for i in range(inner.n_words)]
        pad = inner.pad_id if inner.pad_id >= 0 else None
        super().__init__(table, names, inner.bos_id, inner.eos_id, pad)

    @classmethod
    def from_version(cls, version: str) -> MistralCommonTokenizer:
        """One that mistral-common brings along: "v1" (Mixtral 8x7B), "v2", "v3" (8x22B), "tekken" (Nemo)."""
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        makers = {
            "v1": MistralTokenizer.v1,
            "v2": MistralTokenizer.v2,
            "v3": MistralTokenizer.v3,
            "tekken": lambda: MistralTokenizer.v3(is_tekken=True),
        }
        if version not in makers:
            raise TokenizerError(f"There is no Mistral tokenizer {version!r} here: choose one of {', '.join(makers)}.")
        return cls(makers[version]())

    @classmethod
    def from_file(cls, path: str | Path) -> MistralCommonTokenizer:
        """A checkpoint's `tekken.json`, `tokenizer.model.v3` or `tokenizer.model`."""
        from mistral_common.protocol.instruct.normalize import get_normalizer
        from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
        from mistral_common.tokens.tokenizers.base import TokenizerVersion
        from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV3
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"There is no file {path}.")
        try:
            mistral: Any = MistralTokenizer.from_file(str(path))
            # mistral-common takes a bare tokenizer.model for v1; one with [INST] as a single token is v3's.
            if path.suffix == ".model" and mistral.instruct_tokenizer.tokenizer.is_special("[INST]"):
                v3 = TokenizerVersion.v3
                instruct: Any = InstructTokenizerV3(SentencePieceTokenizer(str(path), v3))
                mistral = MistralTokenizer(instruct, get_validator(v3, ValidationMode.test), get_normalizer(v3, None))
            return cls(mistral)
        except Exception as error:  # assertion, key, JSON and sentencepiece errors alike
            raise TokenizerError(f"{path} is not a tokenizer that mistral-common can read: {error!r}.") from error

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(text, bos=False, eos=False)
        return ids

    def chat(self, messages: Messages) -> list[int]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        check_messages(messages)
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        for number, message in enumerate(plain, start=1):
            if message["role"] == "assistant" and not message["content"]:
                raise TokenizerError(f"Message {number} is empty, and Mistral's format has no empty answers.")
        try:
            request: Any = ChatCompletionRequest.model_validate({"messages": plain})
            ids: list[int] = self._mistral.encode_chat_completion(request).tokens
        except MistralCommonException as error:
            raise TokenizerError(f"mistral-common refuses this conversation: {error.message}.") from error
        return ids

    def chat_training_ids(self, messages: Messages) -> tuple[list[int], list[bool]]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.messages import AssistantMessage
        from mistral_common.protocol.instruct.normalize import get_normalizer
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from mistral_common.protocol.instruct.validator import ValidationMode, get_validator

        check_messages(messages, last="assistant")
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        instruct, version = self._mistral.instruct_tokenizer, self._inner.version
        try:
            asked: Any = ChatCompletionRequest.model_validate({"messages": plain})
            checked = get_validator(version, ValidationMode.finetuning).validate_request(asked)
            request = get_normalizer(version, None).from_chat_completion_request(checked)
            answers = [message for message in request.messages if isinstance(message, AssistantMessage)]
            ids: list[int] = instruct.encode_instruct(request).tokens
            lengths = [len(instruct.encode_assistant_message(answer, False)) for answer in answers]
        except MistralCommonException as error:
            raise TokenizerError(f"mistral-common refuses this conversation: {error.message}.") from error
        learned = [False] * len(ids)
        ends = [place for place, token_id in enumerate(ids) if token_id == self.eos_id]  # no text can hold one
        for end, length in zip(ends, lengths, strict=True):
            learned[end + 1 - length : end + 1] = [True] * length
        return ids, learned

    def fill_in(self, before: str, after: str) -> list[int]:
        from mistral_common.tokens.tokenizers.base import FIMRequest

        unknown = self._inner.unk_id  # what v2 has in their place; v1 has nothing
        if getattr(self._mistral.instruct_tokenizer, "SUFFIX", unknown) == unknown:
            return super().fill_in(before, after)
        _check_whole(before + after)
        ids: list[int] = self._mistral.encode_fim(FIMRequest(prompt=before, suffix=after)).tokens
        return ids


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of a .gguf, tekken.json, tokenizer.model or tokenizer.json.

    In a folder Mistral's own files win over `tokenizer.json`, and that over a single .gguf file.
    """
    path = Path(path)
    if not path.exists():
        raise TokenizerError(f"There is no file or folder {path}.")
    if path.is_dir():
        names = (*MISTRAL_FILES, "tokenizer.json")
        ggufs = sorted(path.glob("*.gguf"))
        found = [path / name for name in names if (path / name).is_file()]
        if not found and len(ggufs) > 1:
            raise TokenizerError(f"{path} holds {len(ggufs)} .gguf files: name the one whose tokenizer you want.")
        if not found and not ggufs:
            raise TokenizerError(f"{path} holds no tokenizer: looked for {', '.join(names)} and *.gguf.")
        path = (found or ggufs)[0]
    if path.suffix == ".gguf":
        return GGUFTokenizer.load(path)
    if path.name == "tokenizer.json":
        return BPETokenizer.load(path.parent)
    return MistralCommonTokenizer.from_file(path)


def _name(token: Any) -> str | None:
    """A control token's name: `tokenizer_config.json` has it as a text, or in a record as `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes as letters: printable Latin-1 as it is, the rest from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """`Ġ` stands for a space, `Ã©` for the two bytes of é."""
    if not _BYTE_OF.keys() >= set(token):
        return token.encode()  # not written in these letters: itself, as the tokenizers library takes it
    return bytes(_BYTE_OF[letter] for letter in token)


def _sentencepiece_bytes(piece: str) -> bytes:
    """`▁` stands for a space; `<0xE2>` for one byte."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
