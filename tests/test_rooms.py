"""The architecture, held by reading the imports: a room knows only the rooms before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mixtral_lab"

# A module may import only what stands on an earlier line (modules of one line may import each other).
ORDER = [
    ["config"],
    ["terminal"],
    ["bundled"],
    ["tokenizer"],
    ["model.module"],
    ["model.site"],
    ["model.linear"],
    ["model.rope"],
    ["model.bands"],
    ["model.attention"],
    ["model.moe"],
    ["model.quantized"],
    ["model.transformer"],
    ["model"],
    ["expert_cache"],
    ["offload"],
    ["parallel"],
    ["checkpoint"],
    ["weights"],
    ["lora"],
    ["upcycled"],
    ["machine"],
    ["generate"],
    ["sites"],
    ["engines"],
    ["trace"],
    ["edit"],
    ["lab"],
    ["hugging_face"],
    [""],  # the package itself: the public names
    ["chat"],
    ["analysis", "analysis.*"],
    ["figures", "figures.*"],
    ["study", "study.*"],
    ["widgets.page"],
    ["widgets.base"],
    ["widgets", "widgets.*"],
    ["app"],
    ["repl"],
    ["exercises.verdict"],
    ["exercises", "exercises.*"],
    ["train", "train.*"],
    ["bench", "bench.*"],
    ["serve.protocol"],
    ["serve.gate", "serve.worker"],
    ["serve.reply"],
    ["serve.app"],
    ["serve"],
    ["cli"],
    ["run"],
]
PLOTTING = {"figures", "figures.*"}
OPENERS = {
    "bundled",
    "tokenizer",
    "checkpoint",
    "weights",
    "lora",
    "upcycled",
    "trace",
    "chat",
    "app",
    "study.corpus",
    "study.report",
    "widgets.page",
    "widgets.base",
    "exercises.solved",
    "bench",
    "bench.*",
    "cli",
    "train.*",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def line_of(name: str) -> int:
    for line, names in enumerate(ORDER):
        if name in names:
            return line
    for line, names in enumerate(ORDER):
        if name.partition(".")[0] + ".*" in names:
            return line
    raise AssertionError(f"mixtral_lab.{name} has no place in ORDER: give it one")


def imports(path: Path) -> list[tuple[str, ast.AST]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            found += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return found


def ours(name: str) -> str | None:
    if name == "mixtral_lab" or name.startswith("mixtral_lab."):
        inner = name.removeprefix("mixtral_lab").removeprefix(".")
        while inner and inner not in map(name_of, MODULES):
            inner = inner.rpartition(".")[0]
        return inner
    return None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_imports_only_earlier_rooms(path):
    here = name_of(path)
    for name, _ in imports(path):
        there = ours(name)
        if there is None or there == here:
            continue
        assert line_of(there) <= line_of(here), f"mixtral_lab.{here} must not import mixtral_lab.{there}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_special_libraries_stay_in_their_rooms(path):
    here, names = name_of(path), {name.partition(".")[0] for name, _ in imports(path)}
    if "plotly" in names:
        assert {here, here.partition(".")[0] + ".*"} & PLOTTING
    if names & {"ipywidgets", "anywidget"}:
        assert here.startswith("widgets")
    if "transformers" in names:
        assert here.partition(".")[0] == "bench"
    if here.startswith("model"):
        assert names <= {
            "__future__", "collections", "contextlib", "functools", "typing", "torch", "einops", "jaxtyping", "mixtral_lab",
        }  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_some_rooms_open_files(path):
    here = name_of(path)
    if here in OPENERS or here.partition(".")[0] + ".*" in OPENERS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert called not in {
                "open", "read_text", "write_text", "read_bytes", "write_bytes", "safe_open", "save_file",
            }, f"mixtral_lab.{here} opens a file"  # fmt: skip


def test_figures_never_receive_a_model():
    paths = [path for path in MODULES if name_of(path).partition(".")[0] == "figures"]
    assert paths
    for path in paths:
        assert not {"Transformer", "Lab"} & {name.rpartition(".")[2] for name, _ in imports(path)}


def test_nothing_reads_pickles_or_runs_code_from_files():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                whole = ast.unparse(node.func)
                assert whole not in {"torch.load", "pickle.load", "pickle.loads"}, f"{path} calls {whole}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False"


def test_there_is_no_utils():
    assert not [path for path in MODULES if path.stem in {"utils", "helpers", "misc", "common"}]
