"""Do the lessons, traces, the study, edits and widgets work with a checkpoint of a published shape? Not a test of the suite: it
takes minutes, and 6 GB of disk and memory for two layers of Mixtral 8x7B.

    python tests/real_shapes.py narrow --layers 8 --dtype float32     # heads, experts, window, vocabulary; small matrices
    python tests/real_shapes.py mixtral-8x7b --records 2              # the shape itself, 2 layers in 8 places
    python tests/real_shapes.py mistral-7b-v0.1 --records 2

A checkpoint with random weights and Mistral's tokenizer is written, and every cell of every lesson runs with
`mixtral_lab.load("mini-mixtral")` (of a dense shape: "mini-mistral") opening it. The stored layers are taken in turn until there
are eight, because lessons speak of layer 5: every layer is a module of its own, some have the same weights. What a lesson
asserts about trained weights need not hold: such asserts are counted, and listed with --asserts. A cell fails on any other
error. (Lesson 15 starts a server, which has the stored layers alone: run it with --places of that number.) Ends with status 1
if a cell failed.
"""

from __future__ import annotations

import argparse
import ast
import json
import linecache
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BROWSER_PATH", "/nowhere")  # the study's PNG files are no part of this

import torch

import mixtral_lab
from mixtral_lab import bundled, study
from mixtral_lab.bench import Shape
from mixtral_lab.config import PRESETS, Config
from mixtral_lab.edit import ablate, replay, reroute, scale, temperature, top_k
from mixtral_lab.exercises.solved import solved
from mixtral_lab.model import Transformer
from mixtral_lab.widgets import InferenceStepper, RouterExplorer, WindowExplorer

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TEXT = "Once upon a time, a small house stood by the sea."


class TooLong(BaseException):
    """A cell was stopped: not an `Exception`, so that no cell catches it."""


@dataclass
class Ran:
    """What became of the cells of a lesson."""

    cells: int = 0
    asserts: list[str] = field(default_factory=list)  # that did not hold
    late: list[str] = field(default_factory=list)  # stopped
    failed: list[str] = field(default_factory=list)


def shape(name: str, layers: int) -> Config:
    """A published shape with fewer layers; "narrow" has the structure of 8x7B with the window of 7B, and small matrices."""
    if name == "narrow":
        whole = replace(PRESETS["mixtral-8x7b"].config, dim=256, head_dim=8, hidden=384, window=4096)
    else:
        whole = PRESETS[name].config
    return replace(whole, n_layers=layers)


def write(config: Config, folder: Path, dtype: str, tokenizer: str) -> None:
    """A checkpoint with random weights, and the tokenizer of Mistral 7B v0.1 or the one in the box."""
    Shape(folder.name, config).write(getattr(torch, dtype), folder)
    if tokenizer == "mistral":
        shutil.copy(str(files("mistral_common") / "data" / "tokenizer.model.v1"), folder / "tokenizer.model")
    else:
        for file in bundled.folder("mini-mixtral").glob("tokenizer*.json"):
            shutil.copy(file, folder)


def deeper(model: Transformer, layers: int) -> Transformer:
    """The same with so many layers, the weights of the ones that there are taken in turn."""
    with torch.device("meta"):
        found = Transformer(replace(model.config, n_layers=layers))
    for name, child in list(model.named_children()):
        if name != "layers":
            setattr(found, name, child)
    held = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}  # not copied
    for at in range(layers):
        found.layers[at] = deepcopy(model.layers[at % model.config.n_layers], dict(held))
    return found.requires_grad_(False).eval()


@contextmanager
def redirected(folder: Path, config: Config, asked: argparse.Namespace) -> Iterator[None]:
    """While open, the model in the box is this checkpoint, in this dtype, and the excerpts are few and short."""
    name = "mini-mixtral" if config.n_experts else "mini-mistral"
    load, where, excerpts, start = mixtral_lab.load, bundled.folder, bundled.excerpts, subprocess.Popen

    def other_load(path: Any = "mini-mixtral", device: str = "auto", dtype_asked: str = "auto", **options: Any) -> Any:
        numbers = options.pop("dtype", dtype_asked)
        lab = load(path, device, asked.dtype if path == name else numbers, **options)
        if path == name and options.get("experts") != "offload" and config.n_layers < asked.places:
            lab.model = deeper(lab.model, asked.places)
        return lab

    def other_start(command: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(command, list) and name in command:
            words = {name: str(folder), "float32": asked.dtype}
            command = [words.get(word, word) for word in command]
        return start(command, *rest, **options)

    def few() -> dict[str, list[dict]]:
        return {
            domain: [
                record | ({"text": record["text"][: asked.characters or None]} if "text" in record else {})
                for record in found[: asked.records or None]
            ]
            for domain, found in excerpts().items()
        }

    changes = [
        (mixtral_lab, "load", other_load),
        (bundled, "folder", lambda wanted: folder if wanted == name else where(wanted)),
        (bundled, "excerpts", few),
        (mixtral_lab, "excerpts", few),
        (subprocess, "Popen", other_start),
    ]
    before = [(place, what, getattr(place, what)) for place, what, _ in changes]
    for place, what, new in changes:
        setattr(place, what, new)
    try:
        yield
    finally:
        for place, what, old in before:
            setattr(place, what, old)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def show(value: object) -> None:
    """What a notebook does with a cell's last value."""
    if value is not None:
        repr(value)
        for way in ("_repr_mimebundle_", "_repr_html_"):
            if callable(found := getattr(value, way, None)):
                found()


def run_lesson(path: Path, seconds: int, space: dict[str, Any] | None = None) -> Ran:
    """Run a lesson, its exercises solved, statement by statement, so that an assert that does not hold ends nothing else."""
    notebook, ran = solved(json.loads(path.read_text("utf-8"))), Ran()
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda *values: [show(one) for one in values]}
    names |= space or {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        ran.cells += 1
        source, place = "".join(cell["source"]), f"<cell {number}>"
        linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
        statements = ast.parse(source).body
        try:
            with limited(seconds):
                for statement in statements:
                    run_statement(statement, place, source, statement is statements[-1], names, ran)
        except TooLong:
            ran.late.append(f"cell {number}: over {seconds} s")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(last.filename).name}, line {last.lineno}"
            ran.failed.append(f"cell {number}: {type(error).__name__}: {str(error)[:200]!r} ({at})")
    return ran


def run_statement(statement: ast.stmt, place: str, source: str, last: bool, names: dict[str, Any], ran: Ran) -> None:
    try:
        if last and isinstance(statement, ast.Expr):
            show(eval(compile(ast.Expression(statement.value), place, "eval"), names))
        else:
            exec(compile(ast.Module([statement], []), place, "exec"), names)
    except AssertionError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if not frame.filename.startswith("<cell"):
            raise
        ran.asserts.append(f"{place}: {(frame.line or '').strip()[:110]}")


def everything_else(config: Config, home: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Traces, edits, the study, widgets, on the redirected model."""
    name = "mini-mixtral" if config.n_experts else "mini-mistral"
    lab = mixtral_lab.load(name)
    seen: dict[str, Any] = {}

    def traced() -> None:
        seen["trace"] = lab.trace(TEXT, max_new_tokens=3, sites="*")
        for site in lab.sites:
            assert not seen["trace"][site].isnan().any(), site
        saved = seen["trace"].save(home / "trace.safetensors")
        assert mixtral_lab.Trace.load(saved).ids.equal(seen["trace"].ids)
        saved.unlink()

    def edited(edit: Any) -> None:
        ids = torch.tensor([lab.tokenizer.encode(TEXT)])
        before = lab.logits(ids)
        with lab.edit(edit):
            after = lab.logits(ids)
        assert after.isfinite().all() and not torch.equal(before, after)

    def traced_without(layer: int, expert: int) -> Any:
        with lab.edit(ablate(layer, expert, how="next_best")):
            return lab.trace(TEXT)

    def studied() -> None:
        texts = {"code": ["def f(x):\n    return x + 1\n"] * 2, "prose": [TEXT, TEXT[::-1]]}
        found = study.study(lab, texts, home / "study")
        assert found.report.stat().st_size > 1e6 and len(found.sections) > 5
        shutil.rmtree(home / "study")

    yield "trace of all sites, saved and loaded", traced
    yield "text", lambda: lab.generate([TEXT, "One"], max_new_tokens=3)
    yield "chat", lambda: lab.chat([{"role": "user", "content": "Hi"}], max_new_tokens=3)
    if config.n_experts:
        last = lab.config.n_layers - 1
        first, second = lab.trace(TEXT).experts[[0, last], 3, 0].tolist()  # chosen at least once
        yield "ablate", lambda: edited(ablate(last, second, how="next_best"))
        yield "reroute", lambda: edited(reroute(last, None, [1, 2]))
        yield "scale", lambda: edited(scale(0, first, 0.25))
        yield "top_k", lambda: edited(top_k(1))
        yield "temperature", lambda: edited(temperature(4.0))
        yield "replay", lambda: edited(replay(traced_without(last, second)))
        yield "study", studied
        yield "RouterExplorer", lambda: show(RouterExplorer(seen["trace"]))
        yield "InferenceStepper", lambda: show(InferenceStepper(lab, TEXT))
    else:
        yield "WindowExplorer", lambda: show(WindowExplorer(lab, text=TEXT))
        long = torch.randint(lab.tokenizer.vocab, (1, config.window + 200))

        def past_the_window() -> None:
            assert lab.logits(long[:, -300:]).isfinite().all()
            found = lab.trace_ids(long[0].tolist(), max_new_tokens=1, sites=["layers.0.residual.after"], positions=[-1])
            assert found["layers.0.residual.after"].isfinite().all()

        yield f"{long.shape[1]:,} tokens, past the window", past_the_window
    values = [site for site in lab.sites if not site.endswith("router.experts")]
    yield "a write at every site", lambda: [edited({site: lambda x: x * 1.5}) for site in values]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["narrow", *PRESETS])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--places", type=int, default=8, help="layers of the model that is run; 8, as in the box")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--tokenizer", choices=["mistral", "box"], default="mistral", help="lessons 02 and 18 open box's file"
    )
    parser.add_argument(
        "--lessons", nargs="*", default=[], help="numbers, such as 01 04, for these alone; none: all but lessons"
    )
    parser.add_argument("--records", type=int, default=0, help="excerpts of each domain; 0: all")
    parser.add_argument("--characters", type=int, default=0, help="of each excerpt; 0: all")
    parser.add_argument("--seconds", type=int, default=120, help="for a cell")
    parser.add_argument("--folder", type=Path, help="write here and keep it; a checkpoint that is there is used again")
    parser.add_argument("--asserts", action="store_true", help="list the asserts that did not hold")
    asked = parser.parse_args()
    config = shape(asked.shape, asked.layers)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="real-shapes-") as temporary:
        home = asked.folder or Path(temporary)
        folder = home / f"{asked.shape}-{config.n_layers}-layers"
        if not folder.exists():
            home.mkdir(parents=True, exist_ok=True)
            write(config, folder, asked.dtype, asked.tokenizer)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(
            f"{folder.name}: {config.parameters / 1e9:.2f} B parameters, {size / 1e9:.2f} GB, {asked.dtype}", flush=True
        )
        with redirected(folder, config, asked):
            rest = asked.lessons in ([], ["none"])
            for what, work in everything_else(config, Path(temporary)) if rest else ():
                start, said, outcome = time.perf_counter(), StringIO(), "works"
                try:
                    with limited(asked.seconds), redirect_stdout(said), redirect_stderr(said):
                        work()
                except (Exception, TooLong) as error:
                    wrong += 1
                    last = traceback.extract_tb(error.__traceback__)[-1]
                    outcome = (
                        f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}, line {last.lineno})"
                    )
                print(f"{what}: {outcome}; {time.perf_counter() - start:.0f} s", flush=True)
            for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
                if asked.lessons and path.stem[:2] not in asked.lessons:
                    continue
                start, said = time.perf_counter(), StringIO()
                with redirect_stdout(said), redirect_stderr(said):
                    ran = run_lesson(path, asked.seconds)
                wrong += len(ran.failed)
                print(
                    f"{path.stem}: {ran.cells} cells, {len(ran.asserts)} asserts did not hold, {len(ran.late)} stopped, "
                    f"{len(ran.failed)} failed; {time.perf_counter() - start:.0f} s"
                )
                hidden = [] if not asked.asserts else [f"did not hold: {line}" for line in ran.asserts]
                for line in (*ran.failed, *ran.late, *hidden):
                    print(f"    {line}")
                sys.stdout.flush()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
