"""Experts that do not all fit: how often a cache of a few per layer holds the one that is asked for.

Everything is replayed from recorded choices, so a cache can be tried out before its runtime is. The caches are those of
`expert_cache`, and a model loaded with `experts="offload"` keeps its experts by the same, so it sees the same hits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from tqdm import tqdm

from mixtral_lab.analysis.routing import AnalysisError
from mixtral_lab.config import Config
from mixtral_lab.expert_cache import LFU, LRU
from mixtral_lab.model import Transformer

if TYPE_CHECKING:
    import pandas as pd

Chosen = Integer[Tensor, "layer seq choice"]
Guesses = Int[np.ndarray, "*layer_seq guess"]  # `layer seq guess`; -1: no guess

NO_GUESS = -1


class Replay(NamedTuple):
    """What one kind of cache did over a text, for every layer. `asked - hits` are the misses."""

    asked: Int[np.ndarray, " layer"]  # experts that were needed
    hits: Int[np.ndarray, " layer"]  # of these, in the cache or fetched ahead
    ahead: Int[np.ndarray, " layer"]  # of the hits, those that only a right guess brought
    loads: Int[
        np.ndarray, " layer"
    ]  # experts copied: one for every miss, one for every guess that was not in the cache


def replay(
    experts: Chosen,
    capacity: int,
    policy: type[LRU] = LRU,
    guesses: Guesses | None = None,
    n_prompt: int = 1,
) -> Replay:
    """Run the recorded choices through an empty cache of `capacity` experts per layer, in the order of decoding.

    A token goes through the layers in turn and asks each for its chosen experts. The first `n_prompt` tokens are
    read in one step, as a runtime reads a prompt: each layer is asked once for each expert that any of them chose.
    `guesses` are fetched one layer ahead; a right one counts as a hit, as if copying it took no longer than the
    layer before; none are used for the prompt. Since every layer has its own cache, the layers are replayed one
    after the other. The first use of every expert is a miss.

    If experts were drawn at random, c of E in the cache would give hits of c / E. Source: Fast Inference of
    Mixture-of-Experts Language Models with Offloading (arXiv 2312.17238, section 3 and Figure 2).
    Raises `AnalysisError` for an impossible capacity or prompt, or guesses for other tokens.
    """
    layers, seq, _ = experts.shape
    if not 1 <= n_prompt <= seq:
        raise AnalysisError(f"The prompt cannot have {n_prompt} of {seq} tokens: it has at least one.")
    if guesses is not None and guesses.shape[:2] != (layers, seq):
        raise AnalysisError(
            f"There are guesses for {guesses.shape[0]} layers of {guesses.shape[1]} tokens, but choices for {layers} of {seq}."
        )
    counts = np.zeros((4, layers), dtype=np.int64)
    for layer, chosen in enumerate(experts.tolist()):
        cache = policy(capacity)
        prompt = sorted({expert for token in chosen[:n_prompt] for expert in token})
        guessed = [()] * seq if guesses is None else guesses[layer].tolist()
        for step, asked in enumerate([prompt, *chosen[n_prompt:]]):
            ahead = [] if step == 0 else cache.stage(e for e in guessed[n_prompt - 1 + step] if e != NO_GUESS)
            found = cache.use(asked)
            n_hits = len(found.resident) + len(found.staged)
            counts[:, layer] += (
                n_hits + len(found.missing),
                n_hits,
                len(found.staged),
                len(found.missing) + len(ahead),
            )
    return Replay(*counts)


def expert_bytes(config: Config, bytes_per_number: float = 2) -> int:
    """Bytes of one expert: its `gate`, `up` and `down`. Mixtral 8x7B in bfloat16: 352 million.

    `bytes_per_number` is 4 for float32, 2 for bfloat16, about 0.5 for 4-bit weights. Raises `AnalysisError` for a
    dense model.
    """
    if config.n_experts is None:
        raise AnalysisError("A dense model has no experts to keep in a cache.")
    return round(config.expert_parameters * bytes_per_number)


def offload_frame(
    experts: Chosen,
    n_experts: int,
    bytes_per_expert: int,
    guesses: Mapping[str, Guesses] | None = None,
    n_prompt: int = 1,
) -> pd.DataFrame:
    """Every cache from 1 to all experts per layer, under every policy: a tidy table of `replay`.

    The policies are "LRU", "LFU" and, for each of the named `guesses`, "LRU + name". One row per (policy, capacity,
    layer); columns: policy, capacity, layer, tokens, asked, hits, ahead, misses, loads, bytes (moved). Counts of
    several texts may be summed. Raises `AnalysisError` as `replay` does.
    """
    import pandas as pd

    policies: dict[str, tuple[type[LRU], Guesses | None]] = {"LRU": (LRU, None), "LFU": (LFU, None)}
    policies |= {f"LRU + {name}": (LRU, guess) for name, guess in (guesses or {}).items()}
    runs = [(name, capacity) for name in policies for capacity in range(1, n_experts + 1)]
    parts = []
    for name, capacity in tqdm(runs, desc="replaying caches", delay=2, leave=False):
        policy, guess = policies[name]
        done = replay(experts, capacity, policy, guess, n_prompt)
        parts.append(
            pd.DataFrame(
                {
                    "policy": name,
                    "capacity": capacity,
                    "layer": np.arange(len(done.asked)),
                    "tokens": experts.shape[1],
                    "asked": done.asked,
                    "hits": done.hits,
                    "ahead": done.ahead,
                    "misses": done.asked - done.hits,
                    "loads": done.loads,
                    "bytes": done.loads * bytes_per_expert,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def guesses_from_transitions(experts: Chosen, n_experts: int, n_guesses: int) -> Guesses:
    """For every token and layer, the experts to expect from what the layer before chose; -1 where nothing is known.

    An expert's score is the sum, over the chosen experts of the layer before, of the share of that expert's earlier
    tokens that went on to it. Only earlier tokens of the same text count, so nothing is known beforehand, and of
    layer 0 nothing ever. The measure is ours: it needs no model, only choices. Raises `AnalysisError` for a
    number of guesses below 1.
    """
    _check_guesses(n_guesses)
    layers, seq, _ = experts.shape
    chosen = experts.cpu().numpy()
    guesses = np.full((layers, seq, n_guesses), NO_GUESS, dtype=np.int64)
    for layer in range(1, layers):
        went_on = np.zeros((n_experts, n_experts))
        seen = np.zeros(n_experts)
        for token in range(seq):
            here, there = chosen[layer - 1, token], chosen[layer, token]
            scores = (went_on[here] / np.maximum(seen[here], 1)[:, None]).sum(0)
            best = np.argsort(-scores, kind="stable")[:n_guesses]
            guesses[layer, token, : len(best)] = np.where(scores[best] > 0, best, NO_GUESS)
            seen[here] += 1
            went_on[np.ix_(here, there)] += 1
    return guesses


@torch.inference_mode()
def guesses_from_router(model: Transformer, streams: Float[Tensor, "layer seq dim"], n_guesses: int) -> Guesses:
    """For every token and layer, what this layer's router would choose if the layer before added nothing more.

    `streams` is what a trace recorded at `layers.*.residual.between`. The router of layer l reads the stream that
    layer l - 1's experts read, through that layer's norm, so the guess is ready before those experts have run;
    layer 0 has no guess (-1). Source: arXiv 2312.17238, section 3 (speculative expert loading: the next layer's gate
    on the hidden state that this layer's gate used). Raises `AnalysisError` for a dense model or a stream that is
    not this model's.
    """
    _check_guesses(n_guesses)
    layers, seq, dim = streams.shape
    if (layers, dim) != (model.config.n_layers, model.config.dim):
        raise AnalysisError(
            f"The stream has {layers} layers of {dim} numbers, the model {model.config.n_layers} of {model.config.dim}."
        )
    guesses = np.full((layers, seq, n_guesses), NO_GUESS, dtype=np.int64)
    for layer in range(1, layers):
        before, router = model.blocks[layer - 1], model.blocks[layer].router
        if router is None:
            raise AnalysisError("A dense model has no router to guess with.")
        weight = router.score.weight
        scores = router.score(before.ffn_norm(streams[layer - 1, None].to(weight.device, weight.dtype)))[0]
        best = scores.topk(min(n_guesses, scores.shape[-1]), dim=-1).indices
        guesses[layer, :, : best.shape[-1]] = best.cpu().numpy()
    return guesses


def guess_recall(experts: Chosen, guesses: Guesses) -> Float[np.ndarray, " layer"]:
    """The share of chosen experts that had been guessed; `nan` for a layer without any guess.

    g guesses drawn at random from E experts would find g / E of them. Source: arXiv 2312.17238, Figure 2 (right).
    """
    right = (experts.cpu().numpy()[..., None] == guesses[:, :, None, :]).any(-1).mean((1, 2))
    return np.where((guesses != NO_GUESS).any((1, 2)), right, np.nan)


def _check_guesses(n_guesses: int) -> None:
    if n_guesses < 1:
        raise AnalysisError(f"{n_guesses} guesses fetch nothing: ask for 1 or more.")
