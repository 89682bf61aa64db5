"""The mixture of experts: a router picks a few experts for each token, and their answers are mixed.

Three ideas, in reading order: `route` chooses, `SwiGLU` is one expert, and `mix_dense` says what the mixture
*is*. The two economical versions below it compute the same with far less work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtral_lab.model.linear import Linear

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
    best = logits.topk(n_choices, dim=-1)
    weights = F.softmax(best.values, dim=-1, dtype=torch.float32).to(logits.dtype)
    return Routing(logits, best.indices, weights)


class Router(nn.Module):
    """One row of weights per expert; the dot product with a token says how much that expert wants it."""

    def __init__(self, dim: int, n_experts: int, n_choices: int) -> None:
        super().__init__()
        self.score = Linear(dim, n_experts)
        self.n_choices = n_choices

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Routing:
        return route(self.score(x), self.n_choices)


class SwiGLU(nn.Module):
    """One expert: `down(silu(gate(x)) * up(x))`. In a dense model, the whole feed-forward is one of these.

    Source: GLU Variants Improve Transformer (arXiv 2002.05202, section 2).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


Mix = Callable[[Tensor, Routing, nn.ModuleList], Tensor]


class Experts(nn.Module):
    """The experts of one layer, and the way their answers are mixed.

    `dispatch` names that way: "dense" runs every expert on every token, "sorted" runs each expert once on the
    tokens that chose it, "one_by_one" runs each token's choices in turn. "auto" takes the quickest. All agree.
    A function of the same form as those three may stand in place of a name.
    """

    def __init__(self, dim: int, hidden: int, n_experts: int) -> None:
        super().__init__()
        self.ffn = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(n_experts))
        self.dispatch: str | Mix = "auto"

    def forward(self, x: Float[Tensor, "batch seq dim"], routing: Routing) -> Float[Tensor, "batch seq dim"]:
        dispatch = self.dispatch
        if dispatch == "auto":
            few = x.shape[0] * x.shape[1] <= FEW and not torch.is_grad_enabled()
            dispatch = "one_by_one" if few else "sorted"
        mix = DISPATCH[dispatch] if isinstance(dispatch, str) else dispatch
        return mix(x, routing, self.ffn)


def mix_dense(
    x: Float[Tensor, "batch seq dim"], routing: Routing, experts: nn.ModuleList
) -> Float[Tensor, "batch seq dim"]:
    """What a mixture is: run every expert on every token, weigh, sum. An expert not chosen weighs 0."""
    answers = torch.stack([expert(x) for expert in experts])
    nothing = torch.zeros_like(routing.logits)
    weights = nothing.scatter(-1, routing.experts, routing.weights)
    return einsum(weights, answers, "batch seq expert, expert batch seq dim -> batch seq dim")


def mix_sorted(
    x: Float[Tensor, "batch seq dim"], routing: Routing, experts: nn.ModuleList
) -> Float[Tensor, "batch seq dim"]:
    """Line the tokens up by expert, run each expert once on its own segment, and add the answers back in place.

    Work: `choice / expert` of `mix_dense`. For many tokens.
    """
    n_choices = routing.experts.shape[-1]
    tokens = rearrange(x, "batch seq dim -> (batch seq) dim")
    chosen = rearrange(routing.experts, "batch seq choice -> (batch seq choice)")
    weights = rearrange(routing.weights, "batch seq choice -> (batch seq choice) 1")

    by_expert = chosen.argsort(stable=True)
    token = by_expert // n_choices
    sizes = chosen.bincount(minlength=len(experts)).tolist()
    segments = tokens[token].split(sizes)
    answers = [expert(segment) for expert, segment in zip(experts, segments, strict=True) if len(segment)]
    weighed = torch.cat(answers) * weights[by_expert]
    return torch.zeros_like(tokens).index_add_(0, token, weighed.to(x.dtype)).view_as(x)


def mix_one_by_one(
    x: Float[Tensor, "batch seq dim"], routing: Routing, experts: nn.ModuleList
) -> Float[Tensor, "batch seq dim"]:
    """Take each token to its chosen experts in turn. For a few tokens: nothing is sorted, nothing copied."""
    tokens = rearrange(x, "batch seq dim -> (batch seq) dim")
    chosen = rearrange(routing.experts, "batch seq choice -> (batch seq) choice").tolist()
    weights = rearrange(routing.weights, "batch seq choice -> (batch seq) choice")
    mixed = []
    for token, choices, shares in zip(tokens.split(1), chosen, weights, strict=True):
        answers = [experts[e](token) * weight for e, weight in zip(choices, shares, strict=True)]
        mixed.append(sum(answers[1:], answers[0]))
    return torch.cat(mixed).view_as(x)


DISPATCH = {"dense": mix_dense, "sorted": mix_sorted, "one_by_one": mix_one_by_one}
