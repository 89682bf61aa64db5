"""What is read: texts by domain, from the box or from a folder, and how they are cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_lab import analysis, bundled
from mixtral_lab.config import LabError
from mixtral_lab.lab import Lab, Message

PIECE = 512  # tokens read at once: longer texts are cut
STRETCH = 2_000  # characters of a domain's only file that count as one text
LONGEST = 1_000_000  # characters of any other file that count as one text


class StudyError(LabError, ValueError):
    """A corpus cannot be read, or a study cannot be made of it or written where it was asked for."""


@dataclass(frozen=True)
class Text:
    """One text, or a conversation, whose last message the model is not shown if it is the assistant's.

    Texts that say the same thing have the same `topic` and different `language`s; both are empty where nothing is known.
    """

    text: str = ""
    messages: Sequence[Message] = ()
    topic: str = ""
    language: str = ""


Corpus = Mapping[str, Collection[Text | str]]


def bundled_texts() -> dict[str, list[Text]]:
    """The held-out excerpts in the box, by domain; those that exist in four languages know their topic and language."""
    passages = bundled.excerpts()
    parallel = {
        text: (topic, language)
        for topic, by_language in analysis.parallel_passages(passages).items()
        for language, text in by_language.items()
    }
    found = {}
    for domain, records in passages.items():
        texts = [(record.get("text", ""), tuple(record.get("messages", ()))) for record in records]
        found[domain] = [Text(text, messages, *parallel.get(text, ("", ""))) for text, messages in texts]
    return found


def given_texts(folder: Path | None, domains: bool) -> tuple[Corpus, str]:
    """The corpus that a command was given, and its name: the texts of a folder, or (`domains`) the excerpts in the box.

    Raises `StudyError` for both or neither, and as `read_texts` does.
    """
    if (folder is None) != domains:
        raise StudyError("Give either --texts DIR, for texts of your own, or --domains, for the excerpts in the box.")
    return (bundled_texts(), "the bundled excerpts") if folder is None else (read_texts(folder), str(folder))


def read_texts(folder: str | Path) -> dict[str, FileTexts]:
    """The texts of a folder by domain. Nothing is kept in memory: files are read again whenever one asks.

    A domain is a sub-folder of .txt and .jsonl files, or one such file beside the sub-folders; its name is theirs. In a
    sub-folder every .txt file is one text; a .txt file that is a whole domain is cut at ends of lines into texts of
    about 2,000 characters. Every line of a .jsonl file is one: a record with `text` or `messages`, and perhaps `topic` and
    `language`, where texts of one topic say the same thing in several languages. Files are in UTF-8; other kinds are left
    aside. Raises `StudyError` if there are none, or a name stands for two domains.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StudyError(
            f"There is no folder {folder}: give one with a sub-folder, .txt or .jsonl file for each domain."
        )
    found: dict[str, FileTexts] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            paths = tuple(one for one in sorted(path.rglob("*")) if one.suffix in (".txt", ".jsonl") and one.is_file())
            domain, texts = path.name, FileTexts(paths, LONGEST)
        elif path.suffix in (".txt", ".jsonl"):
            domain, texts = path.stem, FileTexts((path,), STRETCH)
        else:
            continue
        if not texts.paths:
            continue
        if domain in found:
            raise StudyError(f"{folder} has two entries for the domain {domain!r}: rename one.")
        found[domain] = texts
    if not found:
        raise StudyError(f"{folder} holds no .txt or .jsonl files, neither itself nor in sub-folders.")
    return found


@dataclass(frozen=True)
class FileTexts(Collection[Text]):
    """The texts of some files, read anew each time: a .txt file in stretches of at most so many characters."""

    paths: tuple[Path, ...]
    longest: int
    _length: list[int] = field(default_factory=list, init=False, repr=False)

    def __iter__(self) -> Iterator[Text]:
        for path in self.paths:
            try:
                with path.open(encoding="utf-8") as file:
                    if path.suffix == ".jsonl":
                        for number, line in enumerate(file, start=1):
                            if line.strip():
                                yield _record(path, number, line)
                    else:
                        yield from map(Text, _stretches(file, self.longest))
            except UnicodeDecodeError as error:
                raise StudyError(f"{path} is not text in UTF-8: {error}.") from None

    def __len__(self) -> int:
        if not self._length:
            self._length.append(sum(1 for _ in self))
        return self._length[0]

    def __contains__(self, text: object) -> bool:
        return any(one == text for one in self)


def _stretches(file: Any, longest: int) -> Iterator[str]:
    """A file in parts of at most `longest` characters, cut after a line where there is one; together they are the file."""
    held = ""
    while part := file.read(longest):
        held += part
        while len(held) > longest:
            cut = held.rfind("\n", 0, longest) + 1 or longest
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _record(path: Path, number: int, line: str) -> Text:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise StudyError(f"{path}, line {number} is not JSON: {line.strip()[:60]!r}.") from None
    if not isinstance(record, dict) or not ({"text", "messages"} & record.keys()):
        raise StudyError(f"{path}, line {number} is not a record with `text` or `messages`: {line.strip()[:60]!r}.")
    text, messages = record.get("text", ""), record.get("messages", [])
    topic, language = record.get("topic", ""), record.get("language", "")
    if not all(isinstance(one, str) for one in (text, topic, language)):
        raise StudyError(f"{path}, line {number}: text, topic and language must be strings.")
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in ("role", "content")) for one in messages
    ):
        raise StudyError(f"{path}, line {number}: messages must be a list of records with `role` and `content`.")
    return Text(text, tuple(messages), topic, language)


def pieces(lab: Lab, text: Text) -> Iterator[list[int]]:
    """A text as ids, in pieces of at most `PIECE` tokens (fewer if the model's context is shorter).

    Every piece starts with the model's first token, if it has one. Pieces of one token are left out: nothing follows.
    """
    tokenizer = lab.tokenizer
    if text.messages:
        messages = list(text.messages)
        ids = tokenizer.chat(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    else:
        ids = tokenizer.encode(text.text)
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    ids = ids[len(start) :] if ids[: len(start)] == start else ids
    room = min(PIECE, lab.config.context) - len(start)
    for at in range(0, len(ids), room):
        piece = start + ids[at : at + room]
        if len(piece) > 1:
            yield piece
