"""The `mixtral-lab` command: the same calls as in Python, for a terminal. Thin on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixtral_lab.config import PRESETS, Config, LabError
from mixtral_lab.terminal import err, in_one_sentence

app = typer.Typer(
    help="Open a mixture-of-experts language model, watch every decision it makes, and change one.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
out = Console(highlight=False, soft_wrap=False)

MODELS = "A checkpoint folder, a GGUF file, a run of finetune, or mini-mixtral, mini-mistral or smolmixtral."
Model = Annotated[str, typer.Option(help=MODELS)]
ModelFirst = Annotated[str, typer.Argument(help=MODELS)]
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
    from mixtral_lab.figures.terminal import expert_table

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
    out.print(expert_table(found, width=out.width))
    out.print(
        f"{found.model} in {found.dtype}: a cell names the experts that took the token in that layer, the first with "
        f"its weight in %. {routing.logits.shape[-1]} experts, coloured by the first.",
        style="dim",
    )
    for what, path in written.items():
        out.print(f"{what}: {path}")


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
    from mixtral_lab.lora import base_of, is_adapter, load_adapter
    from mixtral_lab.upcycled import is_upcycled, read_shape
    from mixtral_lab.weights import describe, read_config

    given = Path(model).expanduser()
    adapter = given if is_adapter(given) else None
    if adapter is not None:
        model = base_of(adapter)
    path: Path | None = Path(model).expanduser()
    if path is not None and not path.exists():
        folder = bundled.UPCYCLED.get(model, model if model in bundled.MODELS else "")
        path = bundled.folder(folder) if folder and bundled.has(folder) else None
    if path is None and model not in PRESETS:
        raise LabError(f"There is no file or folder {model}. Published shapes are {', '.join(PRESETS)}.")
    upcycled = path is not None and is_upcycled(path)
    read = read_shape if upcycled else read_config
    config = PRESETS[model].config if path is None else read(path)

    out.print(Text(model if path is None else str(path), style="bold"))
    if adapter is not None:
        low_rank = load_adapter(adapter, config)
        out.print(
            f"Changed by the adapter in {adapter}: rank {low_rank.rank}, {low_rank.numbers:,} numbers, "
            f"on {' and '.join(low_rank.parts)}.", style="dim", markup=False,
        )  # fmt: skip
    if model in PRESETS:
        out.print(f"{PRESETS[model].title}. Source: {PRESETS[model].source}.", style="dim")
    out.print(_config_table(config))
    out.print(_memory_table(config))
    if device is not None or memory is not None or bandwidth is not None:
        _print_what_fits(config, device, memory, bandwidth, link, length)
    if path is None:
        out.print("A shape without weights: there are no tensors to list.", style="dim")
    elif upcycled:
        out.print(
            "Made in memory from its installed parent: the folder holds routers and low-rank changes.", style="dim"
        )
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
    model: ModelFirst = "mini-mixtral",
    system: Annotated[str | None, typer.Option(help="A message that sets the tone before the first question.")] = None,
    new: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Above temperature 0: draw from the likeliest tokens that together have so much probability."
        ),
    ] = 1.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model: /help lists the commands, Ctrl-D ends. Questions can also be piped in, one a line."""
    import mixtral_lab
    from mixtral_lab.chat import ChatError, Conversation
    from mixtral_lab.generate import Sampling
    from mixtral_lab.repl import Repl

    sampling = Sampling(temperature, top_p)
    with err.status("loading"):
        lab = mixtral_lab.load(model, device=device, dtype=dtype)
    conversation = Conversation(lab, system)
    if conversation.cannot:
        raise ChatError(conversation.cannot)
    if not Repl(conversation, out, err, sampling, new).run():
        raise typer.Exit(1)


@app.command("app")
@in_one_sentence
def page(
    model: ModelFirst = "mini-mixtral",
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 8866,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in a browser.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a page on this machine: talk with MODEL and look into the routing of its answers. Ctrl-C ends it."""
    from mixtral_lab.app import serve

    serve(model, port, browser, device, dtype, err)


@command
def serve(
    model: ModelFirst = "mini-mixtral",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Anything but this machine itself needs a key.")] = "127.0.0.1",
    api_key: Annotated[
        str | None, typer.Option(envvar="MIXTRAL_LAB_API_KEY", help="Clients must send it as their bearer key.")
    ] = None,
    active: Annotated[int, typer.Option(min=1, help="Requests written at the same time, in turns.")] = 8,
    waiting: Annotated[int, typer.Option(min=1, help="Requests in line behind them.")] = 64,
    wait: Annotated[float, typer.Option(min=0.001, help="Seconds in line before a request is given up.")] = 30.0,
    max_prompt: Annotated[int, typer.Option(min=1, help="The longest prompt, in tokens.")] = 32_768,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="The longest answer that may be asked for, in tokens.")
    ] = 4_096,
    max_bytes: Annotated[int, typer.Option(min=1, help="The largest request.")] = 1_000_000,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve MODEL behind Mistral's chat-completions API on this machine, until Ctrl-C."""
    import mixtral_lab
    from mixtral_lab.serve import Limits
    from mixtral_lab.serve import serve as serve_model

    with err.status("loading"):
        lab = mixtral_lab.load(model, device=device, dtype=dtype)
    limits = Limits(active, waiting, wait, max_bytes, max_prompt, max_tokens)
    serve_model(
        lab, port, host, api_key, limits,
        when_ready=lambda address: print(f"{lab.name} answers at {address}/v1 (Ctrl-C ends it)", flush=True),
    )  # fmt: skip


@command
def finetune(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a GGUF file, or mini-mixtral or mini-mistral.")],
    data: Annotated[
        Path, typer.Option(help='Conversations: a line of JSON each, {"messages": [{"role", "content"}]}.')
    ],
    folder: Annotated[Path, typer.Option("--out", help="A new folder for the run: adapter, log, state.")],
    held_out: Annotated[Path | None, typer.Option(help="Conversations to measure with; else some of --data.")] = None,
    held_out_share: Annotated[float, typer.Option(help="Without --held-out: this share of --data.")] = 0.1,
    attention: Annotated[bool, typer.Option(help="Adapt queries, keys, values and outputs.")] = True,
    experts: Annotated[bool, typer.Option(help="Adapt every expert (of a dense model: its feed-forward).")] = True,
    router: Annotated[bool, typer.Option(help="Adapt the routers.")] = False,
    rank: Annotated[int, typer.Option(min=1, help="How many rows A has and columns B.")] = 8,
    alpha: Annotated[int, typer.Option(min=1, help="The change is scaled by alpha / rank.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="How often every conversation is read.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations read at once.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches before each step.")] = 1,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    length: Annotated[int | None, typer.Option(min=2, help="The longest conversation, in tokens.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Steps between measurements; else epochs.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Teach MODEL from conversations: train a low-rank adapter and keep the best. Ctrl-C saves; --resume goes on."""
    import mixtral_lab
    from mixtral_lab.lora import LoRA
    from mixtral_lab.train import finetune as tuning

    switches = {"attention": attention, "experts": experts, "router": router}
    settings = LoRA(rank, alpha, tuple(part for part, on in switches.items() if on))
    recipe = tuning.Recipe(epochs, batch_size, accumulate, lr, evaluate_every=evaluate_every, seed=seed)
    tuning.check_folder(folder, resume)  # before a large model is loaded
    with err.status("loading"):
        lab = mixtral_lab.load(model, device=device, dtype=dtype)
    longest = min(length or lab.config.context, lab.config.context)
    examples = tuning.read_conversations(data, lab.tokenizer, longest)
    if held_out is not None:
        measured = tuning.read_conversations(held_out, lab.tokenizer, longest)
    else:
        examples, measured = tuning.split(examples, held_out_share, seed)
    found = tuning.finetune(lab, examples, measured, folder, settings, recipe, resume=resume)
    out.print(
        f"Held-out loss: {found.loss_before:.3f} nats per token before, {found.best_loss:.3f} at best, after step "
        f"{found.best_step} of {found.steps}."
    )
    if not found.finished:
        out.print(f"Stopped after step {found.step} of {found.steps}: the same command with --resume goes on.")
    out.print(Text(f"Adapter: {folder}   (mixtral-lab chat {folder})"))


@command
def merge(
    adapter: Annotated[Path, typer.Argument(help="A folder that finetune, or peft, wrote.")],
    folder: Annotated[Path, typer.Option("--out", help="A folder for the merged model.")],
    model: Annotated[str | None, typer.Option(help="The model that it changes; else the one that it names.")] = None,
    dtype: Annotated[str, typer.Option(help="stored (as the model's files), float32, bfloat16, ...")] = "stored",
) -> None:
    """Merge ADAPTER into its model, and save that as an ordinary Hugging Face folder."""
    from mixtral_lab.train.finetune import save_merged

    with err.status("merging"):
        save_merged(adapter, folder, model, dtype)
    out.print(Text(f"Model: {folder}"))


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
    from mixtral_lab.study import check_folder, given_texts
    from mixtral_lab.study import study as make_study

    corpus, source = given_texts(texts, domains)
    check_folder(folder)  # before a large model is loaded
    with err.status("loading"):
        lab = mixtral_lab.load(model, device=device, dtype=dtype)
    found = make_study(lab, corpus, folder, source)
    for note in [*found.lacking, *found.notes]:
        out.print(Text(note, style="dim"))
    out.print(Text(f"Report: {found.report}"))


@command
def bench(
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="One or several of float32, bfloat16, float16.")] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="How often each contender runs; medians are reported.")] = 5,
    small: Annotated[bool, typer.Option(help="Only mini-mixtral, not the 0.75 B shape.")] = False,
    shape: Annotated[
        str | None, typer.Option(help="A published Mixtral's shape instead, with random weights: mixtral-8x7b, ...")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Only so many of its layers.")] = None,
    only: Annotated[
        str, typer.Option(help="One or several of these parts, or rounded: decoding with experts in int8 and int4.")
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
    if shape is None and layers is not None:
        raise LabError("--layers goes with --shape: name a published shape.")
    shapes = benchmark.usual_shapes()[: 1 if small else None] if shape is None else [benchmark.published(shape, layers)]
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
            try:
                figure.write_image(plot, scale=2)
            except Exception as error:  # a browser can fail in any way, and the measurement took half an hour
                page = plot.with_name(f"{plot.name}.html")
                figure.write_html(page, include_plotlyjs=True)
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise LabError(f"{plot} was not drawn, {page} was instead. Kaleido said: {said[0]}") from None


if __name__ == "__main__":
    app()
