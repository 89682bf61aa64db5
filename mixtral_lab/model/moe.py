"""The mixture of experts: a router picks a few experts for each token, and their answers are mixed.

Three ideas, in reading order: `route` chooses, `SwiGLU` is one expert, and `mix_dense` says what the mixture
*is*. The two economical versions below it compute the same with far less work.

A `Site` lets a value pass; it is there to be looked at and changed by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtral_lab.model.linear import Linear
from mixtral_lab.model.site import Site

Chosen = Int[Tensor, "batch seq choice"]
Rows = Float[Tensor, "batch seq choice features_in"]
Answers = Float[Tensor, "batch seq choice features_out"]
Part = Callable[[Tensor], Tensor]  # an expert, or half of one

FEW = 4  # up to so many tokens, running the chosen experts one by one is the quickest


class Routing(NamedTuple):
    """What the router decided for every token. Best expert first."""

    logits: Float[Tensor, "*tokens expert"]
    experts: Int[Tensor, "*tokens choice"]
    weights: Float[Tensor, "*tokens choice"]


def route(logits: Float[Tensor, "*tokens expert"], n_choices: int) -> Routing:
    """Take the best `n_choices` experts of each token, and share one unit of weight among them.

    Top-k first, then softmax over the winners: logits (2.0, 0.0, 1.0) with two choices give experts (0, 2) and
    weights (0.73, 0.27). The losers' logits do not matter. Source: Mixtral of Experts (arXiv 2401.04088,
    section 2.1).
    """
    experts = logits.topk(n_choices, dim=-1).indices
    return Routing(logits, experts, share(logits, experts))


def share(
    logits: Float[Tensor, "*tokens expert"], experts: Int[Tensor, "*tokens choice"]
) -> Float[Tensor, "*tokens choice"]:
    """One unit of weight, shared by softmax among the chosen experts alone."""
    return F.softmax(logits.gather(-1, experts), dim=-1, dtype=torch.float32).to(logits.dtype)


class Router(nn.Module):
    """One row of weights per expert; the dot product with a token says how much that expert wants it."""

    def __init__(self, dim: int, n_experts: int, n_choices: int) -> None:
        super().__init__()
        self.score = Linear(dim, n_experts)
        self.logits, self.experts, self.weights = Site(), Site(), Site()
        self.n_choices = n_choices

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Routing:
        """`route`, in the three steps in which one may intervene: whoever changes the choice changes the weights."""
        logits = self.logits(self.score(x))
        experts = self.experts(logits.topk(self.n_choices, dim=-1).indices, logits)
        return Routing(logits, experts, self.weights(share(logits, experts), logits, experts))


class SwiGLU(nn.Module):
    """One expert: `down(silu(gate(x)) * up(x))`. In a dense model, the whole feed-forward is one of these.

    Source: GLU Variants Improve Transformer (arXiv 2002.05202, section 2).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)
        self.hidden = Site()

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.down(self.inside(x))

    def inside(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens hidden"]:
        return self.hidden(F.silu(self.gate(x)) * self.up(x))


Mix = Callable[[Tensor, Routing, nn.ModuleList], Tensor]


def mix_dense(
    x: Float[Tensor, "batch seq dim"], routing: Routing, experts: nn.ModuleList
) -> Float[Tensor, "batch seq dim"]:
    """What a mixture is: run every expert on every token, weigh, sum. An expert not chosen weighs 0."""
    answers = torch.stack([expert(x) for expert in experts])
    nothing = torch.zeros_like(routing.logits)
    weights = nothing.scatter(-1, routing.experts, routing.weights)
    return einsum(weights, answers, "batch seq expert, expert batch seq dim -> batch seq dim")


class Experts(nn.Module):
    """The experts of one layer: each token is taken to those it chose, and their answers are weighed and summed.

    `dispatch` names how they are taken there: "every" runs all experts on all tokens, "sorted" runs each expert once on
    the tokens that chose it, "one_by_one" runs each token's choices in turn, and "auto" takes the quickest. "dense" is
    the plain definition, `mix_dense`; a function of the same form may stand in place of a name. All agree.
    """

    def __init__(self, dim: int, hidden: int, n_experts: int) -> None:
        super().__init__()
        self.ffn = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(n_experts))
        self.hidden, self.out, self.weighted = Site(), Site(), Site()
        self.dispatch: str | Mix = "auto"

    def forward(self, x: Float[Tensor, "batch seq dim"], routing: Routing) -> Float[Tensor, "batch seq dim"]:
        apart = self.hidden.watched or self.out.watched or self.weighted.watched
        dispatch = mix_dense if self.dispatch == "dense" else self.dispatch
        if not isinstance(dispatch, str):
            if not apart:
                return dispatch(x, routing, self.ffn)
            dispatch = "every" if dispatch is mix_dense else "sorted"  # a whole mixture has no single answers to see
        if dispatch == "auto":
            few = x.shape[0] * x.shape[1] <= FEW and not torch.is_grad_enabled()
            dispatch = "one_by_one" if few else "sorted"
        take, chosen = DISPATCH[dispatch], routing.experts

        tokens = x.unsqueeze(-2).expand(*chosen.shape, -1)
        if self.hidden.watched:
            hidden = self.hidden(take(tokens, chosen, [expert.inside for expert in self.swiglus]), chosen)
            answers = take(hidden, chosen, [expert.down for expert in self.swiglus])
        else:
            answers = take(tokens, chosen, self.swiglus)
        weighted = self.weighted(self.out(answers, chosen) * routing.weights[..., None].to(answers.dtype), chosen)
        return weighted.sum(-2).to(x.dtype)

    @property
    def swiglus(self) -> list[SwiGLU]:
        """The experts, by their own type."""
        return list(self.ffn)  # type: ignore[arg-type]


def take_every(rows: Rows, chosen: Chosen, experts: Sequence[Part]) -> Answers:
    """Give every row to every expert, and keep the answer of the one it chose."""
    answers = torch.stack([expert(rows) for expert in experts])
    of_chosen = repeat(chosen, "batch seq choice -> 1 batch seq choice features", features=answers.shape[-1])
    return answers.gather(0, of_chosen).squeeze(0)


def take_sorted(rows: Rows, chosen: Chosen, experts: Sequence[Part]) -> Answers:
    """Line the rows up by expert, run each expert once on its own segment, and put the answers back in place.

    Work: `choice / expert` of `take_every`. For many tokens.
    """
    flat = rearrange(chosen, "batch seq choice -> (batch seq choice)")
    by_expert = flat.argsort(stable=True)
    sizes = flat.bincount(minlength=len(experts)).tolist()
    segments = rearrange(rows, "batch seq choice features -> (batch seq choice) features")[by_expert].split(sizes)
    answers = torch.cat([expert(segment) for expert, segment in zip(experts, segments, strict=True) if len(segment)])
    in_place = torch.empty_like(by_expert).scatter_(0, by_expert, torch.arange(len(flat), device=flat.device))
    return answers[in_place].view(*chosen.shape, -1)


def take_one_by_one(rows: Rows, chosen: Chosen, experts: Sequence[Part]) -> Answers:
    """Take each row to its expert in turn. For a few tokens: nothing is sorted."""
    each = rows.reshape(chosen.numel(), -1).split(1)
    answers = [experts[expert](row) for expert, row in zip(chosen.flatten().tolist(), each, strict=True)]
    return torch.cat(answers).view(*chosen.shape, -1)


DISPATCH = {"every": take_every, "sorted": take_sorted, "one_by_one": take_one_by_one}
