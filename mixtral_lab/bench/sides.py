"""Who runs: this package in its columns, and transformers in its variants, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtral_lab.bench.report import OURS, OURS_COMPILED, PORTABLE, THEIRS, BenchError
from mixtral_lab.generate import Decode, compile_decode, decode, generate_ids, prefill
from mixtral_lab.model import Transformer
from mixtral_lab.model.linear import portable

EXPERTS = ("eager", "batched_mm", "grouped_mm")  # how transformers may run its experts
QUICK = "grouped_mm"  # what it takes by itself; the others' prompts are read with it where only decoding is timed

Ids = Int[Tensor, "1 seq"]
Work = Callable[[], object]  # what is timed


@runtime_checkable
class Named(Protocol):
    """Whatever can be timed."""

    name: str


@runtime_checkable
class Side(Named, Protocol):
    """One contender. What is timed is what `prefill` and `decode` return; the rest of them is preparation."""

    def logits(self, ids: Int[Tensor, "batch seq"], at_once: int) -> Float[Tensor, "batch seq vocab"]:
        """The logits of every position: the first `at_once` tokens are read together, the others one by one."""

    def prefill(self, ids: Ids) -> Work:
        """Read a prompt; the work ends with the logits of its last token, and returns the cache."""

    def decode(self, ids: Ids, n: int) -> Work:
        """Read a prompt, untimed, and take its next token; the work feeds `n` tokens, each chosen from the last logits."""


@runtime_checkable
class Reader(Side, Protocol):
    """A side that reads a text part by part, and whose cache can be weighed."""

    model: Any

    def new_cache(self, length: int) -> Any:
        """An empty cache for one text of so many tokens."""

    def read(self, ids: Ids, cache: Any) -> Int[Tensor, "1 1"]:
        """Read more of a text; return the most likely next token."""

    def write(self, token: Int[Tensor, "1 1"], cache: Any, n: int) -> None:
        """Feed `n` tokens, each chosen from the last logits."""

    def cache_bytes(self, cache: Any) -> int:
        """Bytes of the memory that a cache keeps from being freed."""


class Ours:
    """This package, by the functions that everything else here generates with.

    `plain_products` is the portable column: nothing but PyTorch's public matrix product, on any processor. Otherwise
    the model takes the shorter roads of this machine, packed weights among them if it has them.
    """

    def __init__(self, model: Transformer, plain_products: bool = False) -> None:
        self.model = model
        self.name = PORTABLE if plain_products else OURS
        self._products: Callable[[], AbstractContextManager[Any]] = portable if plain_products else nullcontext
        self._decode: Decode = decode

    @torch.inference_mode()
    def logits(self, ids: Int[Tensor, "batch seq"], at_once: int) -> Float[Tensor, "batch seq vocab"]:
        cache = self.model.new_cache(*ids.shape)
        parts = [ids[:, :at_once], *ids[:, at_once:].split(1, dim=1)]
        with self._products():
            return torch.cat([self.model(part, cache) for part in parts], dim=1)

    def prefill(self, ids: Ids) -> Work:
        def work() -> Any:
            cache = self.new_cache(ids.shape[1])
            self.read(ids, cache)
            return cache

        return work

    def decode(self, ids: Ids, n: int) -> Work:
        steps = generate_ids(self.model, ids.tolist(), n + 1, decode=self._decode)

        def work() -> None:
            with self._products():
                for _ in steps:
                    pass

        next(steps)
        return work

    def new_cache(self, length: int) -> Any:
        return self.model.new_cache(1, length)

    def read(self, ids: Ids, cache: Any) -> Int[Tensor, "1 1"]:
        with self._products():
            return prefill(self.model, ids, cache).argmax(-1, keepdim=True)

    def write(self, token: Int[Tensor, "1 1"], cache: Any, n: int) -> None:
        with self._products():
            for _ in range(n):
                token = self._decode(self.model, token[:, 0], cache, None).argmax(-1, keepdim=True)

    def cache_bytes(self, cache: Any) -> int:
        return sum(_held(store) for layer in cache for store in (layer.keys, layer.values))


class OursCompiled(Ours):
    """The same with its decode step compiled."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        self.name = OURS_COMPILED
        self._decode = compile_decode(model)

    def logits(self, ids: Int[Tensor, "batch seq"], at_once: int) -> Float[Tensor, "batch seq vocab"]:
        cache = self.model.new_cache(*ids.shape)
        with torch.inference_mode():
            found = [self.model(ids[:, :at_once], cache)]
        for column in ids[:, at_once:].unbind(1):  # not in inference mode: tensors made there are compiled for anew
            found.append(
                self._decode(self.model, column.clone(memory_format=torch.contiguous_format), cache, None)[:, None]
            )
        return torch.cat(found, dim=1)


class Theirs:
    """transformers with one of its attentions and one way to run experts, in a plain greedy loop.

    All variants share one model: its implementations are switched. With `chunk`, a prompt is fed by hand in pieces of
    so many tokens.
    """

    def __init__(self, model: nn.Module, attention: str, experts: str, chunk: int | None = None) -> None:
        self.model: Any = model
        self.attention, self.experts, self.chunk = attention, experts, chunk
        self.name = f"{THEIRS}: {attention}, {experts}" + (f", chunks of {chunk:,}" if chunk else "")

    def copied(self, tokens: int) -> int:
        """Bytes of weights that this variant copies to read so many tokens at once."""
        config = self.model.config
        each = 3 * config.hidden_size * config.intermediate_size * self.model.dtype.itemsize
        return tokens * config.num_experts_per_tok * each if self.experts == "batched_mm" else 0

    @torch.inference_mode()
    def logits(self, ids: Int[Tensor, "batch seq"], at_once: int) -> Float[Tensor, "batch seq vocab"]:
        self._switch(self.experts)
        cache = self.new_cache(ids.shape[1])
        parts = [ids[:, :at_once], *ids[:, at_once:].split(1, dim=1)]
        return torch.cat([self.model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)

    def prefill(self, ids: Ids) -> Work:
        def work() -> Any:
            cache = self.new_cache(ids.shape[1])
            self.read(ids, cache)
            return cache

        return work

    def decode(self, ids: Ids, n: int) -> Work:
        cache = self.new_cache(ids.shape[1] + n)
        token = self._next(ids, cache, QUICK)
        return lambda: self.write(token, cache, n)

    def new_cache(self, length: int) -> Any:
        return transformers().DynamicCache(config=self.model.config)

    def read(self, ids: Ids, cache: Any) -> Int[Tensor, "1 1"]:
        for part in ids.split(self.chunk or ids.shape[1], dim=1):
            token = self._next(part, cache, self.experts)
        return token

    def write(self, token: Int[Tensor, "1 1"], cache: Any, n: int) -> None:
        for _ in range(n):
            token = self._next(token, cache, self.experts)

    def cache_bytes(self, cache: Any) -> int:
        return sum(_held(store) for layer in cache.layers for store in (layer.keys, layer.values))

    @torch.inference_mode()
    def _next(self, ids: Tensor, cache: Any, experts: str) -> Tensor:
        self._switch(experts)
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _switch(self, experts: str) -> None:
        config = self.model.config
        if (config._attn_implementation, config._experts_implementation) != (self.attention, experts):
            self.model.set_attn_implementation(self.attention)
            self.model.set_experts_implementation(experts)


class TheirsGenerate(Theirs):
    """transformers decoding by `model.generate`, as most people do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "sdpa", QUICK)
        self.name += ", generate"

    def decode(self, ids: Ids, n: int) -> Work:
        cache = self.new_cache(ids.shape[1] + n)
        so_far = torch.cat((ids, self._next(ids, cache, QUICK)), dim=1)
        return lambda: self._generate(so_far, cache, n)

    @torch.inference_mode()
    def _generate(self, ids: Tensor, cache: Any, n: int) -> None:
        # eos_token_id=-1: no token ends the text
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=n, do_sample=False,
            eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        if out.shape[1] != ids.shape[1] + n:
            raise BenchError(f"transformers wrote {out.shape[1] - ids.shape[1]} tokens instead of {n}.")


class TheirsCompiled(Theirs):
    """transformers with its forward compiled and a static cache of exactly `length` tokens.

    The fastest way found in 5.23 on a CPU: a loop written by hand around `torch.compile(model.forward)` with
    batched_mm. `generate` with a static cache compiles there only if a private switch says so, and takes a fifth longer; the
    other two kinds of experts break the graph in every layer, and a full graph, max-autotune or eager attention gain
    nothing.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__(model, "sdpa", "batched_mm")
        self.name += ", compiled, static cache"
        on_gpu = self.model.device.type == "cuda"
        self._compiled: Any = torch.compile(model.forward, dynamic=False, mode="reduce-overhead" if on_gpu else None)
        self._cache = transformers().StaticCache(config=self.model.config, max_cache_len=length)

    @torch.inference_mode()
    def logits(self, ids: Int[Tensor, "batch seq"], at_once: int) -> Float[Tensor, "batch seq vocab"]:
        self._switch(self.experts)
        cache = self.new_cache(ids.shape[1])
        parts = [self.model(ids[:, :at_once], past_key_values=cache, use_cache=True).logits]
        for one in ids[:, at_once:].split(1, dim=1):
            one = one.clone(
                memory_format=torch.contiguous_format
            )  # made in inference mode, as in `write`: otherwise it is compiled for anew
            parts.append(self._compiled(one, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.clone())
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def new_cache(self, length: int) -> Any:
        """The one cache, emptied: a new one would be compiled for anew."""
        self._cache.reset()
        return self._cache

    @torch.inference_mode()
    def write(self, token: Int[Tensor, "1 1"], cache: Any, n: int) -> None:
        self._switch(self.experts)
        for _ in range(n):
            out = self._compiled(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)


def transformers() -> ModuleType:
    """transformers, quiet. Raises `BenchError` where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise BenchError("The comparison needs transformers: pip install 'mixtral-lab[bench]'.") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_theirs(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    model = transformers().MixtralForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def _held(tensor: Tensor) -> int:
    """A slice keeps its whole storage alive."""
    return tensor.untyped_storage().nbytes()
