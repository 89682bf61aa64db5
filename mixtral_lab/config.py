"""The shape of a model: one frozen record, and the published shapes by name."""

from __future__ import annotations

from dataclasses import dataclass, replace


class LabError(Exception):
    """Base of every error this package raises on purpose; its message is one sentence for the reader."""


class ConfigError(LabError, ValueError):
    """The numbers of a configuration contradict each other."""


@dataclass(frozen=True)
class Config:
    """Every number that decides the shape of a Mistral or Mixtral model.

    One config describes both families: a dense Mistral has `n_experts=None`, a Mixtral has experts and the
    number of them that each token is sent to. Raises `ConfigError` when the numbers contradict each other.

    Source: Mistral 7B (arXiv 2310.06825, Table 1), Mixtral of Experts (arXiv 2401.04088, Table 1).
    """

    dim: int  # width of the residual stream
    n_layers: int
    n_heads: int  # query heads = kv heads x group
    n_kv_heads: int
    head_dim: int  # not always dim / n_heads: Mistral Nemo has 5120 / 32 = 160, but heads of 128
    hidden: int  # width inside one expert (or inside the single feed-forward of a dense model)
    vocab: int
    context: int  # the longest text the model is meant for, in tokens
    n_experts: int | None = None  # None: dense
    n_choices: int | None = None  # experts that read each token
    window: int | None = None  # keys a query may see, itself included; None: all
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False  # the output matrix is the embedding matrix

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden", "vocab", "context"):
            if not _is_count(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but it must be a whole number above 0.")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly: "
                "n_heads must be a multiple of n_kv_heads."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, but rotary positions turn pairs: it must be even.")
        if (self.n_experts is None) != (self.n_choices is None):
            raise ConfigError(
                f"n_experts is {self.n_experts} and n_choices is {self.n_choices}: "
                "give both for a mixture of experts, neither for a dense model."
            )
        if self.n_experts is not None and self.n_choices is not None:
            if not (_is_count(self.n_experts) and _is_count(self.n_choices)):
                raise ConfigError(f"n_experts={self.n_experts!r}, n_choices={self.n_choices!r}: both must be above 0.")
            if self.n_choices > self.n_experts:
                raise ConfigError(f"A token cannot choose {self.n_choices} of {self.n_experts} experts.")
        if self.window is not None and not _is_count(self.window):
            raise ConfigError(f"window is {self.window!r}: it must be at least 1, or None for no window.")
        if not self.rope_theta > 0 or not self.norm_eps > 0:
            raise ConfigError(f"rope_theta={self.rope_theta} and norm_eps={self.norm_eps} must both be above 0.")

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def parameters(self) -> int:
        """Numbers stored in the checkpoint."""
        return self._outside_the_feed_forwards + self.n_layers * (self.n_experts or 1) * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Numbers that one token is multiplied with (or, for its embedding row, looked up in).

        This is the paper's "active parameter count": everything but the experts that were not chosen.
        Mixtral 8x7B: 12.9 of 46.7 billion (arXiv 2401.04088, section 3).
        """
        return self._outside_the_feed_forwards + self.n_layers * (self.n_choices or 1) * self.expert_parameters

    @property
    def expert_parameters(self) -> int:
        """Numbers of one expert of one layer (of a dense model: of a layer's whole feed-forward)."""
        return 3 * self.dim * self.hidden

    @property
    def _outside_the_feed_forwards(self) -> int:
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        router = self.dim * (self.n_experts or 0)
        norms = 2 * self.dim
        embeddings = self.vocab * self.dim * (1 if self.tied else 2)
        return self.n_layers * (attention + router + norms) + self.dim + embeddings

    def cache_bytes(self, seq: int, bytes_per_number: int = 2) -> int:
        """Bytes of keys and values kept for one text of `seq` tokens: the window bounds it."""
        kept = min(seq, self.window or seq)
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * kept * bytes_per_number


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class Preset:
    """A published shape, and where it was published."""

    config: Config
    title: str
    source: str


_7b = Config(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden=14336, vocab=32000, context=32768, window=4096
)  # fmt: skip
_8x7b = replace(_7b, n_experts=8, n_choices=2, window=None, rope_theta=1e6)
_22b = replace(
    _7b, dim=6144, n_layers=56, n_heads=48, hidden=16384, vocab=32768, window=None, rope_theta=1e6
)  # fmt: skip
_mini = Config(
    dim=256, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=32, hidden=384, vocab=4096, context=2048,
    n_experts=8, n_choices=2, tied=True,
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    "mini-mixtral": Preset(_mini, "Mini Mixtral", "this package: data/README.md"),
    "mini-mistral": Preset(
        replace(_mini, n_experts=None, n_choices=None, hidden=768, window=128),
        "Mini Mistral",
        "this package: data/README.md; dense, and as wide as two of mini-mixtral's experts",
    ),
    "mistral-7b-v0.1": Preset(
        _7b, "Mistral 7B v0.1", "arXiv 2310.06825, Table 1; config.json of mistralai/Mistral-7B-v0.1"
    ),
    "mistral-7b-v0.2": Preset(
        replace(_7b, window=None, rope_theta=1e6),
        "Mistral 7B v0.2",
        "config.json of mistralai/Mistral-7B-Instruct-v0.2: no window, longer rotations",
    ),
    "mistral-7b-v0.3": Preset(
        replace(_7b, window=None, rope_theta=1e6, vocab=32768),
        "Mistral 7B v0.3",
        "config.json of mistralai/Mistral-7B-v0.3: v0.2 with 768 control tokens more",
    ),
    "mixtral-8x7b": Preset(
        _8x7b, "Mixtral 8x7B", "arXiv 2401.04088, Table 1; config.json of mistralai/Mixtral-8x7B-v0.1"
    ),
    "mixtral-8x22b": Preset(
        replace(_8x7b, dim=6144, n_layers=56, n_heads=48, hidden=16384, vocab=32768, context=65536),
        "Mixtral 8x22B",
        "config.json of mistralai/Mixtral-8x22B-Instruct-v0.1; the base model has 32,000 tokens",
    ),
    "mistral-nemo-12b": Preset(
        replace(_7b, dim=5120, n_layers=40, vocab=131072, context=131072, window=None, rope_theta=1e6),
        "Mistral Nemo 12B",
        "config.json of mistralai/Mistral-Nemo-Instruct-2407: heads of 128 in a stream of 5120",
    ),
    "mistral-small-22b": Preset(_22b, "Mistral Small 22B", "config.json of mistralai/Mistral-Small-Instruct-2409"),
    "codestral-22b": Preset(
        _22b, "Codestral 22B", "config.json of mistralai/Codestral-22B-v0.1: the shape that Mistral Small 22B took over"
    ),
    "mistral-small-24b": Preset(
        replace(_7b, dim=5120, n_layers=40, hidden=32768, vocab=131072, window=None, rope_theta=1e8),
        "Mistral Small 24B",
        "config.json of mistralai/Mistral-Small-24B-Base-2501: Nemo's heads, wider feed-forwards",
    ),
    "mistral-large-123b": Preset(
        replace(
            _7b, dim=12288, n_layers=88, n_heads=96, hidden=28672, vocab=32768, context=131072, window=None,
            rope_theta=1e6,
        ),
        "Mistral Large 123B",
        "config.json of mistralai/Mistral-Large-Instruct-2407 as corrected (it first said a context of 32768)",
    ),
}  # fmt: skip
