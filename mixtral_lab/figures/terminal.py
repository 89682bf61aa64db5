"""Who read every token, as a table for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from mixtral_lab.figures.colours import expert_colour, text_colour
from mixtral_lab.trace import Trace


def expert_table(trace: Trace, start: int = 0, width: int | None = None) -> Table:
    """A row for every token from `start` on, a column for every layer: its experts, the first with its weight in %.

    Cells take the first expert's colour. Where that does not fit into `width` characters, they name the first expert only.
    Raises `TraceError` for a trace without routing, such as a dense model's.
    """
    _, experts, weights = trace.routing
    chosen, first = experts[:, start:].tolist(), weights[:, start:, 0].tolist()
    labels = [
        [f"{','.join(map(str, best))} {100 * weight:3.0f}" for best, weight in zip(*of_layer, strict=True)]
        for of_layer in zip(chosen, first, strict=True)
    ]
    tokens = trace.tokens[start:]
    needed = len(str(len(trace))) + 2 + max(map(len, tokens), default=0)
    needed += sum(1 + max(map(len, of_layer), default=0) for of_layer in labels)
    if width is not None and needed > width:
        labels = [[str(best[0]) for best in of_layer] for of_layer in chosen]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", justify="right", style="dim")
    table.add_column("token", no_wrap=True)
    for layer in range(len(labels)):
        table.add_column(f"L{layer}", justify="center", no_wrap=True)
    for at, token in enumerate(tokens):
        colours = [expert_colour(of_layer[at][0]) for of_layer in chosen]
        cells = [
            Text(of_layer[at], style=f"{text_colour(colour)} on {colour}")
            for of_layer, colour in zip(labels, colours, strict=True)
        ]
        table.add_row(str(start + at), Text(token, style="bold" if start + at >= trace.n_prompt else ""), *cells)
    return table
