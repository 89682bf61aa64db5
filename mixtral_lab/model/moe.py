"""The mixture of experts: a router picks a few experts for each token, and their answers are mixed.

Three ideas, in reading order: `route` chooses, `SwiGLU` is one expert, and `mix_dense` says what the mixture
*is*. The economical versions below it compute the same with far less work.

A `Site` lets a value pass; it is there to be looked at and changed by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtral_lab.config import LabError
from mixtral_lab.model.linear import (
    ROWS,
    SWEPT,
    Linear,
    dots,
    fed_alike,
    rounded_up,
    rounds_up,
    row_fed_alike,
    settled,
    small_products,
    tuned,
)
from mixtral_lab.model.module import Module, ModuleList, as_made, until_changed
from mixtral_lab.model.site import Site, asked, free_of_hooks

Chosen = Int[Tensor, "batch seq choice"]
Rows = Float[Tensor, "batch seq #choice features_in"]  # a row for each choice, or one for all choices of a token
Answers = Float[Tensor, "batch seq choice features_out"]
Part = Callable[[Tensor], Tensor]  # an expert, or half of one

Sorted = Float[Tensor, "row features_in"]  # the rows of expert 0, then those of expert 1, ...
SortedOut = Float[Tensor, "row features_out"]
Ends = Int[Tensor, " expert"]
ALIGNED = 16  # bytes: where the grouped product wants rows and matrices to begin
FEW = 4  # up to so many tokens, running the chosen experts one by one is the quickest


class Laid(NamedTuple):
    """What the experts answered, a row for each choice, in the order in which they did.

    Row `i` answers choice `order[i]`, counted through the whole text; without an order they stand as the text does.
    """

    rows: Float[Tensor, "row features_out"]
    order: Int[Tensor, " row"] | None
    shape: torch.Size  # batch, seq, choice

    def by_choice(self) -> Answers:
        """Every answer where its choice stands."""
        rows = self.rows if self.order is None else self.rows.index_select(0, self._where(self.order))
        return rows.unflatten(0, self.shape)

    def mixed(self, weights: Float[Tensor, "batch seq choice"]) -> Float[Tensor, "batch seq features_out"]:
        """Weighed and summed, for each token.

        On a CPU its answers are picked up where they lie: PyTorch's bag of embeddings is just that, a few rows of a table, each
        with its weight, as one sum.
        """
        if self.order is None or torch.is_grad_enabled() or not self.rows.is_cpu or not tuned():
            return einsum(weights, self.by_choice(), "batch seq choice, batch seq choice dim -> batch seq dim")
        bags, shares = self._where(self.order).view(-1, self.shape[-1]), weights.reshape(-1, self.shape[-1])
        mixed = F.embedding_bag(bags, self.rows, mode="sum", per_sample_weights=shares)
        return mixed.view(*self.shape[:2], -1)

    @staticmethod
    def _where(order: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """The row of each choice: picking rows up takes a third of the time of laying them down."""
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


Take = Callable[[Tensor, Tensor, Sequence[Part]], Laid]  # rows and choices to answers


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
    best, experts = logits.topk(n_choices, dim=-1)
    return Routing(logits, experts, share(best))


def share(best: Float[Tensor, "*tokens choice"]) -> Float[Tensor, "*tokens choice"]:
    """One unit of weight, shared by softmax of the chosen experts' logits alone."""
    return F.softmax(best, dim=-1, dtype=torch.float32).to(best.dtype)


class Router(Module):
    """One row of weights per expert; the dot product with a token says how much that expert wants it."""

    def __init__(self, dim: int, n_experts: int, n_choices: int) -> None:
        super().__init__()
        self.score = Linear(dim, n_experts)
        self.logits, self.experts, self.weights = Site(), Site(), Site()
        self.n_choices = n_choices

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Routing:
        """`route`, in the three steps in which one may intervene: whoever changes the choice changes the weights."""
        logits = self.logits(self.score(x))
        best, experts = logits.topk(self.n_choices, dim=-1)
        experts = self.experts(experts, logits)
        if asked(self.experts):  # and perhaps changed
            best = logits.gather(-1, experts)
        return Routing(logits, experts, self.weights(share(best), logits, experts))

    @property
    def ordinary(self) -> bool:
        """Whether `row` computes what `forward` does: nothing in here was replaced."""
        sites = as_made(self.logits, Site) and as_made(self.experts, Site) and as_made(self.weights, Site)
        return sites and as_made(self.score, Linear)

    def row(self, x: Float[Tensor, " dim"]) -> Routing:
        """The same for one token."""
        return route(self.score.row(x), self.n_choices)


class SwiGLU(Module):
    """One expert: `down(silu(gate(x)) * up(x))`. In a dense model, the whole feed-forward is one of these.

    Source: GLU Variants Improve Transformer (arXiv 2002.05202, section 2).
    """

    FED_ALIKE = ("gate", "up")

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)
        self.hidden = Site()

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.down(self.inside(x))

    def inside(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens hidden"]:
        gate, up = fed_alike(x, self.gate, self.up)
        return self.hidden(F.silu(gate) * up)

    @property
    @until_changed
    def ordinary(self) -> bool:
        """Whether `row` computes what `forward` does: nothing in here was replaced."""
        products = as_made(self.gate, Linear) and as_made(self.up, Linear) and as_made(self.down, Linear)
        return products and as_made(self.hidden, Site)

    def row(self, x: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """The same for one token."""
        gate, up = row_fed_alike(x, self.gate, self.up)
        return self.down.row(F.silu(gate) * up)


Mix = Callable[[Tensor, Routing, nn.ModuleList], Tensor]


def mix_dense(
    x: Float[Tensor, "batch seq dim"], routing: Routing, experts: nn.ModuleList
) -> Float[Tensor, "batch seq dim"]:
    """What a mixture is: run every expert on every token, weigh, sum. An expert not chosen weighs 0."""
    answers = torch.stack([expert(x) for expert in experts])
    nothing = torch.zeros_like(routing.logits)
    weights = nothing.scatter(-1, routing.experts, routing.weights)
    return einsum(weights, answers, "batch seq expert, expert batch seq dim -> batch seq dim")


class Experts(Module):
    """The experts of one layer: each token is taken to those it chose, and their answers are weighed and summed.

    `dispatch` names how they are taken there: "every" runs all experts on all tokens, "sorted" runs each expert once on
    the tokens that chose it, "grouped" does that for all experts in one call of PyTorch's ("sorted" where that cannot be),
    "one_by_one" runs each token's choices in turn, and "auto" takes the quickest (for many tokens "grouped" where it pays). "dense"
    is the plain definition, `mix_dense`; a function of the same form may stand in place of a name. All agree.
    """

    def __init__(self, dim: int, hidden: int, n_experts: int) -> None:
        super().__init__()
        self.ffn = ModuleList(SwiGLU(dim, hidden) for _ in range(n_experts))
        self.hidden, self.out, self.weighted = Site(), Site(), Site()
        self.dispatch: str | Mix = "auto"
        self.bank: Bank | None = None
        self._sought = False  # whether the bank was looked for
        self._places: list[tuple[int, ...]] = []  # of each expert's weights in it

    def forward(self, x: Float[Tensor, "batch seq dim"], routing: Routing) -> Float[Tensor, "batch seq dim"]:
        if self.dispatch == "auto" and torch.compiler.is_compiling() and self.bank is not None:
            return mix_picked(x, routing.weights, *(part[routing.experts] for part in self.bank))
        hidden, out, weighted = asked(self.hidden), asked(self.out), asked(self.weighted)
        dispatch = mix_dense if self.dispatch == "dense" else self.dispatch
        if not isinstance(dispatch, str):
            if not (hidden or out or weighted):
                return dispatch(x, routing, self.ffn)
            dispatch = "every" if dispatch is mix_dense else "sorted"  # a whole mixture has no single answers to see
        if dispatch == "auto":
            few = x.shape[0] * x.shape[1] <= FEW and not torch.is_grad_enabled()
            dispatch = "one_by_one" if few else "grouped" if grouped_pays(x) else "sorted"
        chosen, take = routing.experts, self.way(dispatch)
        if take is take_sorted and rounds_up(x) and free_of_hooks(self.ffn):
            take = functools.partial(take_sorted, multiple=ROWS)
        whole: Any = list(self.ffn)
        inside, down = ([one.inside for one in whole], [one.down for one in whole]) if hidden else ([], [])
        if dispatch == "grouped" and (bank := self._all_in_one(x)) is not None:
            take = functools.partial(take_grouped, n_experts=len(self.ffn))
            whole, inside, down = bank.whole, bank.inside, bank.out  # type: ignore[assignment]

        tokens = x.unsqueeze(-2)
        if hidden:
            laid = take(self.hidden(take(tokens, chosen, inside).by_choice(), chosen), chosen, down)
        else:
            laid = take(tokens, chosen, whole)
        if out or weighted:
            laid = Laid(self.out(laid.by_choice(), chosen).flatten(0, 2), None, chosen.shape)
        weights = routing.weights.to(laid.rows.dtype)
        if weighted:
            mixed = self.weighted(laid.by_choice() * weights[..., None], chosen).sum(-2)
        else:  # weighed and summed at once: no contribution is laid out on its own
            mixed = laid.mixed(weights)
        return mixed.to(x.dtype)

    def way(self, dispatch: str) -> Take:
        """How rows are taken to their experts."""
        return DISPATCH[dispatch]

    @property
    def swiglus(self) -> list[SwiGLU]:
        """The experts, by their own type."""
        return list(self.ffn)  # type: ignore[arg-type]

    @property
    def ordinary(self) -> bool:
        """Whether `row` computes what `forward` does, but for the experts themselves: nobody asked for another dispatch or
        replaced a site.
        """
        sites = as_made(self.hidden, Site) and as_made(self.out, Site) and as_made(self.weighted, Site)
        return self.dispatch == "auto" and sites

    def row(self, x: Float[Tensor, " dim"], routing: Routing) -> Float[Tensor, " dim"] | None:
        """The same for one token, by its experts in turn; None if one of these is no ordinary `SwiGLU`.

        Two small experts are taken at once and where they lie: they are every n-th of the bank, a slice, which copies nothing.
        """
        chosen, weights = routing.experts.tolist(), routing.weights
        if len(chosen) == 2 and self.has_bank(*chosen) and self.bank is not None:
            gate, up, down = self.bank
            if gate[0].numel() < SWEPT.get(gate.dtype, 0):
                first, second = chosen
                if first > second:
                    first, second, weights = second, first, weights.flip(0)
                two, token = slice(first, second + 1, second - first), x.expand(2, 1, -1)
                hidden = F.silu(small_products(gate[two], token)) * small_products(up[two], token)
                return torch.mv(small_products(down[two], hidden).squeeze(1).T, weights)
        experts: list[Any] = [self.ffn[expert] for expert in chosen]
        if not all(as_made(expert, SwiGLU) and expert.ordinary for expert in experts):
            return None
        return torch.mv(torch.stack([expert.row(x) for expert in experts]).T, weights)

    def _all_in_one(self, x: Tensor) -> Bank | None:
        """The bank, if all experts' products can be one call on it: nobody looks into an expert or trains it, and it is laid
        out as PyTorch's operator wants it. On a GPU it is made when first asked for, a role of a layer at a time.
        """
        if not all(places(one) for one in self.ffn) or not free_of_hooks(self.ffn):
            return None
        if not grouped_works(x.device, x.dtype):
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.ffn.parameters()):
            return None
        if x.is_cuda and not self._sought:
            self.lay_out()
        if not self.has_bank() or self.bank is None:
            return None
        fits = all(
            part.dtype == x.dtype
            and not (part.data_ptr() % ALIGNED or any(step * part.itemsize % ALIGNED for step in part.stride()[:-1]))
            for part in self.bank
        )
        return self.bank if fits else None

    def lay_out(self) -> None:
        """Have a bank, whatever it takes: for compiling. Raises `LabError` if an expert is no `SwiGLU`."""
        for number, expert in enumerate(self.ffn):
            if not isinstance(expert, SwiGLU):
                raise LabError(
                    f"Expert {number} is a {type(expert).__name__}: a compiled step knows SwiGLU only. Write without compiling."
                )
        self._keep(bank(self.swiglus, copy=True))

    def has_bank(self, *chosen: int) -> bool:
        """Whether there is a bank over the weights that the chosen experts have now (all, if none is named); if they are others,
        look again.

        Not while one of them is no ordinary expert: when that is over, the bank may be the right one again.
        """
        if self.bank is not None and len(self._places) != len(self.ffn):
            self.bank, self._sought = None, False
        for expert in chosen or range(len(self.ffn)):
            now = places(self.ffn._modules[str(expert)])
            if not now:
                return False
            if self.bank is not None and now != self._places[expert]:
                self.bank, self._sought = None, False
        if not self._sought:
            self._keep(bank(list(self.ffn)))
        return self.bank is not None

    def _keep(self, bank: Bank | None) -> None:
        self.bank, self._sought = bank, True
        self._places = [] if bank is None else [places(one) for one in self.ffn]


class Bank(NamedTuple):
    """The experts' matrices, each role as one tensor, so that choosing experts is indexing."""

    gate: Float[Tensor, "expert hidden dim"]
    up: Float[Tensor, "expert hidden dim"]
    down: Float[Tensor, "expert dim hidden"]

    # What an expert does, for the rows of all experts in turn; expert e's end at `ends[e]`.

    def whole(self, rows: Sorted, ends: Ends) -> SortedOut:
        return self.out(self.inside(rows, ends), ends)

    def inside(self, rows: Sorted, ends: Ends) -> SortedOut:
        return F.silu(_grouped(rows, self.gate, ends)) * _grouped(rows, self.up, ends)

    def out(self, rows: Sorted, ends: Ends) -> SortedOut:
        return _grouped(rows, self.down, ends)


def places(expert: Any) -> tuple[int, ...]:
    """Where an expert's weights lie in memory (nowhere, if it is no ordinary one); they may have been replaced since a bank was
    made of them.

    Asked for every token, so the weights are taken from where PyTorch keeps them, without its slow look-up.
    """
    if not as_made(expert, SwiGLU) or not expert.ordinary:
        return ()
    try:
        return tuple([part._parameters["weight"].data_ptr() for part in (expert.gate, expert.up, expert.down)])
    except (KeyError, AttributeError):  # weights are made anew at every call, as by torch.nn.utils.prune
        return ()


def _grouped(rows: Sorted, weight: Float[Tensor, "expert features_out features_in"], ends: Ends) -> SortedOut:
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def grouped_pays(x: Tensor) -> bool:
    """Whether one call for all experts is quicker than a call for each: on a GPU, and on a CPU in float32 where the product is
    PyTorch's own anyway, which takes any number of rows. (Autocast does not know that call.)
    """
    if x.is_cuda:
        return True
    own = tuned() and x.is_cpu and x.dtype == torch.float32 and not rounds_up(x)
    return own and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@functools.cache
def grouped_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's grouped product is present here, takes experts without rows, and agrees with the plain one.

    On a GPU it is asked in bfloat16 only, for which it has a kernel; in other dtypes it is a loop that waits for the host.
    """
    if device.type == "cuda" and dtype != torch.bfloat16:
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight = (
        torch.randn(*shape, generator=generator, device="cpu").to(device, dtype) for shape in ((24, 64), (4, 32, 64))
    )
    ends = torch.tensor([0, 7, 7, 24], dtype=torch.int32, device=device)
    try:
        out = _grouped(rows, weight, ends)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    plain = torch.cat((F.linear(rows[:7].float(), weight[1].float()), F.linear(rows[7:].float(), weight[3].float())))
    return torch.allclose(out.float(), plain, rtol=0.02, atol=0.2)


@torch.inference_mode(False)  # a copy made in inference mode could not be used outside
def bank(experts: Sequence[Any], copy: bool = False) -> Bank | None:
    """The bank of a layer's experts: a view of their own memory where a file lays them out evenly.

    Elsewhere there is none, unless `copy` is set: then they are laid out anew, and the experts' own weights become views.
    """

    def side_by_side(role: str) -> Tensor | None:
        weights = [getattr(expert, role).weight.detach() for expert in experts]
        first, places = weights[0], [weight.storage_offset() for weight in weights]
        step = places[1] - places[0] if len(places) > 1 else first.numel()
        if (
            step > 0
            and places == list(range(places[0], places[0] + step * len(places), step))
            and all(w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for w in weights)
            and all(w.is_contiguous() for w in weights)
        ):
            return first.as_strided((len(weights), *first.shape), (step, *first.stride()), places[0])
        if not copy:
            return None
        laid = torch.stack(weights)
        for expert, weight in zip(experts, laid, strict=True):
            getattr(expert, role).weight.data = weight
        return laid

    if not copy and not all(places(expert) for expert in experts):
        return None
    gate, up, down = (side_by_side(role) for role in ("gate", "up", "down"))
    return None if gate is None or up is None or down is None else Bank(gate, up, down)


def mix_picked(
    x: Float[Tensor, "*tokens dim"],
    weights: Float[Tensor, "*tokens choice"],
    gate: Float[Tensor, "*tokens choice hidden dim"],
    up: Float[Tensor, "*tokens choice hidden dim"],
    down: Float[Tensor, "*tokens choice dim hidden"],
) -> Float[Tensor, "*tokens dim"]:
    """The mixture of the experts that were picked for each token, every product written out as multiply and sum.

    For a token or two: the matrices are read from memory once, which is all the time it takes. Compiled, picking them and
    multiplying become one loop.
    """
    vector = settled(x.float()).unsqueeze(-2).unsqueeze(-2)
    hidden = settled(F.silu(dots(gate, vector)) * dots(up, vector))
    answers = dots(down, hidden.unsqueeze(-2))
    return (answers * weights.float().unsqueeze(-1)).sum(-2).to(x.dtype)


def take_every(rows: Rows, chosen: Chosen, experts: Sequence[Part]) -> Laid:
    """Give every row to every expert, and keep the answer of the one it chose."""
    answers = torch.stack([expert(rows) for expert in experts])
    of_chosen = repeat(chosen, "batch seq choice -> 1 batch seq choice features", features=answers.shape[-1])
    answers = answers.expand(-1, -1, -1, chosen.shape[-1], -1).gather(0, of_chosen)
    return Laid(answers[0].flatten(0, 2), None, chosen.shape)


def take_sorted(rows: Rows, chosen: Chosen, experts: Sequence[Part], multiple: int = 1) -> Laid:
    """Sort the choices by expert, and run each expert once on the rows that chose it.

    Work: `choice / expert` of `take_every`. For many tokens. An expert with `multiple` rows or more is given a multiple of
    them: the rows that follow its own, of the next expert, are computed too and left aside. That is cheaper than
    `linear` rounding up each of three products, but whoever looks inside an expert would see rows that are not its own.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    queue = in_turn(rows, torch.cat((order, order[: 2 * multiple - 1])), chosen.shape[-1])
    answers, start = torch.empty(0), 0
    for expert, count in zip(experts, flat.bincount(minlength=len(experts)).tolist(), strict=True):
        if count:
            answer = expert(queue[start : start + rounded_up(count, multiple)])[:count]
            answers = answers if len(answers) else answer.new_empty(len(flat), answer.shape[-1])
            answers[start : start + count] = answer
            start += count
    return Laid(answers, order, chosen.shape)


def take_grouped(rows: Rows, chosen: Chosen, part: Callable[[Tensor, Tensor], Tensor], n_experts: int) -> Laid:
    """The same with all experts' products in one call, so that nothing waits to hear how many rows each has.

    `part` is one of `Bank`'s. For many tokens, where `grouped_pays`. Source: MegaBlocks (arXiv 2211.15841, section 2).
    """
    by_expert, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(n_experts, device=chosen.device), right=True).int()
    return Laid(part(in_turn(rows, order, chosen.shape[-1]), ends), order, chosen.shape)


def take_one_by_one(rows: Rows, chosen: Chosen, experts: Sequence[Part]) -> Laid:
    """Take each row to its expert in turn. For a few tokens: nothing is sorted."""
    each = rows.expand(*chosen.shape, -1).reshape(chosen.numel(), -1).split(1)
    answers = [experts[expert](row) for expert, row in zip(chosen.flatten().tolist(), each, strict=True)]
    return Laid(torch.cat(answers), None, chosen.shape)


def in_turn(rows: Rows, order: Int[Tensor, " turn"], n_choices: int) -> Float[Tensor, "turn features_in"]:
    """The row of each choice in an order, where choices are counted through the text."""
    if rows.shape[2] != n_choices:  # one for all choices of a token
        order = order // n_choices
    return rows.flatten(0, 2).index_select(0, order)


DISPATCH = {
    "every": take_every,
    "sorted": take_sorted,
    "grouped": take_sorted,  # unless there is a bank that fits
    "one_by_one": take_one_by_one,
}
