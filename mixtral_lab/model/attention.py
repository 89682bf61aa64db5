"""Who looks at whom: grouped-query attention, the sliding window, and the rolling cache.

Axes: a text's `seq` is called `query` where it looks and `key` where it is looked at. Query heads stand as
`(kv group)`, kv outermost: `group` query heads share one key/value head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixtral_lab.config import LabError
from mixtral_lab.model.bands import Keys, Query, attend_banded
from mixtral_lab.model.linear import Linear, fed_alike, row_fed_alike, settled
from mixtral_lab.model.module import Module, as_made
from mixtral_lab.model.rope import Rotation, rotate
from mixtral_lab.model.site import Site, asked

Ring = Float[Tensor, "batch kv ring head_dim"]
NewKeys = Float[Tensor, "batch kv seq head_dim"]
Pattern = Float[Tensor, "batch kv group query key"]
Mask = Bool[Tensor, "#batch query key"]


def visible(query: Int[Tensor, "#batch query"], key: Int[Tensor, "#batch key"], window: int | None) -> Mask:
    """Which keys each query may see, from absolute positions: `0 <= key <= query` and `query - key < window`.

    A query sees `window` keys, itself included: with a window of 3, position 5 sees 3, 4 and 5. Positions below
    0 are padding, which no text sees. (Padding looks at itself alone, so that its softmax has something to sum.)
    Source: Mistral 7B (arXiv 2310.06825, section 2); counted as transformers counts.
    """
    q, k = rearrange(query, "batch query -> batch query 1"), rearrange(key, "batch key -> batch 1 key")
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= q - k < window
    return seen | ((q < 0) & (q == k))


def attention_scores(query: Query, key: Keys) -> Pattern:
    """How well each query matches each key: their dot product, over the square root of `head_dim`.

    The keys are not copied to match the query heads: `group` is an axis that they simply lack.
    Source: grouped-query attention (arXiv 2305.13245).
    """
    scores = einsum(query, key, "batch kv group query head_dim, batch kv key head_dim -> batch kv group query key")
    return scores * query.shape[-1] ** -0.5


def attention_pattern(scores: Pattern, mask: Mask | None) -> Pattern:
    """How each query shares its attention among the keys that it may see; rows sum to 1."""
    if mask is not None:
        hidden = ~rearrange(mask, "batch query key -> batch 1 1 query key")
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


def attended(pattern: Pattern, value: Keys) -> Query:
    """For every query, the values weighed by its pattern."""
    return einsum(pattern, value, "batch kv group query key, batch kv key head_dim -> batch kv group query head_dim")


def attend_plain(query: Query, key: Keys, value: Keys, mask: Mask | None) -> Query:
    """What attention is."""
    return attended(attention_pattern(attention_scores(query, key), mask), value)


def attend_masked(query: Query, key: Keys, value: Keys, mask: Mask) -> Query:
    """The same by PyTorch's own kernel, which never holds the whole pattern in memory."""
    group = query.shape[2]
    out = F.scaled_dot_product_attention(
        rearrange(query, "batch kv group query head_dim -> batch (kv group) query head_dim"),
        key,
        value,
        attn_mask=rearrange(mask, "batch query key -> batch 1 query key"),
        enable_gqa=group > 1,
    )
    return rearrange(out, "batch (kv group) query head_dim -> batch kv group query head_dim", group=group)


def attend_one(query: Query, key: Keys, value: Keys) -> Query:
    """The same for a single query that sees every key: the heads of a group are rows that look at the same keys."""
    return F.scaled_dot_product_attention(query.squeeze(3), key, value).unsqueeze(3)


def attend_step(query: Query, key: Keys, value: Keys, mask: Mask) -> Query:
    """The plain definition for a single query, its products written out as multiply and sum: compiled, a few loops."""
    query_scaled = settled(query.float() * query.shape[-1] ** -0.5)
    scores = settled((query_scaled * key.unsqueeze(2).float()).sum(-1))
    pattern = settled(F.softmax(scores.masked_fill(~mask.unsqueeze(1), -torch.inf), dim=-1))
    out = (rearrange(pattern, "batch kv group key -> batch kv group key 1") * value.unsqueeze(2).float()).sum(-2)
    return out.to(query.dtype).unsqueeze(3)


class RollingCache:
    """The keys and values that one layer still needs. Position `p` is kept in slot `p % ring`.

    With a window, `ring` is never more than the window, whatever the length of the text: a new key takes the slot
    of the one that has just left every query's sight. `seen` counts the columns fed so far. Rows of a batch
    that are shorter than the longest are padded on the left, so that all rows share their columns and slots.
    Source: Mistral 7B (arXiv 2310.06825, section 2, Figure 2).
    """

    def __init__(self, keys: Ring, values: Ring, limit: int | None = None) -> None:
        """`limit` is how many columns may be fed (None: any number), where the ring is shorter than what queries see."""
        self.keys, self.values, self.limit = keys, values, limit
        self.seen = 0

    @property
    def ring(self) -> int:
        return self.keys.shape[2]

    @property
    def filled(self) -> int:
        """How many slots hold something."""
        return min(self.seen, self.ring)

    def check_room(self, new: int) -> None:
        """Raise `LabError` if so many columns more would overwrite what is still looked at."""
        if self.limit is not None and self.seen + new > self.limit:
            raise LabError(
                f"This cache was made for {self.limit} tokens, and {self.seen + new} were to be fed: make a longer one, "
                "model.new_cache(batch, length)."
            )

    def columns(self, new: int) -> Int[Tensor, " key"]:
        """The column of every key that `extend` returns in order when `new` columns are fed."""
        last = self.seen + new
        first = last - min(last, self.ring) if new == 1 else self.seen - self.filled
        return torch.arange(first, last, device=self.keys.device)

    def extend(self, key: NewKeys, value: NewKeys, in_order: bool = True) -> tuple[Keys, Keys]:
        """Keep new keys and values; return all that the new queries may have to look at, the oldest first.

        A single new key overwrites the oldest at once; then `in_order=False` gives the ring as it lies, without a
        copy. A chunk must not overwrite yet: its first queries still see what its last keys will replace, so it looks
        at the old ring and itself side by side. Source: Mistral 7B (section 2, Figure 3: chunked pre-fill).
        """
        self.check_room(key.shape[2])
        if key.shape[2] == 1:
            self._write(key, value)
            if in_order:
                return torch.cat(self._in_order(self.keys), dim=2), torch.cat(self._in_order(self.values), dim=2)
            if self.seen >= self.ring:
                return self.keys, self.values
            return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]
        if not self.seen:
            self._write(key, value)
            return key, value
        looked_at = (
            torch.cat((*self._in_order(self.keys), key), dim=2),
            torch.cat((*self._in_order(self.values), value), dim=2),
        )
        self._write(key, value)
        return looked_at

    def add(
        self, key: Float[Tensor, "kv head_dim"], value: Float[Tensor, "kv head_dim"]
    ) -> tuple[Float[Tensor, "1 kv key head_dim"], Float[Tensor, "1 kv key head_dim"]]:
        """`extend` by one token of one text: the ring as it lies."""
        self.check_room(1)
        slot = self.seen % self.ring
        self.keys.select(2, slot).copy_(key)
        self.values.select(2, slot).copy_(value)
        self.seen += 1
        if self.seen >= self.ring:
            return self.keys, self.values
        return self.keys.narrow(2, 0, self.seen), self.values.narrow(2, 0, self.seen)

    def _in_order(self, store: Ring) -> tuple[Keys, ...]:
        """The filled slots, the oldest first, in one piece or two. With a ring of 4 and 6 columns seen, slots hold
        columns 4, 5, 2, 3.
        """
        oldest = self.seen % self.ring
        if self.seen <= self.ring or not oldest:
            return (store[:, :, : self.filled],)
        return store[:, :, oldest:], store[:, :, :oldest]

    def _write(self, key: NewKeys, value: NewKeys) -> None:
        new = key.shape[2]
        if new == 1:
            slot = self.seen % self.ring
            self.keys.narrow(2, slot, 1).copy_(key)
            self.values.narrow(2, slot, 1).copy_(value)
            self.seen += 1
            return
        kept = min(new, self.ring)  # of a chunk longer than the ring, only the end is ever seen again
        start = (self.seen + new - kept) % self.ring
        head = min(kept, self.ring - start)
        for store, part in ((self.keys, key), (self.values, value)):
            part = part[:, :, new - kept :]
            store[:, :, start : start + head] = part[:, :, :head]
            if head < kept:
                store[:, :, : kept - head] = part[:, :, head:]
        self.seen += new


class FixedCache(RollingCache):
    """One step of a rolling cache in which no shape and no number changes, so that it compiles once for all steps.

    `seen` is a tensor. `extend` gives the whole ring as it lies, and `columns` says what lies where: what was not filled
    yet has a column below 0, which no text sees.
    """

    def __init__(self, keys: Ring, values: Ring, seen: Int[Tensor, ""]) -> None:
        self.keys, self.values, self.limit = keys, values, None
        self.seen = seen  # type: ignore[assignment]

    def columns(self, new: int) -> Int[Tensor, " key"]:
        """The column in each slot once this step's is fed."""
        slots = torch.arange(self.ring, device=self.keys.device)
        return self.seen - (self.seen - slots) % self.ring

    def extend(self, key: NewKeys, value: NewKeys, in_order: bool = False) -> tuple[Keys, Keys]:
        """Keep one new key and value; return the whole ring."""
        slot = torch.as_tensor(self.seen % self.ring)[None]
        return self.keys.index_copy_(2, slot, key), self.values.index_copy_(2, slot, value)


def in_heads(x: Float[Tensor, "batch seq features"], kv: int, head_dim: int) -> Query:
    """Numbers side by side as the heads that they are. A single token's stand in this order already."""
    if x.shape[1] == 1:
        return x.reshape(x.shape[0], kv, -1, 1, head_dim)
    return rearrange(x, "batch seq (kv group head_dim) -> batch kv group seq head_dim", kv=kv, head_dim=head_dim)


def side_by_side(heads: Query) -> Float[Tensor, "batch seq features"]:
    """The way back."""
    if heads.shape[3] == 1:
        return heads.reshape(heads.shape[0], 1, -1)
    return rearrange(heads, "batch kv group seq head_dim -> batch seq (kv group head_dim)")


class Heads(Module):
    """The sites at which attention's heads are seen one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = Site(), Site(), Site(), Site()


class Attention(Module):
    """Grouped-query attention with rotary positions and a window. `plain` switches to the plain definition."""

    FED_ALIKE = ("query", "key", "value")

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, window: int | None) -> None:
        super().__init__()
        self.query = Linear(dim, n_heads * head_dim)
        self.key = Linear(dim, n_kv_heads * head_dim)
        self.value = Linear(dim, n_kv_heads * head_dim)
        self.output = Linear(n_heads * head_dim, dim)
        self.heads = Heads()
        self.scores, self.pattern = Site(), Site()
        self.n_kv_heads, self.head_dim, self.window = n_kv_heads, head_dim, window
        self.plain = False

    @property
    def explicit(self) -> bool:
        """Whether scores and pattern are computed as such: by choice, or because somebody looks at them."""
        return self.plain or asked(self.scores) or asked(self.pattern)

    @property
    def ordinary(self) -> bool:
        """Whether `row` computes what `forward` does: nothing in here was replaced, and nobody asked for the definition."""
        heads = self.heads
        return (
            not self.plain
            and all(as_made(site, Site) for site in (heads.query, heads.key, heads.value, heads.out))
            and as_made(self.scores, Site)
            and as_made(self.pattern, Site)
            and as_made(self.query, Linear)
            and as_made(self.key, Linear)
            and as_made(self.value, Linear)
            and as_made(self.output, Linear)
        )

    def row(
        self, x: Float[Tensor, " dim"], turn: Float[Tensor, "head_dim head_dim"], cache: RollingCache
    ) -> Float[Tensor, " dim"]:
        """The same for one token of one text. `turn` is `turn_at` its position."""
        kv, head_dim = self.n_kv_heads, self.head_dim
        query, key, value = row_fed_alike(x, self.query, self.key, self.value)
        heads = torch.cat((query, key)).view(-1, head_dim) @ turn
        keys, values = cache.add(heads[-kv:], value.view(kv, head_dim))
        query = heads[:-kv].view(1, kv, -1, head_dim)  # the heads of a group are rows that look at the same keys
        if query.dtype != keys.dtype:
            query = query.to(keys.dtype)
        out = F.scaled_dot_product_attention(query, keys, values)
        return self.output.row(out.view(-1).float())

    def forward(
        self, x: Float[Tensor, "batch seq dim"], turn: Rotation, mask: Mask | None, cache: RollingCache | None
    ) -> Float[Tensor, "batch seq dim"]:
        """`mask` is needed where the texts of a batch differ in length, and by the plain definition."""
        kv, head_dim = self.n_kv_heads, self.head_dim
        query, key, value = (in_heads(made, kv, head_dim) for made in fed_alike(x, self.query, self.key, self.value))
        turned = rotate(torch.cat((query, key), dim=2), turn)  # keys turn as the queries of their group do
        query, key = turned.split((query.shape[2], 1), dim=2)
        query, key, value = self.heads.query(query), self.heads.key(key.squeeze(2)), self.heads.value(value.squeeze(2))
        explicit = self.explicit
        if cache is not None:
            key, value = cache.extend(key, value, in_order=explicit or mask is not None)
        if explicit:
            scores = self.scores(attention_scores(query, key))
            out = attended(self.pattern(attention_pattern(scores, mask)), value)
        elif isinstance(cache, FixedCache) and mask is not None:
            out = attend_step(query, key, value, mask)
        elif mask is not None:
            out = attend_masked(query, key, value, mask)
        elif query.shape[3] == 1:
            out = attend_one(query, key, value)
        else:
            out = attend_banded(query, key, value, self.window)
        return self.output(side_by_side(self.heads.out(out)))
