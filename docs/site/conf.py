"""How Sphinx makes the site out of the pages that build.py laid ready."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = author = html_title = "mixtral_lab"
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True  # a print after a print stands below it
nb_ipywidgets_js = {}  # widgets are shown by site.js, and nothing comes from a CDN
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]
smartquotes = False

html_theme = "furo"
html_static_path = ["static"]
html_favicon = "static/icon.svg"
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_use_index = html_copy_source = html_show_sphinx = html_show_copyright = False
html_math_renderer = "mathml"
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


def formula(display):
    """Formulas become MathML, which browsers draw by themselves."""

    def visit(writer, node):
        writer.body.append(convert(node.astext(), display=display))
        raise SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
