"""What a change does: leave an expert out, send a token elsewhere, put one run's numbers into another.

Every sweep runs the model once per cell of its answer, with one of `mixtral_lab.edit`'s edits open, and compares with
the unedited run. Losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mixtral_lab.analysis.routing import AnalysisError
from mixtral_lab.edit import HOW, Edit, ablate, patch, replay, reroute, top_k
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.sites import recording
from mixtral_lab.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

MOST_SETS = 1000  # of experts that a sweep over all of them tries


class Score(NamedTuple):
    """How well a model foretells some texts, and what it gives to their targets."""

    loss: float  # nats per token, over all tokens of the texts but the first of each
    target: float  # log-probability (nats) of the target after its text, averaged over texts; nan without targets


class Question(NamedTuple):
    """A text as ids, of which the last `n_target` are what is asked after it."""

    ids: list[int]
    n_target: int


def questions(lab: Lab, texts: str | Sequence[str], targets: str | Sequence[str] | None = None) -> list[Question]:
    """Texts, each with the words that shall follow it, as token ids.

    Raises `AnalysisError` if there is no text, an empty one without a target, not one target per text, or if a target would
    melt into its text's last token, so that it cannot be told apart.
    """
    several = [texts] if isinstance(texts, str) else list(texts)
    wanted = [targets] if isinstance(targets, str) else list(targets or [""] * len(several))
    if not several or len(several) != len(wanted):
        raise AnalysisError(f"There are {len(several)} texts and {len(wanted)} targets: give each text its own.")
    if any(not text and not target for text, target in zip(several, wanted, strict=True)):
        raise AnalysisError(
            "A text is empty and has no target: nothing in it has a loss. Write at least one character."
        )
    return [_question(lab, text, target) for text, target in zip(several, wanted, strict=True)]


def score(lab: Lab, asked: Sequence[Question], chunks: int = 1) -> Score:
    """Run the model over texts and targets; under `with lab.edit(...)`, with that change.

    In several `chunks`, each text is read piece by piece through the cache: the same by definition, but for rounding.
    """
    losses, given = [], []
    for ids, n_target in asked:
        log_p = _log_p(lab, ids, chunks)
        n_text = len(ids) - n_target
        losses.append(-log_p[: n_text - 1])
        given.append(float(log_p[n_text - 1 :].sum()) if n_target else float("nan"))
    tokens = torch.cat(losses)
    return Score(float(tokens.mean()) if len(tokens) else float("nan"), float(np.mean(given)))


def noise_floor(lab: Lab, asked: Sequence[Question]) -> Score:
    """How far unedited runs differ among themselves in this dtype: changes below that say nothing.

    The same run is repeated, and made again in ways that compute the same but add up in another order: the text in two,
    three and four chunks, and with the dispatches for many tokens. The largest differences from the first run are
    given. They are tiny in float32; in bfloat16 a near tie of a router may fall otherwise, and the loss moves visibly.
    """
    first = score(lab, asked)
    others = [score(lab, asked, chunks) for chunks in (1, 2, 3, 4)]
    for name in ("sorted", "every") if lab.config.n_experts is not None else ():
        with _dispatched(lab.model, name):
            others.append(score(lab, asked))
    return Score(*(max(abs(other[part] - first[part]) for other in others) for part in range(2)))


def ablation_sweep(
    lab: Lab,
    texts: str | Sequence[str],
    targets: str | Sequence[str] | None = None,
    how: str | Sequence[str] = HOW,
    layers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Leave out every expert of every layer in turn, and see what becomes of the loss and of the targets.

    `how` says what the tokens do that would take it (`mixtral_lab.edit.ablate`): "zero", "renormalise", "next_best".
    One row per (how, layer, expert); columns: how, layer, expert, used (share of tokens that chose it in the unedited
    run), loss, loss_change (nats per token; above 0: worse), target, target_change (log-probability; below 0: worse),
    and loss_noise, target_noise: what `noise_floor` gives, below which a change says nothing.
    Raises `AnalysisError` for a dense model, or as `questions` does.
    """
    import pandas as pd

    n_experts = _check_sparse(lab)
    asked = questions(lab, texts, targets)
    ways = [how] if isinstance(how, str) else list(how)
    shown = range(lab.config.n_layers) if layers is None else layers
    before, noise, used = score(lab, asked), noise_floor(lab, asked), _used(lab, asked)
    rows = []
    cells = [(way, layer, expert) for way in ways for layer in shown for expert in range(n_experts)]
    for way, layer, expert in tqdm(cells, desc="leaving out experts", delay=2, leave=False):
        with lab.edit(ablate(layer, expert, way)):
            after = score(lab, asked)
        rows.append(
            {
                "how": way, "layer": layer, "expert": expert, "used": float(used[layer, expert]),
                **_changes(before, after), "loss_noise": noise.loss, "target_noise": noise.target,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def top_k_sweep(
    lab: Lab, texts_by_domain: Mapping[str, Sequence[str]], ks: Sequence[int] | None = None
) -> pd.DataFrame:
    """The loss if every token of every layer takes its k best experts instead of as many as the model was trained with.

    `ks` are 1 to all experts if not given. One row per (domain, k); columns: domain, k, trained (whether this is the
    model's own k), loss, loss_change, loss_noise. Raises `AnalysisError` for a dense model or a domain without texts.
    """
    import pandas as pd

    n_experts = _check_sparse(lab)
    tried = range(1, n_experts + 1) if ks is None else ks
    rows = []
    progress = tqdm(total=len(texts_by_domain) * len(tried), desc="other numbers of experts", delay=2, leave=False)
    for domain, texts in texts_by_domain.items():
        asked = questions(lab, texts)
        before, noise = score(lab, asked), noise_floor(lab, asked)
        for k in tried:
            with lab.edit(top_k(k)):
                after = score(lab, asked)
            rows.append(
                {
                    "domain": domain, "k": k, "trained": k == lab.config.n_choices, "loss": after.loss,
                    "loss_change": after.loss - before.loss, "loss_noise": noise.loss,
                }
            )  # fmt: skip
            progress.update()
    progress.close()
    return pd.DataFrame(rows)


class Rerouting(NamedTuple):
    """What sending one token of one layer to other experts did."""

    effects: pd.DataFrame  # a row per set of experts: experts, next, next_change, loss_change
    moved: Float[np.ndarray, "set layer"]  # share of later choices that became others; nan up to the changed layer
    own: tuple[int, ...]  # the experts that the model chose itself


def reroute_sweep(
    lab: Lab, text: str, layer: int, position: int, sets: Sequence[Sequence[int]] | None = None
) -> Rerouting:
    """Send the token at `position` in one layer to every other set of experts, and follow what that moves.

    `sets` are all sets of as many experts as the model chooses, but for its own choice, unless they are given. The
    weights are the softmax of the router's own logits over the forced set. Columns of `effects`: experts (best first),
    next (log-probability, nats, of the token that follows in the text), next_change, loss_change (nats per token, over
    all that follows). `moved`: of all choices that later layers make from `position` on, the share that was not among
    the unedited run's for the same token; a token's choices are compared as sets.
    Raises `AnalysisError` for a dense model, a layer or a position that is not there or has nothing after it, or if there
    are too many sets to try them all.
    """
    import pandas as pd

    n_experts, k = _check_sparse(lab), lab.config.n_choices or 1
    ids = questions(lab, text)[0].ids
    if not 0 <= layer < lab.config.n_layers:
        raise AnalysisError(f"There is no layer {layer}: they are 0 to {lab.config.n_layers - 1}.")
    if not 0 <= position < len(ids) - 1:
        raise AnalysisError(
            f"Position {position} has no token after it: the text has {len(ids)}, so give 0 to {len(ids) - 2}."
        )
    before, chosen = _run(lab, ids)
    own = tuple(chosen[layer, position].tolist())
    if sets is None:
        if comb(n_experts, k) > MOST_SETS:
            raise AnalysisError(
                f"There are {comb(n_experts, k):,} sets of {k} of {n_experts} experts: name those to try, {MOST_SETS} at most."
            )
        sets = [one for one in combinations(range(n_experts), k) if set(one) != set(own)]
    rows, moved = [], np.full((len(sets), lab.config.n_layers), np.nan)
    for number, experts in enumerate(tqdm(sets, desc="sending a token elsewhere", delay=2, leave=False)):
        forced = _best_first(lab, ids, layer, position, experts)
        after, choices = _run(lab, ids, reroute(layer, position, forced))
        change = after[position:] - before[position:]
        rows.append(
            {"experts": forced, "next": float(after[position]), "next_change": float(change[0]),
             "loss_change": float(-change.mean())}
        )  # fmt: skip
        old, new = chosen[layer + 1 :, position:, :, None], choices[layer + 1 :, position:, None]
        moved[number, layer + 1 :] = 1 - (old == new).any(-1).float().mean((1, 2)).numpy()
    return Rerouting(pd.DataFrame(rows), moved, own)


class Patching(NamedTuple):
    """How much of the clean run comes back when one of its values is put into the corrupt run."""

    recovered: Float[np.ndarray, "layer seq"]  # 0: nothing, as in the corrupt run; 1: all, as in the clean run
    clean: float  # the target's logit less the other word's, after the last token of the clean text
    corrupt: float  # the same after the corrupt text
    tokens: tuple[tuple[str, ...], tuple[str, ...]]  # of the clean and the corrupt text


def patch_sweep(
    lab: Lab, clean: str, corrupt: str, target: str, against: str, site: str = "residual.after"
) -> Patching:
    """Where in the model the difference between two texts is carried: put each value of one run into the other.

    `clean` makes the model say `target`, `corrupt` rather `against`; both have as many tokens. For each layer and
    position, the corrupt run is made again with what the clean run had at `layers.N.{site}` there, and
    recovered = (patched - corrupt) / (clean - corrupt), where each is a logit difference of the two words' first tokens
    after the last position. Source: activation patching as in Locating and Editing Factual Associations in GPT (arXiv
    2202.05262, section 2) with the measure of Zhang and Nanda (arXiv 2309.16042, section 2).
    Raises `AnalysisError` for texts of different length, or if the model does not tell them apart.
    """
    if not (clean and corrupt and target and against):
        raise AnalysisError("A text or a word is empty: give two texts, and two words that may follow them.")
    asked = questions(lab, [clean, corrupt], [target, target])
    ids = [question.ids[: -question.n_target] for question in asked]
    right = asked[0].ids[len(ids[0])]
    wrong = questions(lab, clean, against)[0].ids[len(ids[0])]
    tokens = tuple(tuple(lab.tokenizer.pieces(one)) for one in ids)
    if len(ids[0]) != len(ids[1]):
        raise AnalysisError(
            f"The texts must have as many tokens, but they have {len(ids[0])} and {len(ids[1])}: {' '.join(tokens[0])} "
            f"against {' '.join(tokens[1])}."
        )

    def difference(of: list[int]) -> float:
        logits = lab.logits(torch.tensor([of]))[0, -1].float()
        return float(logits[right] - logits[wrong])

    good, bad = difference(ids[0]), difference(ids[1])
    if abs(good - bad) < 1e-3:
        raise AnalysisError(
            f"Both texts give the same logit difference ({good:.4f}), so there is nothing to recover: choose texts, or words, "
            "that differ more."
        )
    trace = lab.trace_ids(ids[0], sites=f"layers.*.{site}")
    recovered = np.zeros((lab.config.n_layers, len(ids[0])))
    cells = list(np.ndindex(recovered.shape))
    for layer, position in tqdm(cells, desc="patching", delay=2, leave=False):
        with lab.edit(patch(f"layers.{layer}.{site}", trace, position)):
            recovered[layer, position] = (difference(ids[1]) - bad) / (good - bad)
    return Patching(recovered, good, bad, (tokens[0], tokens[1]))


def replay_effect(lab: Lab, trace: Trace) -> pd.DataFrame:
    """What a recorded routing does to this model, token by token: the trace's text read with it, and without.

    A row per token but the first: position, token, log_p (nats, of the token given those before it) and replayed (the
    same under the trace's choices), change, layers_changed (in how many layers the token's own choice is another set), and
    first_changed (in how many another first choice). The choices at a position bear on the tokens after it. Routing
    replay is known from reinforcement learning (R3). Raises `AnalysisError` if the trace's ids are not this model's.
    """
    import pandas as pd

    ids = trace.ids.tolist()
    if not 0 <= min(ids) <= max(ids) < lab.config.vocab:
        raise AnalysisError("The trace's token ids are not this model's: give Trace.from_arrays the ids.")
    forced = replay(trace)
    before = _log_p(lab, ids)
    with lab.edit(forced):
        after = _log_p(lab, ids)
    table = forced.frame()
    n_choices = lab.config.n_choices or 0
    others = table.assign(other=table["shared"] < n_choices, other_first=~table["same_first"]).groupby("position")
    changed = others[["other", "other_first"]].sum().reindex(range(len(ids)), fill_value=0)
    return pd.DataFrame(
        {
            "position": range(1, len(ids)), "token": trace.tokens[1:], "log_p": before.numpy(),
            "replayed": after.numpy(), "change": (after - before).numpy(),
            "layers_changed": changed["other"].to_numpy()[1:], "first_changed": changed["other_first"].to_numpy()[1:],
        }
    )  # fmt: skip


def _question(lab: Lab, text: str, target: str) -> Question:
    ids = lab.tokenizer.encode(text)
    whole = lab.tokenizer.encode(text + target)
    if whole[: len(ids)] != ids:
        raise AnalysisError(
            f"After {text[-20:]!r}, the target {target!r} does not begin with a token of its own: move the space between them "
            "to the target, or choose another break."
        )
    return Question(whole, len(whole) - len(ids))


def _log_p(lab: Lab, ids: Sequence[int], chunks: int = 1) -> Float[Tensor, " later"]:
    """The log-probability (nats, float64) of every token but the first, given those before it."""
    whole = torch.tensor([list(ids)])
    if chunks == 1:
        logits = lab.logits(whole)
    else:
        with torch.inference_mode():
            cache = lab.model.new_cache(1, len(ids))
            pieces = whole.to(lab.device).chunk(chunks, dim=1)
            logits = torch.cat([lab.model(piece, cache) for piece in pieces], dim=1)
    after = torch.tensor(ids[1:], dtype=torch.long, device=logits.device)
    return -F.cross_entropy(logits[0, :-1].float(), after, reduction="none").double().cpu()


def _run(lab: Lab, ids: list[int], *edits: Edit) -> tuple[Float[Tensor, " later"], Tensor]:
    """Log-probabilities, and who was chosen: `layer seq choice`."""
    names = [f"layers.{layer}.router.experts" for layer in range(lab.config.n_layers)]
    with lab.edit(*edits), recording(lab.model, names) as recorder:
        log_p = _log_p(lab, ids)
    values = recorder.values()
    return log_p, torch.stack([values[name] for name in names])


def _used(lab: Lab, asked: Sequence[Question]) -> Float[np.ndarray, "layer expert"]:
    """Share of the tokens that chose each expert."""
    chosen = torch.cat([_run(lab, question.ids)[1] for question in asked], dim=1)
    return F.one_hot(chosen, lab.config.n_experts or 1).sum(2).float().mean(1).numpy()


def _best_first(lab: Lab, ids: list[int], layer: int, position: int, experts: Sequence[int]) -> tuple[int, ...]:
    """A set of experts in the order of the router's own logits for this token."""
    trace = lab.trace_ids(ids[: position + 1], sites=[f"layers.{layer}.router.logits"], positions=[position])
    logits = trace[f"layers.{layer}.router.logits"][0]
    return tuple(sorted(experts, key=lambda expert: -float(logits[expert])))


def _changes(before: Score, after: Score) -> dict[str, float]:
    return {
        "loss": after.loss, "loss_change": after.loss - before.loss,
        "target": after.target, "target_change": after.target - before.target,
    }  # fmt: skip


@contextmanager
def _dispatched(model: Transformer, name: str) -> Iterator[None]:
    before = [block.experts.dispatch for block in model.blocks]
    try:
        for block in model.blocks:
            block.experts.dispatch = name
        yield
    finally:
        for block, own in zip(model.blocks, before, strict=True):
            block.experts.dispatch = own


def _check_sparse(lab: Lab) -> int:
    if lab.config.n_experts is None:
        raise AnalysisError(f"{lab.name} is a dense model: it has no experts to leave out or to choose otherwise.")
    return lab.config.n_experts
