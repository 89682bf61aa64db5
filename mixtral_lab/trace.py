"""What a model did with a text, token by token: record it, keep it in one file, read it as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtral_lab.config import LabError
from mixtral_lab.model import Routing, Transformer

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "mixtral_lab.trace.1"


class TraceError(LabError):
    """A trace lacks what was asked of it, or a file is not a trace."""


@dataclass(frozen=True)
class Trace:
    """One text and what was recorded while a model read or wrote it.

    `ids` are `seq` token ids and `tokens` their readable pieces; the first `n_prompt` were given, the others were
    written by the model. `model` and `dtype` say what made it: near ties fall differently in another dtype.
    """

    ids: Int[Tensor, " seq"]
    tokens: tuple[str, ...]
    n_prompt: int
    model: str
    dtype: str
    recorded: Routing | None = None

    @property
    def routing(self) -> Routing:
        """Every router's decisions: `logits` `layer seq expert`, `experts` and `weights` `layer seq choice`.

        Raises `TraceError` if the model has no routers.
        """
        if self.recorded is None:
            raise TraceError(
                f"This trace has no router decisions: {self.model} is a dense model, every token takes the same way. "
                'Trace a mixture of experts, such as mixtral_lab.load("mini-mixtral").'
            )
        return self.recorded

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        routing = "no routing"
        if self.recorded is not None:
            layers, _, experts = self.recorded.logits.shape
            routing = f"{layers} layers of {experts} experts, {self.recorded.experts.shape[-1]} per token"
        written = len(self) - self.n_prompt
        return f"Trace({len(self)} tokens, {written} of them written by {self.model} in {self.dtype}; {routing})"

    def frame(self, text: int = 0) -> pd.DataFrame:
        """A tidy table, one row per (text, position, layer, choice); `text` numbers this trace among others.

        Columns: text, position, id, token, written (by the model), layer, choice (0 is the first), expert, weight,
        logit (of that expert).
        """
        import pandas as pd

        logits, experts, weights = self.routing
        layers, seq, choices = experts.shape
        layer, position, choice = torch.meshgrid(
            torch.arange(layers), torch.arange(seq), torch.arange(choices), indexing="ij"
        )
        at = position.flatten().numpy()
        return pd.DataFrame(
            {
                "text": text,
                "position": at,
                "id": self.ids.numpy()[at],
                "token": pd.array(self.tokens, dtype="string")[at],
                "written": at >= self.n_prompt,
                "layer": layer.flatten().numpy(),
                "choice": choice.flatten().numpy(),
                "expert": experts.flatten().numpy(),
                "weight": weights.float().flatten().numpy(),
                "logit": logits.float().gather(-1, experts).flatten().numpy(),
            }
        )

    def save(self, path: str | Path) -> Path:
        """Write the trace to one `.safetensors` file, replacing a trace but never another kind of file."""
        path = Path(path)
        if path.exists():
            try:
                _read_header(path)
            except TraceError:
                raise TraceError(f"{path} exists and is not a trace; it was left alone. Choose another name.") from None
        tensors = {"ids": self.ids.to(torch.int32)}
        if self.recorded is not None:
            small = torch.uint8 if self.recorded.logits.shape[-1] <= 256 else torch.int32
            tensors["routing.logits"] = self.recorded.logits.contiguous()
            tensors["routing.experts"] = self.recorded.experts.to(small).contiguous()
            tensors["routing.weights"] = self.recorded.weights.contiguous()
        header = {
            "format": FORMAT,
            "tokens": json.dumps(self.tokens, ensure_ascii=False),
            "n_prompt": str(self.n_prompt),
            "model": self.model,
            "dtype": self.dtype,
        }
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata=header)
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote. Raises `TraceError` for any other file."""
        path = Path(path)
        header = _read_header(path)
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        recorded = None
        if "routing.logits" in stored:
            recorded = Routing(stored["routing.logits"], stored["routing.experts"].long(), stored["routing.weights"])
        return cls(
            ids=stored["ids"].long(),
            tokens=tuple(json.loads(header["tokens"])),
            n_prompt=int(header["n_prompt"]),
            model=header["model"],
            dtype=header["dtype"],
            recorded=recorded,
        )


def frame(traces: list[Trace]) -> pd.DataFrame:
    """The tables of several traces, one below the other; the column `text` tells them apart."""
    import pandas as pd

    return pd.concat([trace.frame(text) for text, trace in enumerate(traces)], ignore_index=True)


def _read_header(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise TraceError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TraceError(f"{path} is not a trace: {error}.") from None
    if header.get("format") != FORMAT:
        raise TraceError(f"{path} is not a trace written by this package (format {header.get('format')!r}).")
    return dict(header)


class Recorder:
    """What `recording` collects: for every layer, the routing of each call, in order."""

    def __init__(self, n_layers: int) -> None:
        self._calls: list[list[Routing]] = [[] for _ in range(n_layers)]

    def keep(self, layer: int, routing: Routing) -> None:
        """Note one call's routing `batch seq ...`; it stays on its device until it is asked for."""
        self._calls[layer].append(Routing(*(part.detach() for part in routing)))

    def routing(self, row: int = 0) -> Routing | None:
        """All calls end to end, for one row of the batch, on the CPU: `layer seq ...`. None for a dense model."""
        if not all(self._calls):
            return None
        layers = [[torch.cat([call[part][row] for call in calls]) for calls in self._calls] for part in range(3)]
        return Routing(*(torch.stack(part).cpu() for part in layers))


@contextmanager
def recording(model: Transformer) -> Iterator[Recorder]:
    """While open, note what every router decides, by PyTorch's own forward hooks."""
    recorder = Recorder(model.config.n_layers)
    hooks = []
    for layer, block in enumerate(model.blocks):
        if block.router is not None:
            hooks.append(
                block.router.register_forward_hook(lambda _m, _in, out, layer=layer: recorder.keep(layer, out))
            )
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
