"""What is written: a page that needs no network, figures, and tables; and what is left alone."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

from mixtral_lab.lab import Lab
from mixtral_lab.study.corpus import PIECE, Corpus, StudyError
from mixtral_lab.study.counting import Counts, check_domain, count
from mixtral_lab.study.sections import SEED, Section, all_sections, by_layer, corpus_table

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "mixtral_lab.study.1"  # in study.json: how a folder is known again
SHOWN = {"displaylogo": False, "displayModeBar": False}


class Study(NamedTuple):
    """A finished study: its folder, the report in it, and everything that was found, by name."""

    folder: Path
    report: Path
    sections: list[Section]
    lacking: list[str]  # what could not be said, and why
    notes: list[str]  # what happened while writing, such as missing PNG files
    counts: Counts  # what it was all made from: a widget or another analysis can start here


def study(lab: Lab, corpus: Corpus, out: str | Path, source: str = "texts given in Python") -> Study:
    """Read a corpus with a model and write the whole routing study into a folder.

    `corpus` is {domain: [text, ...]}: strings or `Text`s; `bundled_texts()` and `read_texts(folder)` make one. `source` says
    in the report where it comes from. The folder gets `report.html`, one page that needs no network; `figures/`, each as
    HTML and, if kaleido finds a browser, as PNG; and `tables/`, tidy, as parquet and csv. A study that stands there is
    replaced. Raises `StudyError` for a dense model, a corpus without text, or a folder with anything else in it.
    """
    check_folder(Path(out))
    return write(lab, count(lab, corpus), out, source)


def write(lab: Lab, counts: Counts, out: str | Path, source: str = "texts given in Python") -> Study:
    """The second half of `study`: what was counted with a model, as a folder. Raises `StudyError` as `study` does."""
    folder = Path(out)
    check_folder(folder)
    for domain in range(len(counts.domains)):
        check_domain(counts, domain)
    found, lacking = all_sections(counts)
    overview = Section("", "", {}, {"corpus": corpus_table(counts), "layers": by_layer(counts)})
    drawn = {name: figure for section in found for name, figure in section.figures.items()}
    tables = {name: table for section in [overview, *found] for name, table in section.tables.items()}
    written = [
        "report.html",
        "figures/plotly.min.js",
        *(f"tables/{name}.{kind}" for name in tables for kind in ("parquet", "csv")),
        *(f"figures/{name}.{kind}" for name in drawn for kind in ("html", "png")),
    ]
    about = _about(lab, counts, source)
    _clear(folder)
    for part in (folder / "tables", folder / "figures"):
        part.mkdir(parents=True, exist_ok=True)
    manifest = {"format": FORMAT, **about, "files": written}
    (folder / "study.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")
    for name, table in tables.items():
        table.to_parquet(folder / "tables" / f"{name}.parquet", index=False)
        table.to_csv(folder / "tables" / f"{name}.csv", index=False)
    for name, figure in drawn.items():
        figure.write_html(folder / "figures" / f"{name}.html", include_plotlyjs="directory", config=SHOWN)
    notes = _write_pngs(drawn, folder / "figures")
    report = folder / "report.html"
    report.write_text(_report(about, overview, found, lacking), "utf-8")
    return Study(folder, report, found, lacking, notes, counts)


def check_folder(folder: Path) -> None:
    """Only a new or empty folder, or one with a study in it, may be written to: raises `StudyError` for any other."""
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file, which was left alone: choose another name for the study's folder.")
    if folder.is_dir() and any(folder.iterdir()) and _manifest(folder) is None:
        raise StudyError(
            f"{folder} has something in it that is not a study; it was left alone. Choose another folder, or empty it."
        )


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What `study.json` says, if it is a study's."""
    try:
        found = json.loads((folder / "study.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def _clear(folder: Path) -> None:
    """Take away the files of the study that stood here before, and nothing else."""
    for name in (_manifest(folder) or {}).get("files", []):
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()):
            path.unlink(missing_ok=True)


def _about(lab: Lab, counts: Counts, source: str) -> dict[str, str]:
    """What the numbers come from."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("mixtral-lab", "torch", "numpy", "plotly"))
    start = (
        f", each after {lab.tokenizer.pieces([lab.tokenizer.bos_id])[0]}" if lab.tokenizer.bos_id is not None else ""
    )
    return {
        "model": f"{counts.model}: {lab.config.parameters / 1e6:,.1f} M parameters, {counts.n_layers} layers of "
        f"{counts.n_experts} experts, {counts.n_choices} for each token",
        "dtype": f"{counts.dtype} on {lab.device}",
        "corpus": f"{source}: {sum(counts.tokens):,} tokens of {len(counts.domains)} domains",
        "reading": f"texts in pieces of at most {min(PIECE, lab.config.context)} tokens{start}; the first tokens count too",
        "chance": f"all draws from seed {SEED}",
        "versions": packages,
        "made": datetime.now(UTC).date().isoformat(),
    }


def _write_pngs(drawn: Mapping[str, Any], folder: Path) -> list[str]:
    """Every figure as PNG, by one browser that loads nothing from a network; why not, if it cannot be done."""
    try:
        import kaleido
    except ImportError:
        return ["There are no PNG files: kaleido is not installed."]
    jobs = [{"fig": figure, "path": folder / f"{name}.png", "opts": {"scale": 2}} for name, figure in drawn.items()]
    try:
        kaleido.write_fig_from_object_sync(jobs, kopts={"mathjax": False})
    except Exception as error:  # a browser can fail in any way; everything else is there
        return [f"There are no PNG files: kaleido said {type(error).__name__}: {str(error).strip().splitlines()[0]}"]
    return []


def _report(about: Mapping[str, str], overview: Section, found: Sequence[Section], lacking: Sequence[str]) -> str:
    """The page: plotly's script once, then every section."""
    parts, scripted = [], False
    for number, section in enumerate(found, start=1):
        pictures = []
        for name, figure in section.figures.items():
            inner = figure.to_html(full_html=False, include_plotlyjs=not scripted, config=SHOWN, div_id=name)
            scripted = True
            caption = (
                f"<figcaption>{html.escape(section.captions[name])}</figcaption>" if name in section.captions else ""
            )
            pictures.append(f"<figure>{caption}{inner}</figure>")
        links = ", ".join(f'<a href="tables/{name}.csv">{name}.csv</a>' for name in section.tables)
        numbers = f'<p class="soft">Numbers: {links}; the same as .parquet.</p>' if links else ""
        parts.append(
            f'<section id="part-{number}"><h2>{number}. {html.escape(section.title)}</h2>\n<p>{_words(section.words)}</p>\n'
            + "\n".join(pictures)
            + f"\n{numbers}</section>"
        )
    template = files("mixtral_lab.study").joinpath("report.html").read_text("utf-8")
    missing = "".join(f"<li>{html.escape(one)}</li>" for one in lacking)
    return Template(template).substitute(
        title=html.escape(f"Routing study: {about['model'].partition(':')[0]}"),
        about="".join(f"<dt>{name}</dt><dd>{html.escape(what)}</dd>" for name, what in about.items()),
        corpus=_html_table(overview.tables["corpus"].drop(columns="sha256 of ids")),
        layers=_html_table(overview.tables["layers"]),
        contents="".join(
            f'<li><a href="#part-{number}">{html.escape(one.title)}</a></li>'
            for number, one in enumerate(found, start=1)
        ),
        sections="\n".join(parts),
        lacking=f"<h2>What could not be said</h2><ul>{missing}</ul>" if missing else "",
    )


def _words(text: str) -> str:
    """Plain text as HTML; what stands between backticks is code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))


def _html_table(table: pd.DataFrame) -> str:
    """Shares in per cent, bits with three decimals, everything else as it is."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table.columns)
    rows = []
    for record in table.to_dict("records"):
        cells = []
        for name, value in record.items():
            if isinstance(value, float):
                shown = f"{value:.3f}" if "bits" in str(name) else f"{value:.1%}"
            else:
                shown = f"{value:,}" if isinstance(value, int) else html.escape(str(value))
            cells.append(f"<td>{shown}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
