"""What `make site` does to notebooks, links and figures before Sphinx sees them. tests/browser/test_site.py opens a site."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "site" / "build.py")
build_site = importlib.util.module_from_spec(specification)
sys.modules["build_site"] = build_site
specification.loader.exec_module(build_site)

FIRST = ROOT / "notebooks" / "00_start_here.ipynb"


def lesson(tmp_path, *cells) -> build_site.Lesson:
    return build_site.Lesson(
        Path("notebooks/01_meet_the_router.ipynb"), tmp_path / "kept", new_notebook(cells=list(cells))
    )


@pytest.fixture
def pages(tmp_path):
    return build_site.Pages(tmp_path / "pages", [lesson(tmp_path)])


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[one](01_meet_the_router.ipynb)", "[one](01_meet_the_router.ipynb)"),
        ("[sites](../docs/sites.md#read)", "[sites](../docs/sites.md#read)"),
        ("[`moe.py`](../mixtral_lab/model/moe.py)", "[`moe.py`](../mixtral_lab/model/moe.py.md)"),
        ("see [arXiv](https://arxiv.org/abs/2401.04088).", "see [arXiv](https://arxiv.org/abs/2401.04088)."),
        ("the [last](99_none.ipynb) and [model](../mixtral_lab/model)", "the last and model"),
        (
            "`experts[i](x)`, and ```python\ny = experts[i](x)\n```",
            "`experts[i](x)`, and ```python\ny = experts[i](x)\n```",
        ),
        ("![shot](../docs/router_explorer.png)", "![shot](../docs/router_explorer.png)"),
    ],
)
def test_links_lead_to_what_the_site_has_or_are_words(pages, written, shown):
    assert pages.linked(written, "notebooks") == shown


def test_a_link_shown_in_another_folder_still_leads_there(pages):
    assert (
        pages.linked("[one](01_meet_the_router.ipynb)", "notebooks", shown_in="")
        == "[one](notebooks/01_meet_the_router.ipynb)"
    )
    assert pages.linked("[table](../docs/sites.md)", "notebooks", shown_in="") == "[table](docs/sites.md)"


def test_linked_code_has_a_page_that_shows_all_of_it(pages):
    pages.linked("[`moe.py`](../mixtral_lab/model/moe.py)", "notebooks")
    page = (pages.folder / "mixtral_lab/model/moe.py.md").read_text("utf-8")
    assert (ROOT / "mixtral_lab/model/moe.py").read_text("utf-8") in page


def test_outputs_are_kept_until_code_or_package_change(tmp_path):
    code = new_code_cell("1 + 1")
    one = lesson(tmp_path, new_markdown_cell("Two?"), code)
    one.kept.mkdir()
    (one.kept / "outputs.json").write_text(json.dumps({"digest": one.digest("package"), "outputs": [[]]}), "utf-8")
    assert one.outputs(one.digest("package")) == [[]]
    reworded = lesson(tmp_path, new_markdown_cell("What is the sum?"), code)
    assert reworded.outputs(reworded.digest("package")) == [[]]
    assert one.outputs(one.digest("another package")) is None
    changed = lesson(tmp_path, new_markdown_cell("Two?"), new_code_cell("1 + 2"))
    assert changed.outputs(changed.digest("package")) is None


def test_figures_wait_in_the_page_with_their_size_and_all_their_numbers():
    figure = {"data": [{"type": "scatter", "y": [1, 2], "name": "</script>"}], "layout": {"width": 900, "height": 321}}
    output = {"output_type": "display_data", "metadata": {}, "data": {build_site.FIGURE: figure | {"config": {}}}}
    shown = build_site.on_a_page(output)["data"]
    assert list(shown) == ["text/html"]
    before, packed = shown["text/html"].split('<script type="application/json">')
    packed, _, after = packed.partition("</script>")
    assert "width:900px;height:321px" in before
    assert json.loads(packed) == figure and after == "</div>"
    text = {"output_type": "stream", "name": "stdout", "text": "2"}
    assert build_site.on_a_page(text) is text


def test_the_first_page_has_the_map_and_the_words_of_the_first_lesson():
    first = nbformat.read(FIRST, 4)
    lessons = build_site.section(first, "A map of the lessons")
    assert lessons.startswith("## A map of the lessons\n") and "01_meet_the_router.ipynb" in lessons
    words = build_site.section(first, "The words of the lab")
    assert "near tie" in words and "```text\nlayer 8" in words and "A map" not in words
    with pytest.raises(SystemExit, match="no heading “Nothing”"):
        build_site.section(first, "Nothing")


def test_marks_for_the_tests_are_not_shown(pages, tmp_path):
    cells = new_markdown_cell("# Title\nText."), new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1)")
    pages.lesson(lesson(tmp_path, *cells), [[]])
    shown = nbformat.read(tmp_path / "pages" / "notebooks" / "01_meet_the_router.ipynb", 4)
    assert shown.cells[1].source == "print(1)" and "# Title" in shown.cells[0].source


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    theirs = tmp_path / "site"
    theirs.mkdir()
    (theirs / "diary.txt").write_text("dear")
    with pytest.raises(SystemExit, match="was left alone"):
        build_site.emptied(theirs)
    assert (theirs / "diary.txt").read_text() == "dear"
    ours = build_site.emptied(tmp_path / "new")
    (ours / "page.html").touch()
    assert [file.name for file in build_site.emptied(ours).iterdir()] == [build_site.MADE]


def test_a_lesson_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match="There is no lesson"):
        build_site.build([tmp_path / "none.ipynb"], tmp_path, 1)
