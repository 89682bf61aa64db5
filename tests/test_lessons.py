"""The form of every lesson: small, comparable, without leftovers; and its folded solutions solve its exercises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mixtral_lab.exercises.solved import solutions, solved

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_there_are_lessons():
    assert LESSONS


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_outputs_are_compared_and_nothing_else_is_kept(path):
    compared = 0
    for cell in cells(path, "code"):
        if "NBVAL_CHECK_OUTPUT" in source(cell):
            assert cell["outputs"], f"a compared cell has no output: {source(cell)[:60]}"
            assert "keep_output" in cell["metadata"]["tags"]
            assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "execute_result"}
            compared += 1
        else:
            assert not cell["outputs"], f"an output was left in: {source(cell)[:60]}"
    assert compared >= 3
    assert "widgets" not in json.loads(path.read_text("utf-8"))["metadata"]
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_cells_are_short_and_explained(path):
    code, text = cells(path, "code"), cells(path, "markdown")
    lengths = sorted(source(cell).count("\n") + 1 for cell in code)
    assert lengths[len(lengths) // 2] <= 6
    assert lengths[-1] <= 15
    assert 2 * len(text) >= len(code)
    assert not re.search(r"pip install|fig\.show\(", "".join(map(source, code)))
    assert "In three lines" in "".join(map(source, text))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_stubs_are_unsolved_and_folded_solutions_right(path):
    """Cells tagged `setup` make what the exercises need; a stub's last line calls its checker."""
    answers = solutions(json.loads(path.read_text("utf-8")))
    code = cells(path, "code")
    stubs = [source(cell) for cell in code if "your turn" in source(cell)]
    assert len(stubs) == len(answers) >= 2
    space: dict = {}
    for cell in code:
        if "setup" in cell["metadata"].get("tags", []):
            exec(source(cell), space)
    for stub, solution in zip(stubs, answers, strict=True):
        *_, call = stub.strip().splitlines()
        exec(stub.rpartition(call)[0], space)
        assert eval(call, space).solved is None, call
        exec(solution, space)
        assert eval(call, space).solved is True, call


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_solved_lesson_has_no_stub_left_and_still_calls_its_checkers(path):
    lesson = json.loads(path.read_text("utf-8"))
    filled = solved(lesson)
    assert len(filled["cells"]) == len(lesson["cells"])
    for before, after in zip(lesson["cells"], filled["cells"], strict=True):
        if before["cell_type"] == "code" and "your turn" in source(before):
            assert "your turn" not in source(after)
            assert source(before).strip().splitlines()[-1] == source(after).splitlines()[-1]
            compile(source(after), path.name, "exec")
        else:
            assert before == after
