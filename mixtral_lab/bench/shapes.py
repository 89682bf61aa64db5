"""What is compared: the shapes, and how much reading and multiplying each of them asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixtral_lab import bundled
from mixtral_lab.bench.report import BenchError
from mixtral_lab.config import PRESETS, Config, LabError
from mixtral_lab.model import Transformer
from mixtral_lab.weights import load_model, save_model

WINDOW, LONGEST = 1024, 32768  # of the shape that reads long texts, in tokens


@dataclass(frozen=True)
class Shape:
    """A config, with the weights of a checkpoint or (None) random ones."""

    name: str
    config: Config
    checkpoint: Path | None = None

    @property
    def weights(self) -> str:
        return "random weights" if self.checkpoint is None else f"weights of {self.checkpoint}"

    @property
    def read_per_token(self) -> int:
        """Numbers among the weights that one decode step must read: all active ones, but one row of the embedding."""
        config = self.config
        return config.active_parameters - (0 if config.tied else (config.vocab - 1) * config.dim)

    @property
    def read_of_experts(self) -> int:
        """Of these, the numbers of experts."""
        return self.config.n_layers * (self.config.n_choices or 1) * self.config.expert_parameters

    def operations(self, seq: int) -> int:
        """Multiplications and additions that reading a prompt and scoring its last token cannot do without.

        A weight costs two per token, a visible pair of positions four per number of a head (its score and its value).
        """
        config = self.config
        unembedding = config.vocab * config.dim
        in_the_layers = self.read_per_token - unembedding
        window = min(config.window or seq, seq)
        pairs = window * (window + 1) // 2 + (seq - window) * window
        attention = 4 * pairs * config.n_heads * config.head_dim * config.n_layers
        return 2 * (in_the_layers * seq + unembedding) + attention

    def write(self, dtype: torch.dtype, folder: Path) -> Path:
        """Write the checkpoint that both sides load."""
        if self.checkpoint is not None:
            return save_model(load_model(self.checkpoint, "cpu", dtype), folder)
        with torch.device("meta"):
            model = Transformer(self.config).requires_grad_(False).to(dtype)
        model.to_empty(device="cpu")  # in its own dtype from the start: large shapes fit once, not twice
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for parameter in model.parameters():
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
        return save_model(model, folder, max_shard_bytes=10**9)


RANDOM_075B = Shape(  # 749 million parameters, of which a decode step reads 258 million
    "random-0.75b",
    Config(
        dim=1024, n_layers=12, n_heads=16, n_kv_heads=4, head_dim=64, hidden=1792, vocab=92160, context=4096,
        n_experts=8, n_choices=2, rope_theta=1e6,
    ),
)  # fmt: skip


def published(name: str, layers: int | None = None) -> Shape:
    """A published Mixtral's shape with random weights, all its layers or the first `layers`. Raises `BenchError` for any other."""
    mixtures = [known for known, preset in PRESETS.items() if preset.config.n_experts]
    if name not in mixtures:
        raise BenchError(
            f"There is no mixture of experts {name!r} to take the shape of: there are {', '.join(mixtures)}."
        )
    whole = PRESETS[name].config
    n = whole.n_layers if layers is None else layers
    if not 1 <= n <= whole.n_layers:
        raise BenchError(f"{name} has {whole.n_layers} layers: {n} of them cannot be taken.")
    return Shape(name if n == whole.n_layers else f"{name}, {n} layers", replace(whole, n_layers=n))


def usual_shapes() -> list[Shape]:
    """mini-mixtral (its trained weights if they are in the box) and a random Mixtral of 0.75 billion parameters."""
    try:
        checkpoint = bundled.folder("mini-mixtral")
    except LabError:
        checkpoint = None
    return [Shape("mini-mixtral", PRESETS["mini-mixtral"].config, checkpoint), RANDOM_075B]


def windowed() -> Shape:
    """The shape of mini-mixtral with a window, for texts of any length."""
    config = replace(PRESETS["mini-mixtral"].config, window=WINDOW, context=LONGEST)
    return Shape(f"mini-mixtral with a window of {WINDOW:,}", config)
