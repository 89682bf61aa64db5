"""What a lesson's kernel is told while the site is built: figures as data, widgets as a part of the web page."""

from __future__ import annotations

import html
import itertools
import re
from pathlib import Path

import plotly.io
from IPython.display import display

from mixtral_lab.widgets import LabWidget
from mixtral_lab.widgets.page import alone

STATE = re.compile(r'<script type="application/json" id="state">(.*?)</script>', re.DOTALL)
SCRIPT = """(() => {{
{script}
(window.mixtralLabWidgets ||= {{}}).{kind} = start;
}})();
"""
EMBEDDED = """<div class="lab-widget" data-kind="{kind}"><div class="place">{fallback}</div>
<script type="application/json">{state}</script>
<p><a href="explorers/{page}">{kind} on a page of its own</a>: {title}</p></div>"""


def for_site(lesson: str, folder: str) -> None:
    """From now on, every widget shown is also written into `folder`: its script, its style, and a page of its own."""
    plotly.io.renderers.default = "plotly_mimetype"
    numbers = itertools.count(1)

    def shown(widget: LabWidget) -> None:
        kind = type(widget).__name__
        page = widget.save_html(Path(folder, f"{lesson}-{next(numbers)}.html"))
        Path(folder, f"{kind}.js").write_text(SCRIPT.format(kind=kind, script=alone(widget._esm)), "utf-8")
        Path(folder, f"{kind}.css").write_text(widget._css, "utf-8")
        state = STATE.search(page.read_text("utf-8"))[1]
        embedded = EMBEDDED.format(
            kind=kind, fallback=widget.fallback(), state=state, page=page.name, title=html.escape(widget.title)
        )
        display({"text/html": embedded, "text/plain": widget.title}, raw=True)

    LabWidget._ipython_display_ = shown
