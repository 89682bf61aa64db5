"""Which words stand in the residual stream, and who wrote them there.

The stream is read with the model's own last norm and unembedding. The last norm divides by the stream's size, so what
a part adds to a logit depends on all others; here that size is held fixed at what it was in the run, which makes the
map from the stream to the logits linear. Then the parts' contributions sum to the logit that the model computed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mixtral_lab.analysis.routing import AnalysisError
from mixtral_lab.config import Config
from mixtral_lab.model import Transformer
from mixtral_lab.model.linear import linear
from mixtral_lab.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

LENS_SITES = ("embed", "layers.*.residual.after")
TOP1_SITES = ("layers.*.residual.between", "layers.*.experts.weighted")


class Lens(NamedTuple):
    """What the stream would say if the model ended here. `depth` 0 is after the embedding, n after layer n - 1."""

    ids: Int[np.ndarray, "depth seq rank"]  # the likeliest next tokens
    probabilities: Float[np.ndarray, "depth seq rank"]  # of these
    following: Float[np.ndarray, "depth seq"]  # probability of the token that does come next; nan after the last
    entropy: Float[np.ndarray, "depth seq"]  # bits of all probabilities


@torch.inference_mode()
def logit_lens(model: Transformer, trace: Trace, top: int = 5) -> Lens:
    """Read the residual stream after every layer as if it were the last: norm, unembed, softmax.

    The trace needs `LENS_SITES`; at the last depth the answer is the model's own. One depth is read at a time, so
    memory is bounded by the positions times the vocabulary. Source: nostalgebraist, interpreting GPT: the logit lens
    (2020), at lesswrong.com. Raises `TraceError` for a missing site, `AnalysisError` for the trace of another model.
    """
    depths = [trace["embed"], *trace["layers.*.residual.after"]]
    _check_dim(model, depths[0])
    if not 1 <= top <= model.config.vocab:
        raise AnalysisError(f"top is {top}: it must be between 1 and the {model.config.vocab} tokens there are.")
    after = _next_tokens(trace)
    found: list[tuple[Tensor, ...]] = []
    for stream in depths:
        logits = linear(model.final_norm(_on(model, stream)[None])[0], _unembedding(model)).float()
        log_p = F.log_softmax(logits, dim=-1).cpu()
        best = log_p.topk(top, dim=-1)
        entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1) / np.log(2)
        following = log_p.gather(-1, after.clamp(min=0)[:, None])[:, 0].exp()
        found.append((best.indices, best.values.exp(), following.masked_fill(after < 0, torch.nan), entropy))
    return Lens(*(torch.stack(parts).numpy() for parts in zip(*found, strict=True)))


def attribution_sites(config: Config) -> tuple[str, ...]:
    """The sites that a trace needs for `attribution` and `residual_parts`, and for `expert_lens`."""
    written = ["layers.*.feed_forward"]
    if config.n_experts is not None:
        written = ["layers.*.router.experts", "layers.*.experts.weighted"]
    return "embed", "layers.*.attention.heads.out", *written, f"layers.{config.n_layers - 1}.residual.after"


class Attribution(NamedTuple):
    """What every part of the model added to the score of one token at each position of `trace.positions`.

    A token's score is its logit less the mean of all tokens' logits, or less that of the token in `against`: the
    softmax cares for differences only. `total` is the score that the model gave. Heads stand as `(kv group)`.
    """

    targets: Int[np.ndarray, " seq"]
    embed: Float[np.ndarray, " seq"]
    heads: Float[np.ndarray, "layer seq head"]
    experts: Float[np.ndarray, "layer seq choice"]  # of a dense model: its feed-forward, with one choice
    chosen: Int[np.ndarray, "layer seq choice"] | None  # who that was; None for a dense model
    rounding: Float[np.ndarray, " seq"]  # what the dtype lost on the way, or an edit put into the stream

    @property
    def total(self) -> Float[np.ndarray, " seq"]:
        return self.embed + self.heads.sum((0, 2)) + self.experts.sum((0, 2)) + self.rounding

    def frame(self, row: int = -1) -> pd.DataFrame:
        """One row per part at one position (a row of the trace), in the order of the model.

        Columns: part (embedding, head, expert, feed-forward, rounding), layer, head, expert, choice (missing where they
        do not apply), logit. The column `logit` sums to `total`.
        """
        import pandas as pd

        missing = pd.NA
        rows: list[tuple] = [("embedding", missing, missing, missing, missing, self.embed[row])]
        for layer in range(len(self.heads)):
            rows += [("head", layer, h, missing, missing, logit) for h, logit in enumerate(self.heads[layer, row])]
            for choice, logit in enumerate(self.experts[layer, row]):
                if self.chosen is None:
                    rows.append(("feed-forward", layer, missing, missing, missing, logit))
                else:
                    rows.append(("expert", layer, missing, self.chosen[layer, row, choice], choice, logit))
        rows.append(("rounding", missing, missing, missing, missing, self.rounding[row]))
        frame = pd.DataFrame(rows, columns=["part", "layer", "head", "expert", "choice", "logit"])
        return frame.astype(dict.fromkeys(("layer", "head", "expert", "choice"), "Int64") | {"logit": "float64"})


@torch.inference_mode()
def attribution(
    model: Transformer,
    trace: Trace,
    targets: int | Sequence[int] | None = None,
    against: int | Sequence[int] | None = None,
) -> Attribution:
    """Who said this word: what the embedding, every head and every chosen expert added to a token's score.

    With the size of the final stream held fixed (see the module's first words), a part's contribution is the dot product
    of what it wrote into the stream with one direction: the token's row of the unembedding less the mean row (or the row
    of the token in `against`), times the last norm's weights, over that size. `targets` is one token id for all
    positions, or one each; if not given, the token that comes next in the text, and after the last one the model's
    likeliest. What a layer removes from the stream counts against it, and what later layers would have made of a part
    does not count: this is the direct effect alone.

    The trace needs `attribution_sites(config)`. Source: direct logit attribution, A Mathematical Framework for
    Transformer Circuits (Elhage and others 2021, transformer-circuits.pub), with experts as parts. Raises `TraceError`
    for a missing site, `AnalysisError` for the trace of another model or ids out of the vocabulary.
    """
    stream, direction, wanted = _directions(model, trace, targets, against)
    embed = einsum(_on(model, trace["embed"]).float(), direction, "seq dim, seq dim -> seq")
    heads, experts = [], []
    for layer, block in enumerate(model.blocks):
        into_heads = direction @ block.attention.output.weight.float()
        out = rearrange(
            _on(model, trace[f"layers.{layer}.attention.heads.out"]).float(),
            "kv group seq head_dim -> seq (kv group) head_dim",
        )
        each = rearrange(into_heads, "seq (head head_dim) -> seq head head_dim", head=out.shape[1])
        heads.append(einsum(out, each, "seq head head_dim, seq head head_dim -> seq head"))
        written = _written(trace, layer, model.config)
        experts.append(einsum(_on(model, written).float(), direction, "seq choice dim, seq dim -> seq choice"))
    of_embed, of_heads, of_experts = (part.cpu().numpy() for part in (embed, torch.stack(heads), torch.stack(experts)))
    total = einsum(stream.float(), direction, "seq dim, seq dim -> seq").cpu().numpy()
    chosen = None if model.config.n_experts is None else trace.experts.cpu().numpy()
    rounding = total - of_embed - of_heads.sum((0, 2)) - of_experts.sum((0, 2))
    return Attribution(wanted.numpy(), of_embed, of_heads, of_experts, chosen, rounding)


def residual_parts(
    model: Transformer, trace: Trace, row: int = -1
) -> tuple[pd.DataFrame, Float[np.ndarray, "part dim"]]:
    """What every part wrote into the residual stream at one position (a row of the trace): they sum to the final stream.

    The table says which part each row of the array is, as `Attribution.frame` does (without logits or rounding). The
    sum differs from `layers.*.residual.after` of the last layer by rounding alone. Raises as `attribution` does.
    """
    import pandas as pd

    _check_dim(model, trace["embed"])
    parts = [trace["embed"][row].float()]
    labels: list[tuple] = [("embedding", pd.NA, pd.NA, pd.NA, pd.NA)]
    for layer, block in enumerate(model.blocks):
        out = rearrange(
            trace[f"layers.{layer}.attention.heads.out"][:, :, row].float(), "kv group head_dim -> (kv group) head_dim"
        )
        matrix = block.attention.output.weight.detach().float().cpu()
        for head, columns in enumerate(matrix.split(out.shape[-1], dim=1)):
            parts.append(columns @ out[head])
            labels.append(("head", layer, head, pd.NA, pd.NA))
        for choice, written in enumerate(_written(trace, layer, model.config)[row].float()):
            parts.append(written)
            if model.config.n_experts is None:
                labels.append(("feed-forward", layer, pd.NA, pd.NA, pd.NA))
            else:
                labels.append(("expert", layer, pd.NA, int(trace.experts[layer, row, choice]), choice))
    frame = pd.DataFrame(labels, columns=["part", "layer", "head", "expert", "choice"])
    numbers = frame.astype(dict.fromkeys(("layer", "head", "expert", "choice"), "Int64"))
    return numbers, torch.stack(parts).numpy()


class ExpertLens(NamedTuple):
    """The tokens that each chosen expert raises most by itself, and by how much, in logits above the mean token."""

    ids: Int[np.ndarray, "layer seq choice rank"]
    logits: Float[np.ndarray, "layer seq choice rank"]


@torch.inference_mode()
def expert_lens(model: Transformer, trace: Trace, top: int = 5) -> ExpertLens:
    """Read each chosen expert's weighted answer alone through the last norm and the unembedding.

    The size of the final stream is held fixed, so `logits` are on the scale of `attribution`; to norm the answer by its
    own size instead would order the tokens alike. The trace needs `layers.*.experts.weighted` and the last
    `residual.after` (`attribution_sites` holds both). Source: MoE Lens (arXiv 2603.05806: the logit lens on single
    experts). Raises `TraceError` for a missing site, `AnalysisError` for the trace of another model.
    """
    stream, scale = _final_stream(model, trace)
    weight = _unembedding(model)
    ids, logits = [], []
    for layer in range(model.config.n_layers):
        written = _on(model, trace[f"layers.{layer}.experts.weighted"]).float() * scale[:, None]
        scores = linear((written * model.final_norm.weight.float()).to(stream.dtype), weight).float()
        best = scores.topk(top, dim=-1)
        ids.append(best.indices.cpu())
        logits.append((best.values - scores.mean(-1, keepdim=True)).cpu())
    return ExpertLens(torch.stack(ids).numpy(), torch.stack(logits).numpy())


class Top1(NamedTuple):
    """How much of a layer's work the first choice does alone: cosines, 1 where the others change no direction."""

    stream: Float[np.ndarray, "layer seq"]  # of the residual stream after it, with the first choice alone and with all
    answer: Float[np.ndarray, "layer seq"]  # of the first choice's weighted answer and the whole mixture


def top1_similarity(between: Float[Tensor, "layer seq dim"], weighted: Float[Tensor, "layer seq choice dim"]) -> Top1:
    """Compare the first choice alone with all choices together, as the stream and as the mixture's answer.

    The arrays are what a trace recorded at `TOP1_SITES`. The stream's cosine is high wherever the stream is much longer
    than what one layer adds, so read both. Source: MoE Lens (arXiv 2603.05806, cos(h_top1, h_full)).
    """
    before, each = between.float(), weighted.float()
    first, whole = each[..., 0, :], each.sum(-2)
    return Top1(
        F.cosine_similarity(before + first, before + whole, dim=-1).numpy(),
        F.cosine_similarity(first, whole, dim=-1).numpy(),
    )


def _directions(
    model: Transformer, trace: Trace, targets: int | Sequence[int] | None, against: int | Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The final stream, the direction in it whose dot product is the targets' score (`seq dim` each), and the targets."""
    stream, scale = _final_stream(model, trace)
    weight = _unembedding(model)
    if targets is None:
        best = linear(model.final_norm(stream[-1:, None]), weight)[0, 0].argmax()
        wanted = torch.where((after := _next_tokens(trace)) < 0, best.cpu(), after)
    else:
        wanted = _ids(targets, len(stream), model.config.vocab)
    if against is None:
        other = weight.mean(0, dtype=torch.float32)
    else:
        other = weight[_ids(against, len(stream), model.config.vocab).to(weight.device)].float()
    direction = (weight[wanted.to(weight.device)].float() - other) * model.final_norm.weight.float() * scale
    return stream, direction, wanted


def _final_stream(model: Transformer, trace: Trace) -> tuple[Float[Tensor, "seq dim"], Float[Tensor, "seq 1"]]:
    """The stream that the last norm reads, and what that norm multiplies it by."""
    stream = _on(model, trace[f"layers.{model.config.n_layers - 1}.residual.after"])
    _check_dim(model, stream)
    return stream, torch.rsqrt(stream.float().square().mean(-1, keepdim=True) + model.final_norm.eps)


def _written(trace: Trace, layer: int, config: Config) -> Float[Tensor, "seq choice dim"]:
    if config.n_experts is None:
        return trace[f"layers.{layer}.feed_forward"][:, None]
    return trace[f"layers.{layer}.experts.weighted"]


def _next_tokens(trace: Trace) -> Int[Tensor, " seq"]:
    """The id that follows each recorded position; -1 after the last token."""
    after = torch.cat((trace.ids[1:].long(), torch.tensor([-1])))
    return after if trace.positions is None else after[trace.positions]


def _ids(asked: int | Sequence[int], seq: int, vocab: int) -> Int[Tensor, " seq"]:
    given: Any = asked
    try:
        several = [given] * seq if hasattr(given, "__index__") and not getattr(given, "ndim", 0) else given
        ids = torch.tensor([operator.index(one) for one in several])
    except TypeError:
        raise AnalysisError(
            f"Give a token id, or one for each position, not {asked!r}. A word's id: lab.tokenizer.encode(word, bos=False)[0]."
        ) from None
    if len(ids) != seq or int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise AnalysisError(
            f"Give one token id below {vocab}, or one for each of the {seq} recorded positions, not {asked}."
        )
    return ids


def _unembedding(model: Transformer) -> Float[Tensor, "vocab dim"]:
    return model.embed.weight if model.unembed is None else model.unembed.weight


def _on(model: Transformer, recorded: Tensor) -> Tensor:
    return recorded.to(model.embed.weight)


def _check_dim(model: Transformer, stream: Tensor) -> None:
    if stream.shape[-1] != model.config.dim:
        raise AnalysisError(
            f"The trace's stream has {stream.shape[-1]} numbers per token, this model's {model.config.dim}: "
            "give the model that made the trace."
        )
