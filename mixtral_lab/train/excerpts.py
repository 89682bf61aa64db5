"""Choose short held-out passages that may be shown and shipped: generated or in the public domain only."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from textwrap import dedent
from typing import Any

from mixtral_lab.train.cleaning import sentences
from mixtral_lab.train.sources import BIBLES, GENERATED, OWN, PUBLIC

Record = dict[str, Any]
Heldout = Mapping[str, Sequence[Record]]

COUNT = 8  # passages in every domain
PARALLEL = 4  # of them, Bible passages in four languages, and tales in four languages
SHORTEST, LONGEST = 200, 600  # characters
# Chapters to take parallel verses from, if they are held out: 1 Samuel 16, Proverbs 28, Isaiah 61, Hebrews 8.
CHAPTERS = ("bible:9:16", "bible:20:28", "bible:23:61", "bible:58:8")
TRANSLATED = ("french", "german", "spanish")


def shorten(text: str, longest: int = LONGEST) -> str:
    """Return the start of a text up to the last end of a line or sentence within ``longest`` characters."""
    if len(text) <= longest:
        return text
    ends = []
    position = 0
    for line in text.split("\n"):
        for sentence in sentences(line):
            position = text.index(sentence, position) + len(sentence)
            ends.append(position)
    return text[: max((end for end in ends if end <= longest), default=0)].rstrip()


def spread(records: Iterable[Record], count: int) -> list[Record]:
    """Return ``count`` records at equal distances, so that all parts of a source are seen."""
    rows = list(records)
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows


def fitting(records: Iterable[Record]) -> Iterator[Record]:
    """Yield records with their texts shortened, leaving out those that come out too short."""
    for record in records:
        text = shorten(record["text"])
        if len(text) >= SHORTEST:
            yield {**record, "text": text}


def of_source(records: Iterable[Record], prefix: str) -> list[Record]:
    """Return the records whose id starts with a prefix and that may be shown."""
    return [record for record in records if record["id"].startswith(prefix) and record["licence"] in (OWN, PUBLIC)]


def bible_passages(heldout: Heldout) -> dict[str, list[Record]]:
    """Cut the same verses out of the same chapters in every language, as many as fit in all of them.

    In a chapter the first line is its title and every other line is a verse. The id names the verses:
    ``bible:20:28:1-4`` is Proverbs 28, verses 1 to 4.
    """
    chapters = {domain: {record["id"]: record for record in of_source(heldout[domain], "bible:")} for domain in BIBLES}
    shared = [key for key in chapters["prose"] if all(key in chapters[domain] for domain in BIBLES)]
    shared.sort(key=lambda key: (CHAPTERS.index(key) if key in CHAPTERS else len(CHAPTERS), key))
    found: dict[str, list[Record]] = {domain: [] for domain in BIBLES}
    for key in shared[:PARALLEL]:
        verses = {domain: chapters[domain][key]["text"].split("\n")[1:] for domain in BIBLES}
        fits = [
            sum(length <= LONGEST for length in accumulate(len(verse) + 1 for verse in rows))
            for rows in verses.values()
        ]
        count = max(1, min(fits))
        for domain, rows in verses.items():
            text = "\n".join(rows[:count])
            found[domain].append({**chapters[domain][key], "id": f"{key}:1-{count}", "text": text})
    return found


def tale_passages(heldout: Heldout) -> dict[str, list[Record]]:
    """Return the same tales in English, French, German and Spanish."""
    domains = ("stories", *TRANSLATED)
    tales = {domain: {record["id"]: record for record in of_source(heldout[domain], "tale:")} for domain in domains}
    shared = [record for key, record in tales["stories"].items() if all(key in tales[domain] for domain in domains)]
    chosen = [record["id"] for record in spread(shared, PARALLEL)]
    return {domain: [tales[domain][key] for key in chosen] for domain in domains}


def functions(source: str) -> Iterator[str]:
    """Yield the functions and methods of a module, each up to the next line that is not indented deeper."""
    lines = source.split("\n")
    for start, line in enumerate(lines):
        if not line.lstrip().startswith("def "):
            continue
        indent = len(line) - len(line.lstrip())
        end = start + 1
        while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
            end += 1
        yield dedent("\n".join(lines[start:end])).strip()


def code_passages(records: Iterable[Record]) -> Iterator[Record]:
    """Yield the longest function that fits from every document in the public domain."""
    for record in of_source(records, "code:"):
        fits = [text for text in functions(record["text"]) if SHORTEST <= len(text) <= LONGEST]
        if record["licence"] == PUBLIC and fits:
            yield {**record, "text": max(fits, key=len)}


def choose(heldout: Heldout) -> dict[str, list[Record]]:
    """Return up to ``COUNT`` passages for every domain out of the held-out documents of all domains."""
    bible, tales = bible_passages(heldout), tale_passages(heldout)
    story = spread(fitting(of_source(heldout["stories"], "story:")), COUNT - PARALLEL)
    prose = [
        record
        for prefix, count in (("austen:", 2), ("moby-dick:", 1), ("union:", 1))
        for record in spread(fitting(of_source(heldout["prose"], prefix)), count)
    ]
    pages = [record for record in of_source(heldout["markup"], "page:") if SHORTEST <= len(record["text"]) <= LONGEST]
    # One page of each kind: the first characters tell an HTML page from a table or a style sheet.
    kinds = {record["text"][:6]: record for record in pages}
    facts = [
        record
        for record in of_source(heldout["reference"], "factbook:")
        if record["id"].split(":")[2] in ("Geography", "Economy", "Energy", "Communications", "Transportation")
    ]
    data = of_source(heldout["markup"], "factbook-json:")
    chats = [
        record
        for record in of_source(heldout["chat"], "chat:")
        if len(record["messages"]) > 2
        and SHORTEST <= sum(len(message["content"]) for message in record["messages"]) <= LONGEST
    ]
    chosen = {
        "stories": [*tales["stories"], *story],
        "prose": [*bible["prose"], *prose],
        "reference": spread(fitting(facts), COUNT),
        "code": spread(code_passages(heldout["code"]), COUNT),
        "math": spread(fitting(of_source(heldout["math"], "maths:")), COUNT),
        **{domain: [*bible[domain], *tales[domain]] for domain in TRANSLATED},
        "chat": spread(chats, COUNT),
        "markup": [*spread(fitting(data), COUNT // 2), *spread(kinds.values(), COUNT // 2)],
    }
    for domain, records in chosen.items():
        for record in records:
            assert record["licence"] == PUBLIC or record["source"].startswith(GENERATED), (
                domain,
                record["id"],
            )
    return chosen
