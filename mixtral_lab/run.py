"""One model on several processes or machines: `torchrun --nproc-per-node N -m mixtral_lab.run COMMAND ...`.

`generate` and `trace` share the experts of every layer among the processes (`parallel.py`); for `study` each has the whole
model and reads its share of the texts. On GPUs each process takes one and talks through NCCL, else through gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from mixtral_lab.config import LabError
from mixtral_lab.lab import load
from mixtral_lab.parallel import collected
from mixtral_lab.terminal import in_one_sentence

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_show_locals=False)

Model = Annotated[str, typer.Argument(help="A checkpoint folder, a GGUF file, or mini-mixtral.")]
Words = Annotated[str, typer.Argument(help="The prompt.")]
New = Annotated[int, typer.Option(min=0, help="How many tokens the model writes on.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


@contextmanager
def together() -> Iterator[tuple[int, int, str]]:
    """This process's number, how many there are, and its device; connected while open."""
    if "RANK" not in os.environ:
        raise LabError("Start this with torchrun: torchrun --nproc-per-node 2 -m mixtral_lab.run ...")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()


@app.command()
@in_one_sentence
def generate(model: Model, text: Words, new: New = 40, dtype: Dtype = "auto") -> None:
    """Let a model whose experts are shared by all processes write on."""
    with together() as (rank, size, device):
        written = load(model, device, dtype, share=(rank, size)).generate(text, max_new_tokens=new)
        if rank == 0:
            print(text + written)


@app.command()
@in_one_sentence
def trace(
    model: Model,
    text: Words,
    save: Annotated[Path, typer.Option(help="Write the trace here (.safetensors).")],
    new: New = 40,
    sites: Annotated[list[str] | None, typer.Option(help="Sites to record; the routers if none is named.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Record what such a model does with a text."""
    with together() as (rank, size, device):
        found = load(model, device, dtype, share=(rank, size)).trace(text, max_new_tokens=new, sites=sites)
        if rank == 0:
            print(found.save(save))


@app.command()
@in_one_sentence
def study(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the report, its figures and tables.")],
    texts: Annotated[
        Path | None, typer.Option(help="A folder with a sub-folder, .txt or .jsonl file for each domain.")
    ] = None,
    domains: Annotated[bool, typer.Option("--domains", help="Read the excerpts in the box instead.")] = False,
    dtype: Dtype = "auto",
) -> None:
    """Make the routing study of a corpus, each process reading its share of the texts with a whole model of its own."""
    from mixtral_lab.study import Counts, check_folder, count, given_texts, write

    with together() as (rank, size, device):
        corpus, source = given_texts(texts, domains)
        check_folder(folder)  # before a large model is loaded
        lab = load(model, device, dtype)
        counts = count(lab, corpus, (rank, size))
        for other in collected(counts.to_bytes() if rank else b""):
            counts.merge(Counts.from_bytes(other))
        if rank == 0:
            found = write(lab, counts, folder, source)
            for line in (*found.lacking, *found.notes, f"Report: {found.report}"):
                print(line)


if __name__ == "__main__":
    app()
