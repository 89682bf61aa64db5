"""Small files over country facts in HTML, XML, JSON, YAML, TOML, CSV, Markdown, LaTeX, CSS and SVG."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mixtral_lab.train.stories import COLOURS, FRUITS, GIRLS, TOYS, capital, words

COUNTRY_TITLES = words("Countries|Travel notes|Places to know|Atlas|Geography list|World table|Capital cities", "|")
SHOP_TITLES = words("Shop Prices Stock Inventory")
CLASSES = words("card menu note title footer item button")


@dataclass(frozen=True)
class Page:
    """What a file is about: a table with a header, a title, two colours, and the indentation ``pad``."""

    rng: random.Random
    header: list[str]
    rows: list[list[str]]
    title: str
    colours: tuple[str, str]
    pad: str

    @property
    def entries(self) -> list[dict[str, str]]:
        """The rows as dictionaries."""
        return [dict(zip(self.header, row, strict=True)) for row in self.rows]


def html_table(page: Page) -> str:
    """Write a whole HTML page with one table."""
    pad, title = page.pad, page.title
    head = "".join(f"<th>{capital(cell)}</th>" for cell in page.header)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in page.rows)
    body = "\n".join(f"{pad * 3}<tr>{row}</tr>" for row in rows)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{pad}<meta charset="utf-8">\n'
        f"{pad}<title>{title}</title>\n</head>\n"
        f'<body>\n{pad}<h1>{title}</h1>\n{pad}<table class="{page.colours[0]}">\n'
        f"{pad * 2}<thead><tr>{head}</tr></thead>\n{pad * 2}<tbody>\n{body}\n{pad * 2}</tbody>\n"
        f"{pad}</table>\n</body>\n</html>"
    )


def html_list(page: Page) -> str:
    """Write an HTML section with a list."""
    accent, other = page.colours
    items = "\n".join(
        f'{page.pad}<li class="{accent if i % 2 else other}"><b>{escape(row[0])}</b>: {escape(row[1])}</li>'
        for i, row in enumerate(page.rows)
    )
    name = page.title.lower().replace(" ", "-")
    return (
        f'<section id="{name}">\n<h2>{page.title}</h2>\n<ul>\n{items}\n</ul>\n'
        f"<p>There are {len(page.rows)} entries.</p>\n</section>"
    )


def html_form(page: Page) -> str:
    """Write an HTML form that edits the first row."""
    pad = page.pad
    fields = "\n".join(
        f'{pad}<label for="{name}">{capital(name)}</label>\n'
        f'{pad}<input type="{"number" if name == "price" else "text"}" id="{name}" name="{name}"'
        f' value="{escape(value)}">'
        for name, value in page.entries[0].items()
    )
    options = "\n".join(f'{pad * 2}<option value="{i}">{escape(row[0])}</option>' for i, row in enumerate(page.rows))
    return (
        f'<form action="/{page.header[0]}/save" method="post">\n{fields}\n'
        f'{pad}<select name="choice">\n'
        f"{options}\n{pad}</select>\n"
        f'{pad}<button type="submit" class="{page.colours[0]}">Save</button>\n</form>'
    )


def xml(page: Page) -> str:
    """Write an XML list."""
    pad, name = page.pad, page.header[0]
    items = "\n".join(
        f"{pad}<{name}>\n"
        + "\n".join(f"{pad * 2}<{key}>{escape(value)}</{key}>" for key, value in entry.items())
        + f"\n{pad}</{name}>"
        for entry in page.entries
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<list title="{page.title}">\n{items}\n</list>'


def json_object(page: Page) -> str:
    """Write a JSON object."""
    content = {"title": page.title, "count": len(page.rows), "entries": page.entries}
    return json.dumps(content, indent=len(page.pad), ensure_ascii=False)


def yaml(page: Page) -> str:
    """Write a YAML document."""
    items = "\n".join(
        "\n".join(f"{'  - ' if i == 0 else '    '}{key}: {value}" for i, (key, value) in enumerate(entry.items()))
        for entry in page.entries
    )
    return f"# {page.title}\ntitle: {page.title}\ncount: {len(page.rows)}\nentries:\n{items}"


def toml(page: Page) -> str:
    """Write a TOML file with an array of tables."""
    items = "\n\n".join(
        f"[[{page.header[0]}]]\n" + "\n".join(f'{key} = "{value}"' for key, value in entry.items())
        for entry in page.entries
    )
    return f'title = "{page.title}"\ncount = {len(page.rows)}\n\n{items}'


def csv(page: Page) -> str:
    """Write comma or semicolon separated values, quoted where a cell contains the mark."""
    mark = page.rng.choice([",", ";"])
    return "\n".join(
        mark.join(f'"{cell}"' if mark in cell else cell for cell in row) for row in [page.header, *page.rows]
    )


def markdown(page: Page) -> str:
    """Write a Markdown page with a table and a list."""
    header = [capital(cell) for cell in page.header]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *page.rows])
    return (
        f"# {page.title}\n\nThis table has {len(page.rows)} rows.\n\n{table}\n\n"
        f"- first: **{page.rows[0][0]}**\n- last: *{page.rows[-1][0]}*"
    )


def latex(page: Page) -> str:
    """Write a LaTeX section with a table."""
    pad = page.pad
    head = " & ".join(map(capital, page.header))
    body = " \\\\\n".join(pad + " & ".join(cell.replace("&", "\\&") for cell in row) for row in page.rows)
    return (
        f"\\section{{{page.title}}}\n\\begin{{tabular}}{{{'l' * len(page.header)}}}\n{pad}\\hline\n"
        f"{pad}{head} \\\\\n{pad}\\hline\n{body} \\\\\n{pad}\\hline\n\\end{{tabular}}"
    )


def css(page: Page) -> str:
    """Write a style sheet with four rules."""
    rng, pad, (accent, other) = page.rng, page.pad, page.colours

    def rule(thing: str) -> str:
        name = f"{rng.choice(CLASSES)}-{thing.replace(' ', '-')}"
        colour = f"{pad}color: {rng.choice(COLOURS)};\n"
        padding = f"{pad}padding: {rng.randrange(1, 33)}px {rng.randrange(1, 33)}px;\n"
        last = rng.choice(
            [
                f"{pad}border: {rng.randrange(1, 5)}px solid {accent};\n",
                f"{pad}display: flex;\n{pad}gap: {rng.randrange(2, 30)}px;\n",
                f"{pad}font-size: {rng.randrange(10, 33)}px;\n",
                f"{pad}background: {other};\n{pad}border-radius: {rng.randrange(2, 17)}px;\n",
            ]
        )
        return f".{name} {{\n{colour}{padding}{last}}}"

    rules = "\n\n".join(rule(thing) for thing in rng.sample(FRUITS + TOYS, 4))
    note = f"/* {page.title} in {accent} and {other} */"
    return f"{note}\nbody {{\n{pad}margin: 0;\n{pad}background: {other};\n}}\n\n{rules}"


def svg(page: Page) -> str:
    """Write a drawing of a few circles, rectangles and names."""
    rng, pad, accent = page.rng, page.pad, page.colours[0]

    def shape() -> str:
        circle = f'cx="{rng.randrange(10, 190)}" cy="{rng.randrange(10, 90)}" r="{rng.randrange(2, 30)}"'
        circle = f'<circle {circle} fill="{rng.choice(COLOURS)}"/>'
        corner = f'x="{rng.randrange(0, 150)}" y="{rng.randrange(0, 70)}"'
        size = f'width="{rng.randrange(5, 60)}" height="{rng.randrange(5, 40)}"'
        rectangle = f'<rect {corner} {size} fill="{rng.choice(COLOURS)}"/>'
        place = f'x="{rng.randrange(5, 120)}" y="{rng.randrange(12, 95)}"'
        text = f'<text {place} fill="{accent}">{rng.choice(GIRLS)}</text>'
        return pad + rng.choice([circle, rectangle, text])

    shapes = "\n".join(shape() for _ in range(rng.randrange(3, 8)))
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="200" height="100">\n{shapes}\n</svg>'


FORMATS: tuple[Callable[[Page], str], ...] = (
    html_table,
    html_list,
    html_form,
    xml,
    json_object,
    yaml,
    toml,
    csv,
    markdown,
    latex,
    css,
    svg,
)


def records(rng: random.Random, facts: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[list[str]]]:
    """Return a header and three to eight rows: countries with capitals and regions, or a small shop."""
    count = rng.randrange(3, 9)
    regions = dict(facts.get("regions", ()))
    known = [(country, city) for country, city in facts.get("capitals", ()) if country in regions]
    if len(known) >= count and rng.random() < 0.7:
        chosen = rng.sample(known, count)
        return ["country", "capital", "region"], [[*pair, capital(regions[pair[0]])] for pair in chosen]
    things = rng.sample(FRUITS + TOYS, count)
    return ["item", "price", "colour"], [[thing, str(rng.randrange(1, 60)), rng.choice(COLOURS)] for thing in things]


def page(rng: random.Random, facts: Mapping[str, Sequence[Any]]) -> str:
    """Write one small file in a random format; equal random states give equal files."""
    header, rows = records(rng, facts)
    write = rng.choice(FORMATS)
    title = rng.choice(COUNTRY_TITLES if header[0] == "country" else SHOP_TITLES)
    accent, other = rng.sample(COLOURS, 2)
    pad = rng.choice(["  ", "    "])
    return write(Page(rng, header, rows, title, (accent, other), pad))
