"""The next-token loop: read the prompt (prefill), then write one token at a time (decode)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtral_lab.config import Config, LabError
from mixtral_lab.model import Transformer
from mixtral_lab.model.attention import FixedCache
from mixtral_lab.model.module import Likeness, Module
from mixtral_lab.model.moe import Experts
from mixtral_lab.model.site import free_of_hooks
from mixtral_lab.model.transformer import Cache

CHUNK = 2048  # a prompt is read in pieces of at most so many tokens, which bounds the memory of prefill
LEAST = 1024  # tokens that are read at once however short the window is: smaller pieces take longer
COLDEST = 1e-5  # below this temperature only the best token is left, and logits divided by it may not be finite


class PromptError(LabError, ValueError):
    """A prompt, or the ids it became, cannot be read by this model."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature=0` takes the most likely one (greedy).

    `top_k` keeps the k most likely tokens; `top_p` keeps the fewest tokens that together have at least this
    probability (nucleus sampling, arXiv 1904.09751). Row `b` of a batch draws with seed `seed + b`, so that a
    prompt alone and the same prompt first in a batch are continued alike. Raises `PromptError` for values that
    mean nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise PromptError(f"temperature is {self.temperature}: it must be 0 (greedy) or above.")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"top_p is {self.top_p}: it must be above 0 and at most 1.")
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k >= 1):
            raise PromptError(
                f"top_k is {self.top_k}: it must be a whole number of at least 1, or None for all tokens."
            )
        if self.seed is not None and not (_is_whole(self.seed) and -(2**63) <= self.seed < 2**63):
            raise PromptError(
                f"seed is {self.seed}: it must be a whole number of 64 bits, or None for another draw each time."
            )


def probabilities(logits: Float[Tensor, "batch vocab"], sampling: Sampling) -> Float[Tensor, "batch vocab"]:
    """The probability that each token is drawn with, after temperature, then `top_k`, then `top_p`."""
    logits = logits.float()
    if sampling.temperature < COLDEST:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    p = (logits / sampling.temperature).softmax(-1)
    if sampling.top_k is not None and sampling.top_k < p.shape[-1]:
        best = p.topk(sampling.top_k, dim=-1)
        p = torch.zeros_like(p).scatter(-1, best.indices, best.values)
        p = p / p.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        ordered, ids = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # what the tokens ahead of this one already hold
        outside = (before >= sampling.top_p) & (before > 0)  # the best token stays, however small top_p is
        p = torch.zeros_like(p).scatter(-1, ids, ordered.masked_fill(outside, 0.0))
    return p / p.sum(-1, keepdim=True)


def pick(
    logits: Float[Tensor, "batch vocab"], sampling: Sampling, generators: Sequence[torch.Generator]
) -> Int[Tensor, " batch"]:
    """Draw one token for every row. Raises `PromptError` where the scores are no numbers."""
    if sampling.temperature < COLDEST:
        return logits.argmax(-1)
    p = probabilities(logits, sampling)
    if p.isnan().any():
        raise PromptError(
            "The model's scores are not numbers (NaN), so no token can be drawn: an edit or a weight made them so."
        )
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)])


def check_ids(config: Config, ids: Tensor) -> None:
    """Raise `PromptError` unless `ids` are `batch seq` whole numbers of the vocabulary, and no longer than allowed."""
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PromptError(
            f"Token ids must be whole numbers of shape (batch, seq), but these are {ids.dtype} of shape {tuple(ids.shape)}."
        )
    if not ids.numel():
        raise PromptError("The prompt is empty: it must hold at least one token.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab:
        wrong = low if low < 0 else high
        raise PromptError(f"Token id {wrong} does not exist: this model's ids are 0 to {config.vocab - 1}.")
    check_length(config, ids.shape[1])


def _is_whole(number: Any) -> bool:
    return isinstance(number, SupportsIndex) and not isinstance(number, bool)


def check_new(max_new_tokens: Any) -> None:
    """Raise `PromptError` unless this is a number of tokens."""
    if not _is_whole(max_new_tokens) or max_new_tokens < 0:
        raise PromptError(f"max_new_tokens is {max_new_tokens!r}: it must be a whole number, 0 or above.")


def check_length(config: Config, seq: int) -> None:
    """Raise `PromptError` if a model without a window is given more tokens than its context."""
    if config.window is None and seq > config.context:
        raise PromptError(
            f"The text has {seq} tokens, but this model reads at most {config.context} and has no sliding window "
            "to go beyond them: shorten it."
        )


@torch.no_grad()  # not inference_mode: what is recorded stays an ordinary tensor, which a probe can be trained on
def prefill(
    model: Transformer,
    ids: Int[Tensor, "batch seq"],
    cache: Cache,
    padding: Int[Tensor, " batch"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Read a prompt into `cache`, `chunk` tokens at a time (None: `CHUNK`, or the window where that is shorter, but no
    fewer than `LEAST`; in half precision, twice the window); return the logits after its last token.

    The size of the chunks changes memory and speed, not the result. Source: Mistral 7B (arXiv 2310.06825,
    section 2, "Pre-fill and Chunking").
    """
    if chunk is None:
        window = model.config.window or CHUNK
        chunk = min(CHUNK, max(LEAST, window * 4 // model.embed.weight.itemsize))
    for part in ids.split(chunk, dim=1):
        logits = model(part, cache, padding, last_only=True)
    return logits[:, -1]


@torch.no_grad()
def decode(
    model: Transformer, ids: Int[Tensor, " batch"], cache: Cache, padding: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Read one token more of every text; return the logits after it."""
    return model(ids[:, None], cache, padding, last_only=True)[:, -1]


INPUTS = ("ids", "seen", "keys", "values")  # of a compiled step
# Attributes that may differ from when the step was compiled: they are asked for on their own, or change nothing.
LOOKED_AT = frozenset({"bank", "plain", "dispatch", "packed", "training"})
Decode = Callable[[Transformer, Tensor, Cache, Tensor | None], Tensor]


def compile_decode(model: Transformer) -> Decode:
    """`decode` for this model, compiled by torch.compile.

    The first step takes half a minute (mini-mixtral) to a minute (0.75 B parameters) on two cores, less where torch.compile
    has kept its work; the others took 0.3 (mini-mixtral, bfloat16) to 0.8 times (0.75 B parameters, float32) as long as before
    where README.md has measured it on a Xeon. It takes any cache of the model's; another batch size is compiled anew.

    Chosen experts are picked by index from their bank, so no weight is copied and no step waits for Python. Where the
    experts of a layer do not lie side by side in memory, they are laid out so first. With a hook or an edit in the model, or
    padding, or while the model has other parts or weights in other places than when this was called, a step is `decode`
    itself. Needs a C++ compiler (on a GPU, Triton). Raises `LabError` for experts of another kind than the package's.
    """
    sparse = [block.experts for block in model.blocks if block.router is not None]
    for experts in sparse:
        if not isinstance(experts, Experts):
            raise LabError(
                f"The experts of a layer are a {type(experts).__name__}: a compiled step knows the package's own kind only. "
                "Write without compiling."
            )
        experts.lay_out()
    over_weights = [experts for experts in sparse if experts.has_bank()]
    # Of rounded weights, for one:
    over_copies = [(experts, experts.bank) for experts in sparse if not experts.has_bank()]

    def banked() -> bool:
        for experts in over_weights:
            if not experts.has_bank():
                experts.lay_out()  # where they lie already
        return all(experts.bank is bank for experts, bank in over_copies)

    as_compiled = Likeness(model, LOOKED_AT, banked)

    def step(ids: Tensor, seen: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        cache: Cache = [FixedCache(*ring, seen) for ring in zip(keys, values, strict=True)]
        return model(ids[:, None], cache, last_only=True)[:, -1]

    # torch.compile keeps its work with the code: with a copy for each model, none is given another's.
    step.__code__ = step.__code__.replace()
    # On a GPU, CUDA graphs. A graph is tied to addresses, and a step writes into the cache in place, which PyTorch allows for
    # what is marked as staying where it is; another cache (another text) is recorded anew. Not run on a GPU yet.
    on_gpu = model.embed.weight.is_cuda
    how: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu else {"options": _lean(model)}
    compiled = torch.compile(step, fullgraph=True, **how)

    @torch.no_grad()
    def compiled_decode(
        given: Transformer, ids: Int[Tensor, " batch"], cache: Cache, padding: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        by_definition = any(attention.plain for attention in model.attentions) or any(
            experts.dispatch != "auto" for experts in sparse
        )
        as_ever = given is not model or padding is not None or by_definition or not free_of_hooks(model)
        if as_ever or not as_compiled.holds():
            return decode(given, ids, cache, padding)
        rings = [ring.keys for ring in cache], [ring.values for ring in cache]
        for ring in (*rings[0], *rings[1]):
            torch._dynamo.maybe_mark_dynamic(ring, 2)
            if on_gpu:
                torch._dynamo.mark_static_address(ring, guard=False)
        if on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        cache[0].check_room(1)
        logits = compiled(ids, torch.tensor(cache[0].seen, device=ids.device), *rings)
        for one in cache:
            one.seen += 1
        return logits.clone() if on_gpu else logits  # the next replay writes where this one did

    return compiled_decode


def _lean(model: Transformer) -> dict[str, Any]:
    """How to compile a step for a CPU, so that little is done around its loops, where a mini model spent half of its time.

    What calls the loops is compiled, too. A product and a sum may be one instruction, which rounds once, where torch.compile
    would round twice as eager PyTorch does. And what `Likeness` knows is not checked again at every step: the checks that are
    left are those of the inputs and of PyTorch's own settings.
    """

    def needed(guards: Sequence[Any]) -> list[bool]:
        return [not guard.name or guard.name.startswith(INPUTS) for guard in guards]

    options: dict[str, Any] = {
        "cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast",
        "size_asserts": False, "alignment_asserts": False,
    }  # fmt: skip
    return options | ({"guard_filter_fn": needed} if all(isinstance(part, Module) for part in model.modules()) else {})


def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    chunk: int | None = None,
    decode: Decode = decode,
) -> Iterator[list[int | None]]:
    """Continue every prompt; yield, after each step, one new id per prompt, or None for a prompt that is done.

    Prompts may differ in length: shorter ones are padded on the left, which changes nothing they compute. A
    prompt is done after one of `stop_ids` (which is yielded), after `max_new_tokens`, or when a model
    without a window reaches its context. Raises `PromptError` for an empty prompt, for ids out of range, and for a
    `max_new_tokens` below 0.
    """
    sampling = sampling or Sampling()
    config = model.config
    if not prompts or not all(prompts):
        raise PromptError("The prompt is empty: it must hold at least one token.")
    check_new(max_new_tokens)
    longest = max(map(len, prompts))
    for prompt in prompts:
        check_ids(config, torch.tensor([list(prompt)]))
    room = [max_new_tokens] * len(prompts)
    if config.window is None:
        room = [min(max_new_tokens, config.context - len(prompt) + 1) for prompt in prompts]
    if max(room) < 1:
        return

    device = model.embed.weight.device
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(rows, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padding = longest - lengths if len(set(map(len, prompts))) > 1 else None
    generators = [torch.Generator(device) for _ in prompts]
    for b, generator in enumerate(generators):
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed + b)

    cache = model.new_cache(len(prompts), longest + max(room) - 1)
    done = [False] * len(prompts)
    logits = prefill(model, ids, cache, padding, chunk)
    for step in range(max(room)):
        new = pick(logits, sampling, generators)
        picked = new.tolist()
        yield [None if ended else token for ended, token in zip(done, picked, strict=True)]
        done = [
            ended or token in stop_ids or step + 1 == own for ended, token, own in zip(done, picked, room, strict=True)
        ]
        if all(done):
            return
        logits = decode(model, new, cache, padding)
