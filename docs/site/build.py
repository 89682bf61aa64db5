"""`make site`: all lessons and docs as web pages that need no network, no server and no Python to be read.

    python docs/site/build.py [lesson.ipynb ...] [--build build] [--jobs 2]

The lessons are run in kernels of their own, several at once; the notebooks stay as they are. Their outputs are kept in
`build/lessons` and used again until the code of the lesson, the package or the data changes. The site is `build/site`.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import plotly
from nbclient import NotebookClient
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
MADE = ".made-by-make-site"
FIGURE = "application/vnd.plotly.v1+json"
CHECKED = "# NBVAL_CHECK_OUTPUT\n"  # says to `make test` that this cell's output is always the same
START = "import sys\nsys.path.insert(0, {here!r})\nimport embed\nembed.for_site({name!r}, {folder!r})\ndel sys.path[0]"
# Code as it stands, or a link to a page or file of the repository.
LINK = re.compile(
    r"```.*?```|(?<!!)\[(?P<words>[^\]\[]+)\]\((?P<to>[^()\s#]+)(?P<at>#[^()\s]*)?\)|`[^`\n]*`", re.DOTALL
)

HINT = """
<p class="one-run">What one run of this lesson gave: figures and explorers respond here. To run the code and change it,
<code>make lab</code> opens <code>notebooks/{name}.ipynb</code>.</p>
"""
INDEX = """# mixtral_lab

Open a mixture-of-experts language model, watch every decision it makes, and change one.

![A story that mini-mixtral wrote, every token in the colour of its first expert, in three layers](docs/tokens_by_expert.png)

These pages are the lessons as they ran on one machine, with their figures and explorers, and the documentation of the package.
They need no network. To run the code and change it, `make lab` opens the lessons in JupyterLab.

{sections}

```{{toctree}}
:caption: Lessons
:hidden:

{lessons}
```
```{{toctree}}
:caption: The package
:hidden:

{docs}
```
"""


@dataclass(frozen=True)
class Lesson:
    """A notebook and the folder that keeps what it gave when it was run."""

    path: Path
    kept: Path
    notebook: nbformat.NotebookNode

    def digest(self, surroundings: str) -> str:
        code = [cell.source for cell in self.notebook.cells if cell.cell_type == "code"]
        return hashlib.sha256(json.dumps([surroundings, code]).encode()).hexdigest()

    def outputs(self, digest: str) -> list[list[dict[str, Any]]] | None:
        """The outputs of each code cell, if they are those of this digest."""
        file = self.kept / "outputs.json"
        kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return kept["outputs"] if kept.get("digest") == digest else None


def emptied(folder: Path) -> Path:
    """The folder, with nothing in it. One that this script did not make is left alone."""
    if folder.exists() and not (folder / MADE).is_file():
        sys.exit(f"{folder} was not made by this script and was left alone: name another folder with --build.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MADE).touch()
    return folder


def surroundings() -> str:
    """A digest of what lessons give the same outputs with: the package and its data."""
    digest = hashlib.sha256((HERE / "embed.py").read_bytes())
    for folder in ("mixtral_lab", "data"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


async def run(lessons: list[Lesson], around: str, jobs: int) -> list[BaseException]:
    """Run the lessons, `jobs` at once, and keep their outputs. Gives what stopped some of them."""
    gate = asyncio.Semaphore(jobs)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    cells = sum(cell.cell_type == "code" for lesson in lessons for cell in lesson.notebook.cells)
    with tqdm(total=cells, desc=f"running {len(lessons)} lessons", unit="cell") as bar:

        async def one(lesson: Lesson) -> None:
            async with gate:
                emptied(lesson.kept)
                notebook = copy.deepcopy(lesson.notebook)
                start = START.format(here=str(HERE), name=lesson.path.stem, folder=str(lesson.kept))
                notebook.cells.insert(0, nbformat.v4.new_code_cell(start))
                client = NotebookClient(
                    notebook, timeout=600, resources={"metadata": {"path": str(lesson.kept)}},
                    extra_arguments=["--IPKernelApp.log_level=40"],  # no talk of transports
                    on_cell_executed=lambda cell, cell_index, execute_reply: bar.update(cell_index > 0),
                )  # fmt: skip
                await client.async_execute(env=os.environ | {"OMP_NUM_THREADS": threads})
                kept = {
                    "digest": lesson.digest(around),
                    "outputs": [cell.outputs for cell in notebook.cells[1:] if cell.cell_type == "code"],
                }
                partial = lesson.kept / "outputs.json.partial"
                partial.write_text(json.dumps(kept), "utf-8")
                partial.replace(lesson.kept / "outputs.json")

        stopped = await asyncio.gather(*map(one, lessons), return_exceptions=True)
    return [error for error in stopped if error is not None]


class Pages:
    """The folder of pages that Sphinx reads. They lie as in the repository, so their links to each other hold."""

    def __init__(self, folder: Path, lessons: list[Lesson]) -> None:
        self.folder = folder
        self.lessons = [f"notebooks/{lesson.path.stem}" for lesson in lessons]
        files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
        self.docs = [str(file.relative_to(ROOT).with_suffix("")) for file in files]

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def linked(self, text: str, written_in: str, shown_in: str | None = None) -> str:
        """The text with links that lead somewhere on the site.

        Links to code lead to pages that show it; of links to what the site has not, the words are left. `written_in`
        and `shown_in` are folders, seen from the root.
        """

        def there(found: re.Match[str]) -> str:
            to = found["to"]
            if to is None or re.match(r"\w+:", to):
                return found[0]
            inside = os.path.normpath(Path(written_in, to))
            if inside.endswith(".py") and (ROOT / inside).is_file():
                self.code(inside)
                inside += ".md"
            elif inside.removesuffix(".md") not in self.docs and inside.removesuffix(".ipynb") not in self.lessons:
                return found["words"]
            to = os.path.relpath(inside, written_in if shown_in is None else shown_in)
            return f"[{found['words']}]({to}{found['at'] or ''})"

        return LINK.sub(there, text)

    def code(self, inside: str) -> None:
        text = (ROOT / inside).read_text("utf-8")
        self.write(inside + ".md", f"---\norphan: true\n---\n# `{inside}`\n\n``````python\n{text}\n``````\n")

    def lesson(self, lesson: Lesson, outputs: list[list[dict[str, Any]]]) -> None:
        notebook, given = copy.deepcopy(lesson.notebook), iter(outputs)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = self.linked(cell.source, "notebooks")
            else:
                cell.source = cell.source.removeprefix(CHECKED)
                cell.outputs = [nbformat.from_dict(on_a_page(output)) for output in next(given)]
        notebook.metadata.language_info = nbformat.from_dict({"name": "python", "pygments_lexer": "ipython3"})
        title, _, rest = notebook.cells[0].source.partition("\n")
        notebook.cells[0].source = title + "\n" + HINT.format(name=lesson.path.stem) + rest
        self.write(f"notebooks/{lesson.path.name}", nbformat.writes(notebook))

    def index(self, first: nbformat.NotebookNode) -> None:
        """The first page: the map of the lessons and the words of the lab, as the first lesson has them."""
        wanted = [section(first, heading) for heading in ("A map of the lessons", "The words of the lab")]
        sections = self.linked("\n\n".join(wanted), "notebooks", shown_in="")
        self.write(
            "index.md",
            INDEX.format(
                sections=sections,
                lessons="\n".join(self.lessons),
                docs="\n".join(["Overview <README>", *self.docs[1:]]),
            ),
        )

    def all_docs(self) -> None:
        for name in self.docs:
            page = Path(name + ".md")
            self.write(str(page), self.linked((ROOT / page).read_text("utf-8"), str(page.parent)))
        for picture in (ROOT / "docs").glob("*.png"):
            shutil.copy(picture, self.folder / "docs")


def on_a_page(output: dict[str, Any]) -> dict[str, Any]:
    """An output as a page can show it without a kernel: figures wait for site.js to draw them."""
    data = output.get("data", {})
    if FIGURE in data:
        figure = {"data": data[FIGURE]["data"], "layout": data[FIGURE]["layout"]}
        width, height = (figure["layout"].get(side) for side in ("width", "height"))
        size = f"width:{width}px;" if width else ""
        place = f'<div class="place" style="{size}height:{height or 450}px"></div>'
        packed = json.dumps(figure, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        packed = f'<script type="application/json">{packed}</script>'
        return output | {"data": {"text/html": f'<div class="lab-figure">{place}{packed}</div>'}}
    return output


def section(notebook: nbformat.NotebookNode, heading: str) -> str:
    """The part of a notebook below `## heading`, with what its cells print in place of their code."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif printed := "".join(output.text for output in cell.outputs if output.output_type == "stream"):
            parts.append(f"```text\n{printed}```")
    found = re.search(rf"^## {heading}\n.*?(?=^## |\Z)", "\n\n".join(parts), re.DOTALL | re.MULTILINE)
    if found is None:
        sys.exit(
            f"The first lesson has no heading “{heading}”, and the first page of the site shows what stands below it."
        )
    return found[0]


def sphinx(pages: Path, site: Path) -> None:
    """Make the pages into a site; any warning is an error, so no link leads nowhere."""
    try:
        from sphinx.cmd.build import build_main
    except ImportError:
        sys.exit("Sphinx is not installed, which makes the pages: .venv/bin/python -m pip install -e '.[site]'")
    arguments = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(HERE), "-d", str(pages.with_name("doctrees"))]
    if build_main([*arguments, str(pages), str(site)]):
        sys.exit("The site was not built: see the warnings above.")


def build(paths: list[Path], folder: Path, jobs: int) -> Path:
    for path in paths:
        if not path.is_file():
            sys.exit(
                f"There is no lesson {path}: name notebooks such as notebooks/01_meet_the_router.ipynb, or none for all."
            )
    folder = folder.resolve()
    lessons = [Lesson(path.resolve(), folder / "lessons" / path.stem, nbformat.read(path, 4)) for path in sorted(paths)]
    around = surroundings()
    stale = [lesson for lesson in lessons if lesson.outputs(lesson.digest(around)) is None]
    if stale:
        for error in (stopped := asyncio.run(run(stale, around, jobs))):
            print(f"A lesson stopped: {error}", file=sys.stderr)
        if stopped:
            sys.exit(1)

    work, site = folder / "sphinx", folder / "site"
    emptied(work)
    pages = Pages(work / "pages", lessons)
    for lesson in lessons:
        pages.lesson(lesson, lesson.outputs(lesson.digest(around)) or [])
    pages.index(nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", 4))
    pages.all_docs()
    partial = work / "site"
    sphinx(pages.folder, partial)
    shutil.copy(PLOTLY_JS, partial / "_static")
    for lesson in lessons:
        for file in (*lesson.kept.glob("*.html"), *lesson.kept.glob("*.js"), *lesson.kept.glob("*.css")):
            to = partial / ("notebooks/explorers" if file.suffix == ".html" else "_static/widgets")
            to.mkdir(exist_ok=True)
            shutil.copy(file, to)
    shutil.rmtree(emptied(site))
    (partial / MADE).touch()
    partial.rename(site)
    shutil.rmtree(work)
    return site


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="*", type=Path, help="default: all in notebooks/")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="folder to build in")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="lessons run at once")
    asked = parser.parse_args()
    made = build(asked.lessons or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), asked.build, asked.jobs)
    size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file()) / 1e6
    print(
        f"{made / 'index.html'}: {len(list(made.rglob('*.html')))} pages, {size:.1f} MB, for any browser, without a network."
    )
