"""What a model did with a text, token by token: keep it in one file, read it as arrays or as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtral_lab.config import LabError
from mixtral_lab.engines import Recorded, read_jsonl, read_sglang, read_vllm
from mixtral_lab.model import Routing
from mixtral_lab.model.attention import attention_pattern, attention_scores, visible
from mixtral_lab.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "mixtral_lab.trace.2"


class TraceError(LabError):
    """A trace lacks what was asked of it, or a file is not a trace."""


@dataclass(frozen=True)
class Trace:
    """One text and what was recorded while a model read or wrote it.

    `ids` are `seq` token ids and `tokens` their readable pieces; the first `n_prompt` were given, the others were
    written by the model. `model` and `dtype` say what made it: near ties fall differently in another dtype.
    `recorded` holds a tensor for each recorded site (`lab.sites` has their shapes, here without `batch`), at
    `positions` only, if these are given. Read it as `trace["layers.3.residual.after"]`, or stacked over all layers as
    `trace["layers.*.residual.after"]`, `layer seq dim`.
    """

    ids: Int[Tensor, " seq"]
    tokens: tuple[str, ...]
    n_prompt: int
    model: str
    dtype: str
    n_layers: int
    n_experts: int | None = None
    window: int | None = None
    recorded: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Int[Tensor, " position"] | None = None

    @classmethod
    def from_arrays(
        cls,
        tokens: Sequence[str],
        experts: Tensor,
        weights: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        ids: Sequence[int] | None = None,
        n_prompt: int | None = None,
        n_experts: int | None = None,
        model: str = "another engine",
        dtype: str = "unknown dtype",
    ) -> Trace:
        """A trace of routing that was recorded elsewhere: `experts` and `weights` are `layer seq choice`, `logits` are
        `layer seq expert`.

        Without logits, `n_experts` is one more than the highest expert chosen unless it is given; without `ids`, all
        are -1; without `n_prompt`, the whole text counts as given. Raises `TraceError` if the arrays contradict each
        other.
        """
        experts = torch.as_tensor(experts)
        if experts.ndim != 3 or experts.is_floating_point() or experts.dtype == torch.bool or not experts.numel():
            raise TraceError(
                f"experts must be whole numbers of shape (layer, seq, choice), but these are {experts.dtype} of shape "
                f"{tuple(experts.shape)}."
            )
        experts = experts.long()
        layers, seq, choices = experts.shape
        if weights is not None:
            weights = torch.as_tensor(weights)
        if logits is not None:
            logits = torch.as_tensor(logits)
            n_experts = n_experts or logits.shape[-1]
        n_experts = n_experts or max(int(experts.max()) + 1, choices)
        low, high = int(experts.min()), int(experts.max())
        if low < 0 or high >= n_experts:
            raise TraceError(
                f"Expert {low if low < 0 else high} is out of range: with {n_experts} experts, they are 0 to {n_experts - 1}."
            )
        for what, given, found, expected in (
            ("tokens", tokens, (len(tokens),), (seq,)),
            ("ids", ids, (len(ids or ()),), (seq,)),
            ("weights", weights, tuple(getattr(weights, "shape", ())), (layers, seq, choices)),
            ("logits", logits, tuple(getattr(logits, "shape", ())), (layers, seq, n_experts)),
        ):
            if given is not None and found != expected:
                raise TraceError(f"{what} have shape {found}, but experts {tuple(experts.shape)} need {expected}.")
        if n_prompt is not None and not 0 <= n_prompt <= seq:
            raise TraceError(f"n_prompt is {n_prompt}, but there are {seq} tokens: it must be 0 to {seq}.")
        recorded = {f"layers.{layer}.router.experts": experts[layer] for layer in range(layers)}
        for name, values in (("weights", weights), ("logits", logits)):
            if values is not None:
                recorded |= {f"layers.{n}.router.{name}": torch.as_tensor(values)[n] for n in range(layers)}
        return cls(
            ids=torch.tensor(list(ids) if ids is not None else [-1] * seq),
            tokens=tuple(tokens),
            n_prompt=seq if n_prompt is None else n_prompt,
            model=model,
            dtype=dtype,
            n_layers=layers,
            n_experts=n_experts,
            recorded=recorded,
        )

    @classmethod
    def from_vllm(
        cls,
        response: object,
        choice: int = 0,
        *,
        prompt_start: int = 0,
        ids: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
        n_experts: int | None = None,
    ) -> Trace:
        """The routing that a vLLM server (`--enable-return-routed-experts`) returned for one choice of a response.

        `response` is the answer's JSON as a dict, or the openai client's object, from either form of vLLM: base64 (0.22
        and later) or nested lists (around 0.21). `prompt_start` is what the request gave as
        `routed_experts_prompt_start`: the trace begins there. Ids are those of the response (requests with
        `return_token_ids`) or `ids`, prompt and answer together; the last token has no routing, as it was never fed
        back, and is left out. `tokens` are the `tokenizer`'s pieces, else the ids as "#1234", and without ids the
        positions as "@5". Only the chosen experts are known: whatever needs logits or weights says that they are
        missing. `n_experts` is one more than the highest chosen unless given. Raises `EngineError` for a malformed
        response, `TraceError` for an expert out of range.
        """
        return cls._imported(read_vllm(response, choice, prompt_start, ids), tokenizer, n_experts)

    @classmethod
    def from_sglang(
        cls,
        meta_info: object,
        n_layers: int,
        k: int,
        *,
        ids: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
        n_experts: int | None = None,
    ) -> Trace:
        """The routing in the `meta_info` of an SGLang answer to a request with `return_routed_experts`.

        The bytes have no header: `n_layers` layers have experts, of which a token takes `k`. `meta_info` has no ids, so
        `ids` are those of prompt and answer. Tokens, `n_experts`, the last token, and what is known and raised:
        as in `from_vllm`.
        """
        return cls._imported(read_sglang(meta_info, n_layers, k, ids), tokenizer, n_experts)

    @classmethod
    def from_jsonl(
        cls,
        path: str | Path,
        *,
        ids: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
        n_experts: int | None = None,
    ) -> Trace:
        """The routing of one text from JSON lines with `layer`, `token_idx`, `experts` and perhaps `gating_probs`.

        `gating_probs` of the chosen experts give weights, of all experts also logits: `engines.read_jsonl` says how.
        Ids, tokens, `n_experts` and what is raised: as in `from_vllm`.
        """
        path = Path(path)
        if not path.is_file():
            raise TraceError(f"There is no file {path}.")
        try:
            with path.open(encoding="utf-8") as lines:
                recorded = read_jsonl(lines, ids)
        except UnicodeDecodeError as error:
            raise TraceError(f"{path} is not text in UTF-8: {error}.") from None
        return cls._imported(recorded, tokenizer, n_experts)

    @classmethod
    def _imported(cls, found: Recorded, tokenizer: Tokenizer | None, n_experts: int | None) -> Trace:
        if found.ids is None:
            tokens = [f"@{position}" for position in range(found.experts.shape[1])]
        elif tokenizer is None:
            tokens = [f"#{token}" for token in found.ids]
        else:
            tokens = tokenizer.pieces(found.ids)
        return cls.from_arrays(
            tokens,
            torch.from_numpy(found.experts),
            None if found.weights is None else torch.from_numpy(found.weights),
            None if found.logits is None else torch.from_numpy(found.logits),
            ids=found.ids,
            n_prompt=found.n_prompt,
            n_experts=n_experts,
            model=found.model,
        )

    def __getitem__(self, site: str) -> Tensor:
        """What was recorded at a site, or at `layers.*.` something, stacked over `layer`.

        Scores and patterns are computed from queries and keys if they were not recorded as such, and so are experts'
        contributions from their answers and weights. Raises `TraceError` if something is missing, and says how to
        record it.
        """
        if not site.startswith("layers.*."):
            return self._value(site, asked=site)
        names = [site.replace("*", str(layer), 1) for layer in range(self.n_layers)]
        return torch.stack([self._value(name, asked=site) for name in names])

    def _value(self, site: str, asked: str) -> Tensor:
        if site in self.recorded:
            return self.recorded[site]
        stem, _, last = site.rpartition(".")
        if last in ("scores", "pattern") and {f"{stem}.heads.query", f"{stem}.heads.key"} <= self.recorded.keys():
            return self._attention(stem, last)
        answers, weights = f"{stem}.out", f"{stem.removesuffix('experts')}router.weights"
        if site.endswith(".experts.weighted") and {answers, weights} <= self.recorded.keys():
            return self.recorded[answers] * self.recorded[weights][..., None].to(self.recorded[answers].dtype)
        raise TraceError(self._missing(site, asked))

    def get(self, site: str) -> Tensor | None:
        """The same, or None if it is missing."""
        try:
            return self[site]
        except TraceError:
            return None

    def _missing(self, site: str, asked: str) -> str:
        if ".router." in site and self.n_experts is None:
            return (
                f"This trace has no router decisions: {self.model} is a dense model, every token takes the same way. "
                'Trace a mixture of experts, such as mixtral_lab.load("mini-mixtral").'
            )
        found = ", ".join(sorted({_without_layer(name) for name in self.recorded})) or "nothing"
        where = "" if site == asked else f" in layer {site.split('.')[1]}"
        return f"This trace has no {asked!r}{where}: recorded are {found}. Record it with lab.trace(text, sites=[{asked!r}])."

    def _attention(self, stem: str, what: str) -> Tensor:
        """Scores (-inf where a key is out of sight) or the pattern: `kv group query key`, from queries and keys."""
        query, key = self.recorded[f"{stem}.heads.query"], self.recorded[f"{stem}.heads.key"]
        if key.shape[1] != len(self):
            raise TraceError(
                f"{stem}.{what} needs the keys of all {len(self)} tokens, but only {key.shape[1]} positions were recorded: "
                "name it among the sites to record."
            )
        at = torch.arange(len(self))[None]
        mask = visible(at if self.positions is None else self.positions[None], at, self.window)
        scores = attention_scores(query[None].float(), key[None].float())
        if what == "pattern":
            return attention_pattern(scores, mask)[0].to(query.dtype)
        return scores.masked_fill(~mask[:, None, None], float("-inf"))[0].to(query.dtype)

    @cached_property
    def routing(self) -> Routing:
        """Every router's decisions: `logits` `layer seq expert`, `experts` and `weights` `layer seq choice`.

        Raises `TraceError` if the model has no routers, or if another engine recorded less than this.
        """
        return Routing(self["layers.*.router.logits"], self["layers.*.router.experts"], self["layers.*.router.weights"])

    @cached_property
    def experts(self) -> Int[Tensor, "layer seq choice"]:
        """The chosen experts alone, best first. Raises `TraceError` if they are not known."""
        return self["layers.*.router.experts"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        has = "; ".join(sorted({_without_layer(name) for name in self.recorded})) or "nothing recorded"
        written = len(self) - self.n_prompt
        return f"Trace({len(self)} tokens, {written} of them written by {self.model} in {self.dtype}; {has})"

    def frame(self, text: int = 0) -> pd.DataFrame:
        """A tidy table, one row per (text, position, layer, choice); `text` numbers this trace among others.

        Columns: text, position, id, token, written (by the model), layer, choice (0 is the first), expert, weight,
        logit (of that expert). Weights and logits that nobody recorded are NaN.
        """
        import pandas as pd

        experts = self.experts
        layers, seq, choices = experts.shape
        layer, position, choice = torch.meshgrid(
            torch.arange(layers), torch.arange(seq), torch.arange(choices), indexing="ij"
        )
        nothing = torch.full(experts.shape, float("nan"))
        weights = self.get("layers.*.router.weights")
        logits = self.get("layers.*.router.logits")
        rows = position.flatten()
        at = (rows if self.positions is None else self.positions[rows]).numpy()
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
                "weight": (nothing if weights is None else weights.float()).flatten().numpy(),
                "logit": (nothing if logits is None else logits.float().gather(-1, experts)).flatten().numpy(),
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
        if not path.parent.is_dir():
            raise TraceError(f"There is no folder {path.parent} to write {path.name} into: make it first.")
        tensors, places = {"ids": self.ids.to(torch.int32)}, set[int]()
        if self.positions is not None:
            tensors["positions"] = self.positions.to(torch.int32)
        for name, value in self.recorded.items():
            small = name.endswith("router.experts") and (self.n_experts or 0) <= 256
            kept = (value.to(torch.uint8) if small else value).contiguous()
            # One value may stand at two sites (a layer's end is the next one's beginning); a file has room for each.
            tensors[name] = kept.clone() if kept.untyped_storage().data_ptr() in places else kept
            places.add(tensors[name].untyped_storage().data_ptr())
        about = {
            "n_prompt": self.n_prompt, "model": self.model, "dtype": self.dtype, "n_layers": self.n_layers,
            "n_experts": self.n_experts, "window": self.window,
        }  # fmt: skip
        header = {"format": FORMAT, "tokens": json.dumps(self.tokens, ensure_ascii=False), "about": json.dumps(about)}
        partial = path.with_name(f"{path.name}.{token_hex(4)}.partial")  # nobody else's
        try:
            save_file(tensors, partial, metadata=header)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote. Raises `TraceError` for any other file."""
        path = Path(path)
        header = _read_header(path)
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        try:
            ids, positions = stored.pop("ids").long(), stored.pop("positions", None)
            return cls(
                ids=ids,
                tokens=tuple(json.loads(header["tokens"])),
                **json.loads(header["about"]),
                recorded={name: v.long() if name.endswith("router.experts") else v for name, v in stored.items()},
                positions=None if positions is None else positions.long(),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(
                f"{path} says that it is a trace, but is not whole ({type(error).__name__}: {error})."
            ) from None


def _without_layer(site: str) -> str:
    """`layers.3.router.logits` as `router.logits`."""
    return site.split(".", 2)[2] if site.startswith("layers.") else site


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
