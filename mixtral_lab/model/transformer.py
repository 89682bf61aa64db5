"""The whole model: a residual stream that attention and experts read from and add to, layer after layer."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtral_lab.config import Config, LabError
from mixtral_lab.model.attention import Attention, FixedCache, Mask, RollingCache, visible
from mixtral_lab.model.linear import Linear, linear, row, settled, single
from mixtral_lab.model.module import Embedding, Module, ModuleList, as_made, until_changed
from mixtral_lab.model.moe import Experts, Router, Routing, SwiGLU
from mixtral_lab.model.rope import Rotation, rotation, turn_at
from mixtral_lab.model.site import Site, free_of_hooks, watched

Cache = list[RollingCache]  # one for each layer
# Plus two factors and a number is one operation, where a product of the three would be two.
NOTHING = torch.zeros((), dtype=torch.float32, device="cpu")


class RMSNorm(Module):
    """Scale each token's vector to a root mean square of 1, then by a learned weight per dimension.

    Source: Root Mean Square Layer Normalization (arXiv 1910.07467).
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight

    def row(self, x: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """The same for one token, whose scale is one number."""
        scale = (x.dot(x).item() / x.shape[0] + self.eps) ** -0.5
        return torch.addcmul(NOTHING, x, self.weight, value=scale)


class Residual(Module):
    """The sites of the residual stream in one layer: before attention, between it and the experts, after them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.after = Site(), Site(), Site()


class Block(Module):
    """One layer: attention moves information between positions, the experts work on each position alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config.dim, config.n_heads, config.n_kv_heads, config.head_dim, config.window)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        if config.n_experts is None or config.n_choices is None:
            self.feed_forward = SwiGLU(config.dim, config.hidden)
            self.router = None
        else:
            self.router = Router(config.dim, config.n_experts, config.n_choices)
            self.experts = Experts(config.dim, config.hidden, config.n_experts)
        self.residual = Residual()

    def forward(
        self, x: Float[Tensor, "batch seq dim"], turn: Rotation, mask: Mask | None, cache: RollingCache | None
    ) -> Float[Tensor, "batch seq dim"]:
        x = self.residual.before(x)
        x = self.residual.between(x + self.attention(self.attention_norm(x), turn, mask, cache))
        normed = self.ffn_norm(x)
        if self.router is None:
            return self.residual.after(x + self.feed_forward(normed))
        return self.residual.after(x + self.experts(normed, self.router(normed)))

    @property
    @until_changed
    def ordinary(self) -> bool:
        """Whether `row` computes what `forward` does: nothing in here was replaced, and nobody asked for a definition."""
        stream = self.residual
        if not (as_made(stream.before, Site) and as_made(stream.between, Site) and as_made(stream.after, Site)):
            return False
        if not (as_made(self.attention_norm, RMSNorm) and as_made(self.ffn_norm, RMSNorm)):
            return False
        if not (as_made(self.attention, Attention) and self.attention.ordinary):
            return False
        if self.router is None:
            return as_made(self.feed_forward, SwiGLU) and self.feed_forward.ordinary
        experts = isinstance(self.experts, Experts) and self.experts.ordinary
        return experts and as_made(self.router, Router) and self.router.ordinary

    def row(
        self, x: Float[Tensor, " dim"], turn: Float[Tensor, "head_dim head_dim"], cache: RollingCache
    ) -> Float[Tensor, " dim"]:
        """The same for one token of one text. `turn` is `turn_at` its position."""
        x = x + self.attention.row(self.attention_norm.row(x), turn, cache)
        normed = self.ffn_norm.row(x)
        if self.router is None:
            return x + self.feed_forward.row(normed)
        routing = self.router.row(normed)
        mixed = self.experts.row(normed, routing) if as_made(self.experts, Experts) else None
        if mixed is None:  # experts of another kind know only the general way
            dtype = self.ffn_norm.weight.dtype
            weights, logits = routing.weights.to(dtype)[None, None], routing.logits.to(dtype)[None, None]
            own = Routing(logits, routing.experts[None, None], weights)
            mixed = self.experts(normed.to(dtype)[None, None], own)[0, 0].float()
        return x + mixed


@functools.cache
def keep_freed_memory() -> None:
    """Have this process keep what tensors give back, instead of asking the system for it anew in every layer.

    Linux's C library (glibc) keeps blocks up to the size of the largest that was ever given back, 32 MiB at most, and twice that
    in all. Before the first such block, reading 512 tokens with mini-mixtral met 10,000 fresh pages. The one here is
    given back untouched, so it takes no memory itself. Elsewhere nothing happens.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


class Transformer(Module):
    """Token ids in, a score for every possible next token out: Mistral if dense, Mixtral if it has experts."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        keep_freed_memory()
        self.config = config
        self.embed = Embedding(config.vocab, config.dim)
        self.layers = ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        self.unembed = None if config.tied else Linear(config.dim, config.vocab)
        self.logits = Site()

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        cache: Cache | None = None,
        padding: Int[Tensor, " batch"] | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "batch seq_out vocab"]:
        """Logits for the token after each position (`last_only`: after the last one, `seq_out` = 1).

        `cache` holds what earlier calls fed; this call goes on from there. `padding` says how many ids at the left
        of each row only fill it up; give the same in every call that shares a cache.
        """
        if padding is None and cache is not None and self.alone(ids, cache):
            return self._row(ids, cache)
        turn, mask = self._where(ids, cache, padding)
        x = self.embed(ids)
        for i, block in enumerate(self.layers):
            x = block(x, turn, mask, None if cache is None else cache[i])
        whole = not last_only or watched(self.final_norm) or watched(self.logits)  # somebody wants to see them all
        x = self.final_norm(x if whole else x[:, -1:])
        logits = self.logits(linear(x, self.embed.weight) if self.unembed is None else self.unembed(x))
        return logits[:, -1:] if last_only else logits

    def alone(self, ids: Int[Tensor, "batch seq"], cache: Cache) -> bool:
        """Whether a token is so alone that its way is `row`: on a CPU, and nobody watches, trains, compiles or has replaced a
        part.
        """
        return (
            ids.numel() == 1
            and single(ids)
            and self.ordinary
            and free_of_hooks(self)
            and self.embed.weight.dtype in (torch.float32, torch.bfloat16)
            and type(cache[0]) is RollingCache
            and len(cache) == len(self.layers)
        )

    @property
    @until_changed
    def ordinary(self) -> bool:
        """Whether `_row` computes what `forward` does: nothing in here was replaced, and nobody asked for a definition."""
        return (
            as_made(self.logits, Site)
            and as_made(self.embed, Embedding)
            and as_made(self.final_norm, RMSNorm)
            and (self.unembed is None or as_made(self.unembed, Linear))
            and all(as_made(block, Block) and block.ordinary for block in self.layers)
        )

    def _row(self, ids: Int[Tensor, "1 1"], cache: Cache) -> Float[Tensor, "1 1 vocab"]:
        """`forward` for one token of one text: a vector in float32 that every layer adds to.

        Starting an operation takes longer than what it does with a vector: mini-mixtral writes in half of the time (README.md).
        """
        turn = turn_at(cache[0].seen, self.config.head_dim, self.config.rope_theta)
        x = self.embed.weight.index_select(0, ids.view(-1)).view(-1).float()
        for block, own in zip(self.blocks, cache, strict=True):
            x = block.row(x, turn, own)
        x = self.final_norm.row(x)
        logits = row(x, self.embed.weight) if self.unembed is None else self.unembed.row(x)
        return logits.to(self.embed.weight.dtype).view(1, 1, -1)

    @property
    def window(self) -> int | None:
        """How many keys a query sees, itself included: what all layers' `attention.window` say. (None: all.)

        Raises `LabError` if they differ: masks and caches are made once, for all layers.
        """
        found = {attention.window for attention in self.attentions}
        if len(found) > 1:
            raise LabError(
                f"The layers have windows of {sorted(map(str, found))}: set attention.window alike in all of them."
            )
        return found.pop() if found else self.config.window

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their own type."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def attentions(self) -> list[Attention]:
        """Attention of each layer, by its own type, where nobody has put something else in its place."""
        return [block.attention for block in self.blocks if isinstance(block.attention, Attention)]

    def new_cache(self, batch: int, length: int) -> Cache:
        """Empty caches for texts of up to `length` tokens; a window keeps them smaller than that."""
        config, weight = self.config, self.embed.weight
        window = self.window
        shape = (batch, config.n_kv_heads, min(length, window or length), config.head_dim)
        limit = None if window is not None and length >= window else length

        def store() -> Tensor:
            return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

        return [RollingCache(store(), store(), limit) for _ in self.layers]

    def _where(self, ids: Tensor, cache: Cache | None, padding: Tensor | None) -> tuple[Rotation, Mask | None]:
        """Everything that depends on positions alone, once for all layers: rotations, and who sees whom.

        Rows that begin together need no mask: a single new token sees all that the cache holds, and `attend_banded`
        knows the window.
        """
        config, new = self.config, ids.shape[1]
        seen = cache[0].seen if cache else 0
        columns = (seen + torch.arange(new, device=ids.device))[None]
        positions = columns if padding is None else columns - padding[:, None]
        cos, sin = rotation(positions, config.head_dim, config.rope_theta)
        turn = settled(cos.to(self.embed.weight.dtype)), settled(sin.to(self.embed.weight.dtype))
        fixed = cache is not None and isinstance(cache[0], FixedCache)
        if padding is None and not fixed and (new == 1 or not any(attention.explicit for attention in self.attentions)):
            return turn, None
        key_columns = cache[0].columns(new)[None] if cache else columns
        key_positions = key_columns if padding is None else key_columns - padding[:, None]
        return turn, settled(visible(positions, key_positions, self.window))
