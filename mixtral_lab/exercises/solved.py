"""The lessons with their solutions filled in: `make solutions` writes them into notebooks/solutions/.

The folded solutions in the lessons are the only source, so the two cannot differ.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.DOTALL)
STUB = "your turn"


def solutions(notebook: dict[str, Any]) -> list[str]:
    """The code of every folded solution, in order."""
    texts = ("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return [code for text in texts for code in SOLUTION.findall(text)]


def solved(notebook: dict[str, Any]) -> dict[str, Any]:
    """The same notebook, where the solution stands in each stub in place of what it defines anew."""
    answers = iter(solutions(notebook))
    filled = copy.deepcopy(notebook)
    for cell in filled["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and STUB in source:
            answer = next(answers).strip()
            defined = {name for statement in ast.parse(answer).body for name in _defines(statement)}
            *before, call = ast.parse(source).body
            kept = [ast.get_source_segment(source, one) for one in before if not _defines(one) & defined]
            cell["source"] = "\n\n".join([*filter(None, kept), answer, ast.get_source_segment(source, call) or ""])
    return filled


def _defines(statement: ast.stmt) -> set[str]:
    """The names that a statement gives a value to."""
    if isinstance(statement, ast.FunctionDef):
        return {statement.name}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    out.mkdir(exist_ok=True)
    for lesson in sorted(source.glob("[0-9]*.ipynb")):
        filled = solved(json.loads(lesson.read_text("utf-8")))
        (out / lesson.name).write_text(json.dumps(filled, ensure_ascii=False, indent=1) + "\n", "utf-8")
        print(out / lesson.name)
