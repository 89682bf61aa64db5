"""What a training run goes on from: the trained numbers and the optimizer's moments, in one file that holds no code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

STATE = "state.safetensors"


def save_state(
    folder: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, meta: Mapping[str, str]
) -> None:
    """Write `STATE` into a folder; `meta` are the few numbers that a run counts, as text."""
    state = {f"model.{name}": p.detach() for name, p in trained.items()}
    for name, p in trained.items():
        for key, value in optimizer.state.get(p, {}).items():
            state[f"{key}.{name}"] = torch.as_tensor(value)
    partial = folder / f"{STATE}.partial"
    save_file({name: value.cpu().contiguous() for name, value in state.items()}, partial, metadata=dict(meta))
    partial.replace(folder / STATE)


def load_state(folder: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Put back what `save_state` wrote: the same numbers and moments; returns `meta`.

    Raises what safetensors and PyTorch raise for a file that is damaged or of another run.
    """
    with safe_open(folder / STATE, "pt") as file:
        names = set(file.keys())
        for name, p in trained.items():
            p.data.copy_(file.get_tensor(f"model.{name}"))
            if f"step.{name}" in names:  # what has had no gradient yet has no moments
                moments = {key: file.get_tensor(f"{key}.{name}").to(p.device) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": file.get_tensor(f"step.{name}"), **moments}
        return dict(file.metadata())
