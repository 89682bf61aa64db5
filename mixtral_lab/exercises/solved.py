"""The lessons with their solutions filled in: `make solutions` writes them into notebooks/solutions/.

The folded solutions in the lessons are the only source, so the two cannot differ.
"""

from __future__ import annotations

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
    """The same notebook: before the last line of each stub, which calls the checker, the solution takes its place."""
    answer = iter(solutions(notebook))
    filled = copy.deepcopy(notebook)
    for cell in filled["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and STUB in source:
            imports = [line for line in source.splitlines() if line.startswith(("from ", "import "))]
            *_, call = source.strip().splitlines()
            cell["source"] = "\n".join([*imports, *[""] * bool(imports), next(answer).strip(), "", call])
    return filled


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    out.mkdir(exist_ok=True)
    for lesson in sorted(source.glob("[0-9]*.ipynb")):
        filled = solved(json.loads(lesson.read_text("utf-8")))
        (out / lesson.name).write_text(json.dumps(filled, ensure_ascii=False, indent=1) + "\n", "utf-8")
        print(out / lesson.name)
