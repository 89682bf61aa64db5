"""Attention in bands: each tile of queries looks only at the keys that it can see.

The plain definition (`attend_plain` and `visible` in `attention.py`) scores every query against every key, then
hides most of what it computed. Here the columns of a text are cut into tiles. A tile of queries needs one band of
keys, from the tile in which its first query's window begins to itself; only the two ends of the band hide
anything. With a window of 4 and tiles of 2 (`#` seen, `-` hidden, blank never touched):

    keys     0 1   2 3   4 5   6 7   8 9
    query 6        - #   # #   # -
    query 7        - -   # #   # #
    query 8              - #   # #   # -
    query 9              - -   # #   # #

Source: Mistral 7B (arXiv 2310.06825, section 2) for the window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mixtral_lab.model.linear import amd, linear, tuned, wide

Query = Float[Tensor, "batch kv group query head_dim"]
Keys = Float[Tensor, "batch kv key head_dim"]

TILE = 64  # columns; on a CPU larger tiles leave the processor's cache (mini-mixtral reads 512 tokens in 0.87 of the time of 128)
HEAD_TILE = 128  # columns, where each kv head has its turn: its products are large enough only then
KERNEL_TILE = 256  # columns, where PyTorch's kernel looks: it cuts them again
GPU_TILE = 1024  # columns; a GPU wants few, large pieces
# Pairs of a query and a key, in each head: fewer are done by PyTorch's kernel, in one call, before our few have started.
FEW = {torch.float32: 2**16, torch.bfloat16: 2**13}
# Bytes of scores that all heads may hold at once. In float32 a head's product is soon worth a call of its own, for
# `linear` is faster than `bmm`. In bfloat16 it is not, until the scores leave the cache and fresh memory is asked for.
AT_ONCE = {torch.float32: 2**21, torch.bfloat16: 2**24}


class Band(NamedTuple):
    """Queries `start` up to `stop` look at keys `first` up to `last`, each counted from the first one given."""

    start: int
    stop: int
    first: int
    last: int


def bands(queries: int, keys: int, window: int | None, tile: int) -> list[Band]:
    """The band of every tile of queries, when the queries are the last of the keys' columns.

    Queries and keys are cut at the same multiples of `tile`, counted in keys: texts of any length then meet the
    same few shapes, and oneDNN, which compiles a kernel for every shape, has few to compile. With 5 queries, 9
    keys, a window of 3 and tiles of 4: queries 0 to 3 (columns 4 to 7) look at keys 0 to 7, query 4 at keys 4 to 8.
    """
    past, stop, cut = keys - queries, 0, []
    while stop < queries:
        start, column = stop, past + stop
        stop = min(queries, start + tile - column % tile)
        oldest = 0 if window is None else max(0, column - window + 1)
        cut.append(Band(start, stop, oldest - oldest % tile, past + stop))
    return cut


class Ends(NamedTuple):
    """What is added to the scores at the ends of a band: 0 where a query sees, minus infinity where it does not."""

    left: Float[Tensor, "query left"]
    right: Float[Tensor, "query query"]


def ends(band: Band, window: int | None, like: Tensor) -> Ends:
    """On the right, keys after the query; on the left, keys that have left its window. In the dtype of `like`."""
    size, width = band.stop - band.start, band.last - band.first
    leaving = 0 if window is None else max(0, width - window)  # keys that the last query no longer sees
    left = like.new_full((size, leaving), -torch.inf).tril(leaving - size)
    return Ends(left, like.new_full((size, size), -torch.inf).triu(1))


def hide(scores: Float[Tensor, "*heads query key"], unseen: Ends) -> None:
    """Add the ends in place; all that lies between them is seen by every query of the tile."""
    scores[..., : unseen.left.shape[1]].add_(unseen.left)
    scores[..., scores.shape[-1] - unseen.right.shape[1] :].add_(unseen.right)


def together(query: Query, key: Keys, value: Keys, unseen: Ends) -> Query:
    """All heads in two batched products, the heads of a group as rows that look at the same keys.

    PyTorch's softmax computes in float32 within, and rounds once, also where it takes and gives bfloat16.
    """
    batch, kv, group, size, _ = query.shape
    rows = rearrange(
        query * query.shape[-1] ** -0.5, "batch kv group query head_dim -> (batch kv) (group query) head_dim"
    )
    scores = torch.bmm(rows, key.flatten(0, 1).mT)
    hide(scores.view(batch * kv, group, size, -1), unseen)
    out = torch.bmm(F.softmax(scores, dim=-1), value.flatten(0, 1))
    return out.view(query.shape)


def head_by_head(query: Query, key: Keys, value: Keys, unseen: Ends) -> Query:
    """The same for one kv head after the other: its scores stay in the cache, and `linear` knows the fast product.

    The second product is turned over, `out.T = value.T @ pattern.T`, since `linear` wants its second factor whole.
    """
    batch, _, group, size, head_dim = query.shape
    rows = rearrange(query * head_dim**-0.5, "batch kv group query head_dim -> (batch kv) (group query) head_dim")
    out = []
    for head_rows, head_key, head_value in zip(rows, key.flatten(0, 1), value.flatten(0, 1), strict=True):
        scores = linear(head_rows, head_key)
        hide(scores.view(group, size, -1), unseen)
        out.append(linear(head_value.mT, F.softmax(scores, dim=-1)))
    return rearrange(
        torch.stack(out),
        "(batch kv) head_dim (group query) -> batch kv group query head_dim",
        batch=batch,
        group=group,
    )


def by_kernel(query: Query, key: Keys, value: Keys, unseen: Ends) -> Query:
    """The same by PyTorch's own kernel, with the ends written into a mask of one tile by one band."""
    mask = query.new_zeros(query.shape[3], key.shape[2])
    hide(mask, unseen)
    out = F.scaled_dot_product_attention(
        rearrange(query, "batch kv group query head_dim -> batch kv (group query) head_dim"),
        key,
        value,
        attn_mask=repeat(mask, "query key -> (group query) key", group=query.shape[2]),
    )
    return out.view(query.shape)


def attend_causal(query: Query, key: Keys, value: Keys) -> Query:
    """One text that looks back at all of itself, by PyTorch's own kernel in one call."""
    group = query.shape[2]
    out = F.scaled_dot_product_attention(
        rearrange(query, "batch kv group query head_dim -> batch (kv group) query head_dim"),
        key,
        value,
        is_causal=True,
        enable_gqa=group > 1,
    )
    return rearrange(out, "batch (kv group) query head_dim -> batch kv group query head_dim", group=group)


def products_pay(query: Query, key: Keys, value: Keys) -> bool:
    """Whether two products and a softmax beat PyTorch's kernel: on an AMD processor, without gradients, unless there is
    little to do; in float32 from Zen 5 on.

    There the kernel takes as long in bfloat16 as in float32, and in float32 it misses the faster product of `linear`, which on
    Zen 4 is not so much faster: there mini-mixtral reads 2,048 tokens by the kernel in 0.84 of the time, 8,192 with a window in
    0.88. Where gradients are wanted it need not keep the pattern. On a GPU it is the best there is, and on one of Intel's
    processors (2 cores of a Xeon, 2,048 tokens of mini-mixtral's shape) it needs half of the time in float32 and a third in
    bfloat16.
    """
    gradients = any(part.requires_grad for part in (query, key, value))
    enough = query.shape[3] * key.shape[2] >= FEW.get(query.dtype, 2**16)
    quick = amd() if query.dtype != torch.float32 else wide() and tuned()
    return query.device.type == "cpu" and quick and enough and not gradients


def fit_at_once(query: Query, cut: list[Band]) -> bool:
    """Whether all heads may look at the largest band in one go, or each kv head should have its turn (`AT_ONCE`)."""
    batch, kv, group, _, _ = query.shape
    largest = max((band.stop - band.start) * (band.last - band.first) for band in cut)
    return batch * kv * group * largest * query.element_size() <= AT_ONCE.get(query.dtype, 2**21)


def attend_banded(query: Query, key: Keys, value: Keys, window: int | None, tile: int | None = None) -> Query:
    """Attention where the queries are the last of the keys' columns, and columns stand in order of position.

    The same as `attend_plain` with the mask of `visible`: a query sees itself and what came before, `window` keys
    in all (None: everything). A fresh text has as many queries as keys; a chunk that follows a cache has fewer,
    and its keys are those of the cache, oldest first, then its own. `tile` is counted in columns; None takes what
    is fast on this device. Rows of a batch that are padded on the left see different columns: they need a mask.

    Memory: on a CPU no more scores at a time than 16 MiB or, where one kv head has more, than those of its
    `group * tile` rows with `window + 2 * tile` keys; never a mask of more than one tile by one band.
    Raises ValueError if there are fewer keys than queries, or if the window is smaller than 1.
    """
    queries, keys = query.shape[3], key.shape[2]
    if keys < queries:
        raise ValueError(
            f"found {queries} queries but {keys} keys: the queries are the last of the keys' columns, so give their "
            "own keys too, after those of the cache"
        )
    if window is not None and window < 1:
        raise ValueError(f"found a window of {window}: a query sees at least itself, so give 1 or more, or None")
    ours = products_pay(query, key, value)
    if not ours and queries == keys and (window is None or keys <= window):
        return attend_causal(query, key, value)
    quick = TILE if ours else KERNEL_TILE if query.device.type == "cpu" else GPU_TILE
    cut = bands(queries, keys, window, tile or quick)
    look = by_kernel if not ours else together if fit_at_once(query, cut) else head_by_head
    if look is head_by_head and tile is None:
        cut = bands(queries, keys, window, HEAD_TILE)
    # Laid out once for all bands: `head_by_head` reads its values number by number, the others key by key.
    key, value = key.contiguous(), value.mT.contiguous().mT if look is head_by_head else value.contiguous()
    out = []
    for band in cut:
        part = look(
            query[:, :, :, band.start : band.stop],
            key[:, :, band.first : band.last],
            value[:, :, band.first : band.last],
            ends(band, window, query),
        )
        # In the order in which the output matrix reads it, so that nothing is copied twice.
        out.append(rearrange(part, "batch kv group query head_dim -> batch query kv group head_dim"))
    return rearrange(torch.cat(out, dim=1), "batch query kv group head_dim -> batch kv group query head_dim")
