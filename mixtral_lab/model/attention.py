"""Who looks at whom: grouped-query attention, the sliding window, and the rolling cache.

Axes: a text's `seq` is called `query` where it looks and `key` where it is looked at. Query heads stand as
`(kv group)`, kv outermost: `group` query heads share one key/value head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixtral_lab.model.linear import Linear
from mixtral_lab.model.rope import Rotation, rotate

Query = Float[Tensor, "batch kv group query head_dim"]
Keys = Float[Tensor, "batch kv key head_dim"]
NewKeys = Float[Tensor, "batch kv seq head_dim"]
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


def attention_pattern(query: Query, key: Keys, mask: Mask | None) -> Float[Tensor, "batch kv group query key"]:
    """How each query shares its attention among the keys; rows sum to 1.

    The keys are not copied to match the query heads: `group` is an axis that they simply lack.
    Source: grouped-query attention (arXiv 2305.13245).
    """
    scores = einsum(query, key, "batch kv group query head_dim, batch kv key head_dim -> batch kv group query key")
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        hidden = ~rearrange(mask, "batch query key -> batch 1 1 query key")
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


def attend_plain(query: Query, key: Keys, value: Keys, mask: Mask | None) -> Query:
    """What attention is: for every query, the values weighed by its pattern."""
    pattern = attention_pattern(query, key, mask)
    return einsum(pattern, value, "batch kv group query key, batch kv key head_dim -> batch kv group query head_dim")


def attend_fused(query: Query, key: Keys, value: Keys, mask: Mask | None, causal: bool = False) -> Query:
    """The same by PyTorch's own kernel, which never holds the whole pattern in memory.

    `causal=True` stands for the mask of one text that looks back at all of itself.
    """
    if query.shape[3] == 1 and mask is None:  # the heads of a group are rows that look at the same keys
        return F.scaled_dot_product_attention(query.squeeze(3), key, value).unsqueeze(3)
    group = query.shape[2]
    out = F.scaled_dot_product_attention(
        rearrange(query, "batch kv group query head_dim -> batch (kv group) query head_dim"),
        key,
        value,
        attn_mask=None if mask is None else rearrange(mask, "batch query key -> batch 1 query key"),
        is_causal=causal,
        enable_gqa=group > 1,
    )
    return rearrange(out, "batch (kv group) query head_dim -> batch kv group query head_dim", group=group)


class RollingCache:
    """The keys and values that one layer still needs. Position `p` is kept in slot `p % ring`.

    With a window, `ring` is never more than the window, whatever the length of the text: a new key takes the slot
    of the one that has just left every query's sight. `seen` counts the columns fed so far. Rows of a batch
    that are shorter than the longest are padded on the left, so that all rows share their columns and slots.
    Source: Mistral 7B (arXiv 2310.06825, section 2, Figure 2).
    """

    def __init__(self, keys: Float[Tensor, "batch kv ring head_dim"], values: Float[Tensor, "batch kv ring head_dim"]):
        self.keys, self.values = keys, values
        self.seen = 0

    @property
    def ring(self) -> int:
        return self.keys.shape[2]

    def columns(self, new: int) -> Int[Tensor, " key"]:
        """The column of every key that `extend` returns when `new` columns are fed.

        With a ring of 4 and 6 columns seen, slots hold columns 4, 5, 2, 3.
        """
        if new == 1:
            return self._held(self.seen + 1)
        return torch.cat((self._held(self.seen), torch.arange(self.seen, self.seen + new, device=self.keys.device)))

    def extend(self, key: NewKeys, value: NewKeys) -> tuple[Keys, Keys]:
        """Keep new keys and values; return all that the new queries may have to look at.

        A single new key overwrites the oldest at once. A chunk must not: its first queries still see what its
        last keys will overwrite, so it looks at the old ring and itself side by side.
        Source: Mistral 7B (section 2, Figure 3: chunked pre-fill).
        """
        new = key.shape[2]
        if new > 1 and self.seen:
            filled = min(self.seen, self.ring)
            looked_at = (
                torch.cat((self.keys[:, :, :filled], key), dim=2),
                torch.cat((self.values[:, :, :filled], value), dim=2),
            )
            self._write(key, value)
            return looked_at
        self._write(key, value)
        if new > 1:
            return key, value
        filled = min(self.seen, self.ring)
        return self.keys[:, :, :filled], self.values[:, :, :filled]

    def _held(self, seen: int) -> Int[Tensor, " filled"]:
        """The column in each filled slot once `seen` columns were fed."""
        slots = torch.arange(min(seen, self.ring), device=self.keys.device)
        return seen - 1 - (seen - 1 - slots) % self.ring

    def _write(self, key: NewKeys, value: NewKeys) -> None:
        new = key.shape[2]
        kept = min(new, self.ring)  # of a chunk longer than the ring, only the end is ever seen again
        start = (self.seen + new - kept) % self.ring
        head = min(kept, self.ring - start)
        for store, part in ((self.keys, key), (self.values, value)):
            part = part[:, :, new - kept :]
            store[:, :, start : start + head] = part[:, :, :head]
            if head < kept:
                store[:, :, : kept - head] = part[:, :, head:]
        self.seen += new


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. `plain` switches to the plain definition."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.query = Linear(dim, n_heads * head_dim)
        self.key = Linear(dim, n_kv_heads * head_dim)
        self.value = Linear(dim, n_kv_heads * head_dim)
        self.output = Linear(n_heads * head_dim, dim)
        self.n_kv_heads, self.head_dim = n_kv_heads, head_dim
        self.plain = False

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        turn: Rotation,
        mask: Mask | None,
        causal: bool,
        cache: RollingCache | None,
    ) -> Float[Tensor, "batch seq dim"]:
        kv, head_dim = self.n_kv_heads, self.head_dim
        query = rearrange(
            self.query(x),
            "batch seq (kv group head_dim) -> batch kv group seq head_dim",
            kv=kv,
            head_dim=head_dim,
        )
        key = rearrange(self.key(x), "batch seq (kv head_dim) -> batch kv seq head_dim", kv=kv)
        value = rearrange(self.value(x), "batch seq (kv head_dim) -> batch kv seq head_dim", kv=kv)
        query, key = rotate(query, turn), rotate(key, turn)
        if cache is not None:
            key, value = cache.extend(key, value)
        if self.plain:
            out = attend_plain(query, key, value, mask)
        else:
            out = attend_fused(query, key, value, mask, causal)
        return self.output(rearrange(out, "batch kv group seq head_dim -> batch seq (kv group head_dim)"))
