"""The `mixtral-lab` command: the same calls as in Python, for a terminal. Thin on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixtral_lab.config import PRESETS, Config, LabError
from mixtral_lab.terminal import err, in_one_sentence

if TYPE_CHECKING:
    from mixtral_lab.trace import Trace

app = typer.Typer(
    help="Open a mixture-of-experts language model, watch every decision it makes, and change one.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
out = Console(highlight=False, soft_wrap=False)

Model = Annotated[str, typer.Option(help="A checkpoint folder, a GGUF file, or mini-mixtral or mini-mistral.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose deliberate errors are one sentence, not a traceback."""
    return app.command()(in_one_sentence(function))


@command
def trace(
    text: Annotated[str, typer.Argument(help="The prompt.")],
    model: Model = "mini-mixtral",
    new: Annotated[int, typer.Option(min=0, help="How many tokens the model writes on.")] = 40,
    html: Annotated[Path | None, typer.Option(help="Also write a page to look at in a browser, offline.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the trace itself (.safetensors).")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Let a model read TEXT and write on; show which experts took every token."""
    import mixtral_lab

    with err.status("loading"):
        lab = mixtral_lab.load(model, device=device, dtype=dtype)
    with err.status("reading and writing"):
        found = lab.trace(text, max_new_tokens=new)
    routing = found.routing  # a dense model says so here, before anything is printed
    written = {}  # files first, so that they are there also if the reader of our output goes away
    if html is not None:
        from mixtral_lab.widgets import RouterExplorer

        written["Page"] = RouterExplorer(found).save_html(html)
    if save is not None:
        written["Trace"] = found.save(save)
    out.print(Text(text, style="dim"), Text(lab.tokenizer.decode(found.ids[found.n_prompt :]), style="bold"), sep="")
    out.print()
    out.print(_expert_table(found))
    out.print(
        f"{found.model} in {found.dtype}: a cell names the experts that took the token in that layer, the first with "
        f"its weight in %. {routing.logits.shape[-1]} experts, coloured by the first.",
        style="dim",
    )
    for what, path in written.items():
        out.print(f"{what}: {path}")


def _expert_table(found: Trace) -> Table:
    from mixtral_lab.figures import expert_colour, text_colour

    _, experts, weights = found.routing
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", justify="right", style="dim")
    table.add_column("token", no_wrap=True)
    for layer in range(len(experts)):
        table.add_column(f"L{layer}", justify="center", no_wrap=True)
    for at, token in enumerate(found.tokens):
        cells = []
        for layer in range(len(experts)):
            best, *others = experts[layer, at].tolist()
            colour = expert_colour(best)
            label = ",".join(map(str, [best, *others])) + f" {100 * weights[layer, at, 0].item():3.0f}"
            cells.append(Text(label, style=f"{text_colour(colour)} on {colour}"))
        written = at >= found.n_prompt
        table.add_row(str(at), Text(token, style="bold" if written else ""), *cells)
    return table


@command
def info(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file, a bundled model, or a published shape.")],
    tensors: Annotated[bool, typer.Option(help="List every tensor of the checkpoint.")] = True,
    device: Annotated[
        str | None, typer.Option(help="Also say what fits this device: auto, cpu, cuda, ... Its bandwidth is measured.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="Instead of a device here: its memory in GB.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Its memory's bandwidth in GB/s.")] = None,
    link: Annotated[
        float | None, typer.Option(help="GB/s at which experts come that do not fit: the bus of a GPU, or a disk.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of text, for the cache.")] = 4096,
) -> None:
    """Show a model's shape, parameters, memory and tensors, without loading it. Works for published shapes too."""
    from mixtral_lab import bundled
    from mixtral_lab.weights import describe, read_config

    path: Path | None = Path(model).expanduser()
    if path is not None and not path.exists():
        path = bundled.folder(model) if model in bundled.MODELS and bundled.has(model) else None
    if path is None and model not in PRESETS:
        raise LabError(f"There is no file or folder {model}. Published shapes are {', '.join(PRESETS)}.")
    config = PRESETS[model].config if path is None else read_config(path)

    out.print(Text(model if path is None else str(path), style="bold"))
    if model in PRESETS:
        out.print(f"{PRESETS[model].title}. Source: {PRESETS[model].source}.", style="dim")
    out.print(_config_table(config))
    out.print(_memory_table(config))
    if device is not None or memory is not None or bandwidth is not None:
        _print_what_fits(config, device, memory, bandwidth, link, length)
    if path is None:
        out.print("A shape without weights: there are no tensors to list.", style="dim")
    elif tensors:
        table = Table("stored as", "shape", "dtype", "MB", "our name", box=None, header_style="dim", pad_edge=False)
        for one in describe(path):
            ours = one.ours[0] + (f" and {len(one.ours) - 1} more" if len(one.ours) > 1 else "") if one.ours else "-"
            table.add_row(one.name, " x ".join(map(str, one.shape)), one.dtype, f"{one.bytes / 1e6:.2f}", ours)
        out.print(table)


def _config_table(config: Config) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    experts = "none: dense" if config.n_experts is None else f"{config.n_experts}, {config.n_choices} for each token"
    for name, value in (
        ("layers", config.n_layers),
        ("residual stream (dim)", config.dim),
        ("heads", f"{config.n_heads} query, {config.n_kv_heads} key/value, {config.head_dim} wide"),
        ("experts", experts),
        ("inside an expert (hidden)" if config.n_experts else "feed-forward (hidden)", config.hidden),
        ("vocabulary", f"{config.vocab:,}{', output tied to it' if config.tied else ''}"),
        ("window", "none" if config.window is None else f"{config.window:,} tokens"),
        ("context", f"{config.context:,} tokens"),
        ("rotary theta, norm eps", f"{config.rope_theta:g}, {config.norm_eps:g}"),
        ("parameters", f"{config.parameters:,}"),
        ("of them active per token", f"{config.active_parameters:,}"),
    ):
        table.add_row(name, str(value))
    return table


def _memory_table(config: Config) -> Table:
    length = min(config.context, 32_768)
    table = Table(
        "memory (GB)", "weights", "active per token", f"cache of one text of {length:,}",
        box=None, header_style="dim", pad_edge=False,
    )  # fmt: skip
    for name, size in (("float32", 4), ("bfloat16, float16", 2)):
        sizes = (config.parameters * size, config.active_parameters * size, config.cache_bytes(length, size))
        table.add_row(name, *(f"{bytes_ / 1e9:,.3f}" for bytes_ in sizes))
    return table


def _print_what_fits(
    config: Config, device: str | None, memory: float | None, bandwidth: float | None, link: float | None, length: int
) -> None:
    from mixtral_lab.machine import describe, what_fits

    with err.status("measuring"):
        machine = describe(device, *(None if given is None else given * 1e9 for given in (memory, bandwidth, link)))
    table = Table(
        "weights in", "experts in", "weights, GB", "cache, GB", "experts kept in memory", "read for a token, GB",
        "tokens/s at most", box=None, header_style="dim", pad_edge=False,
    )  # fmt: skip
    for row in what_fits(config, machine, length).to_dict("records"):
        kept = (
            "all" if row["resident"] == row["n_experts"] else f"{row['resident']} of {row['n_experts']} in each layer"
        )
        rate = f"{row['rate']:,.1f}" if row["rate"] < 100 else f"{row['rate']:,.0f}"
        table.add_row(
            row["dtype"], row["experts"], f"{row['weights'] / 1e9:,.2f}", f"{row['cache'] / 1e9:,.2f}",
            kept if row["resident"] else "-", f"{row['read'] / 1e9:,.2f}", rate if row["resident"] else "does not fit",
            style=None if row["resident"] else "dim",
        )  # fmt: skip
    behind = (
        "nothing behind it" if machine.link is None else f"{machine.link / 1e9:,.1f} GB/s for experts that do not fit"
    )
    out.print(
        f"What fits {machine.memory / 1e9:,.1f} GB of memory (a tenth left free) read at {machine.bandwidth / 1e9:,.1f} GB/s, "
        f"{behind}; one text of {length:,} tokens. A ceiling by bytes alone, missed experts as often as by chance.",
        style="dim",
    )
    out.print(table)


@command
def chat(
    model: Model = "mini-mixtral",
    system: Annotated[str | None, typer.Option(help="A message that sets the tone before the first question.")] = None,
    new: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model. An empty line or Ctrl-D ends it."""
    import mixtral_lab

    with err.status("loading"):
        lab = mixtral_lab.load(model, device=device, dtype=dtype)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            question = out.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not question:
            break
        messages.append({"role": "user", "content": question})
        answer = ""
        try:
            for piece in lab.stream(messages, max_new_tokens=new, temperature=temperature):
                out.print(Text(piece if answer else piece.lstrip()), end="")
                answer += piece
        except KeyboardInterrupt:
            pass  # what was said stays said
        out.print()
        messages.append({"role": "assistant", "content": answer.strip()})


@command
def study(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a GGUF file, or mini-mixtral.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the report, its figures and tables.")],
    texts: Annotated[
        Path | None, typer.Option(help="A folder with a sub-folder, .txt or .jsonl file for each domain.")
    ] = None,
    domains: Annotated[bool, typer.Option("--domains", help="Read the excerpts in the box instead.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Let MODEL read a corpus and write the whole routing study: one offline page, figures, tidy tables."""
    import mixtral_lab
    from mixtral_lab.study import Corpus, bundled_texts, check_folder, read_texts
    from mixtral_lab.study import study as make_study

    if (texts is None) != domains:
        raise LabError("Give either --texts DIR, for texts of your own, or --domains, for the excerpts in the box.")
    check_folder(folder)  # before a large model is loaded
    corpus: Corpus = bundled_texts() if texts is None else read_texts(texts)
    with err.status("loading"):
        lab = mixtral_lab.load(model, device=device, dtype=dtype)
    found = make_study(lab, corpus, folder, "the bundled excerpts" if texts is None else str(texts))
    for note in [*found.lacking, *found.notes]:
        out.print(Text(note, style="dim"))
    out.print(Text(f"Report: {found.report}"))


@command
def bench(
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="One or several of float32, bfloat16, float16.")] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="How often each contender runs; medians are reported.")] = 5,
    small: Annotated[bool, typer.Option(help="Only mini-mixtral, not the 0.75 B shape.")] = False,
    only: Annotated[
        str, typer.Option(help="One or several of these parts.")
    ] = "prefill,decode,long,recording,load,profile",
    json: Annotated[Path | None, typer.Option(help="Also write every raw value here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw time and memory by length of the text (.html or .png; part: long).")
    ] = None,
) -> None:
    """Time this package beside transformers: prefill, decode, long texts, recording, loading, and where the time goes."""
    from mixtral_lab import bench as benchmark

    parts, dtypes = only.split(","), dtype.split(",")
    if plot is not None and (plot.suffix not in (".html", ".png") or "long" not in parts):
        raise LabError(
            f"--plot {plot} needs a name that ends in .html or .png, and the part long; the parts are {only}."
        )
    shapes = benchmark.usual_shapes()[: 1 if small else None]
    report = benchmark.run(shapes, dtypes=dtypes, device=device, repeats=repeats, only=parts)
    if json is not None:
        json.write_text(report.to_json() + "\n", "utf-8")
    out.print(benchmark.table(report))
    if plot is not None:
        from mixtral_lab import figures

        figure = figures.cost_by_length(report.lengths(dtypes[0]), benchmark.windowed().name, dtypes[0])
        if plot.suffix == ".html":
            figure.write_html(plot, include_plotlyjs=True)
        else:
            figure.write_image(plot, scale=2)


if __name__ == "__main__":
    app()
