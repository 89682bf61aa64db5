"""Clean text and cut it into documents of a fair length: prose at sentences, code at definitions."""

import ast
import html
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from mixtral_lab.train.stories import words

PASSAGE = 4_000  # characters: documents of prose and markup are cut to about this length
CODE_PASSAGE = 8_000

# Words that are frequent in one language and rare in the others tell which paragraphs were translated at all.
MARKERS = {
    "english": set(words("the and of to is for with this that you are when from be can will which if not by it")),
    "french": set(words("le la les des et est une un pour dans que qui vous sur avec ce par pas sont du au ou")),
    "german": set(words("der die das und ist ein eine zu den mit für auf nicht wird werden sie von wenn es sind dem")),
    "spanish": set(words("el la los las y es una un para en que con se por como del no su al puede si este")),
}
# Notices of licences that are not permissive, or that ask for more than attribution in a list.
FOREIGN_LICENCE = re.compile(
    r"General Public License|\bL?GPL|Mozilla Public|Creative Commons|CC[- ]BY|Font ?Awesome", re.I
)


def clean(text: str) -> str:
    """Normalise line ends and spaces, and replace mail addresses."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub("[\u00a0\u202f\u2009]", " ", text)
    text = re.sub("[\u200b\ufeff\u00ad]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    text = re.sub(r"[\w.+-]+@[\w-]+(\.[\w-]+)+", "user@example.com", text)
    return text.strip("\n")


def sentences(text: str) -> list[str]:
    """Cut a text after full stops, question marks and exclamation marks that are followed by a capital."""
    return re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’»“]))\s+(?=[\"'“‘«„A-ZÀ-Ý¿¡])", text)


def unwrap(text: str) -> list[str]:
    """Join hard-wrapped lines into paragraphs, which are separated by empty lines."""
    blocks = re.split(r"\n\s*\n", text)
    return [" ".join(block.split()) for block in blocks if block.strip()]


def passages(parts: Iterable[str], size: int = PASSAGE, joint: str = "\n\n") -> Iterator[str]:
    """Join consecutive parts into passages of at most ``size`` characters; a longer part stays whole."""
    kept: list[str] = []
    length = 0
    for part in parts:
        if kept and length + len(part) > size:
            yield joint.join(kept)
            kept, length = [], 0
        kept.append(part)
        length += len(part) + len(joint)
    if kept:
        yield joint.join(kept)


def html_to_lines(text: str) -> list[str]:
    """Return the text of an HTML fragment, a line for each block, without code samples."""
    text = re.sub(r"(?is)<(script|style|pre|table)\b.*?</\1>", "\n", text)
    text = re.sub(r"(?i)</?(p|div|h\d|li|ul|ol|br|blockquote|dt|dd)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?<=[^\n])\n(?=[^\n<])", " ", text)))
    return [line for line in (" ".join(line.split()) for line in text.split("\n")) if line]


def language_of(text: str) -> str:
    """Return the language with more than twice the marker words of any other, or an empty string."""
    found = re.findall(r"[^\W\d_]+", text.lower())
    counts = sorted(((sum(word in markers for word in found), name) for name, markers in MARKERS.items()), reverse=True)
    return counts[0][1] if counts[0][0] > 2 * counts[1][0] else ""


def labelled(entries: Any, label: str = "") -> Iterator[tuple[str, str]]:
    """Yield the label and text of every leaf of a factbook chapter."""
    if not isinstance(entries, dict):
        return
    if isinstance(entries.get("text"), str):
        yield label, re.sub(r"</?\w+[^>]*>", " ", html.unescape(entries["text"])).strip()
    for name, inner in entries.items():
        yield from labelled(inner, f"{label}, {name}" if label and len(label) < 80 else name)


def readable_code(source: str) -> bool:
    """Tell whether a module is of a fair size, parses, and is neither a table nor under a copyleft notice."""
    lines = source.split("\n")
    if not 400 < len(source) <= 60_000 or max(map(len, lines)) > 250:
        return False
    if sum(ord(letter) > 126 for letter in source) > 0.01 * len(source):
        return False
    if sum(letter.isdigit() for letter in source) > 0.12 * len(source):
        return False
    if FOREIGN_LICENCE.search(source[:3000]):
        return False
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def without_header(source: str) -> str:
    """Drop the comments at the top of a module: interpreter line, coding, licence."""
    return re.sub(r"\A(\s*#[^\n]*\n|\s*\n)+", "", source)


def code_passages(source: str, size: int = CODE_PASSAGE) -> Iterator[str]:
    """Cut a module at its top-level definitions, and long classes at their methods, into passages."""
    if len(source) <= size:
        yield source
        return
    lines = source.split("\n")

    def starts(nodes: list[ast.stmt]) -> list[int]:
        found = []
        for node in nodes:
            decorators = getattr(node, "decorator_list", [])
            line = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
            while line > 0 and lines[line - 1].lstrip().startswith("#"):
                line -= 1  # a comment belongs to what it stands above
            found.append(line)
            end = node.end_lineno or node.lineno
            if isinstance(node, ast.ClassDef) and sum(map(len, lines[line:end])) > size:
                found += starts(node.body)[1:]
        return found

    cuts = sorted({0, *starts(ast.parse(source).body), len(lines)})
    pieces = ["\n".join(lines[a:b]) for a, b in pairwise(cuts)]
    for text in passages(pieces, size, "\n"):
        if text.strip():
            yield text.strip("\n")
