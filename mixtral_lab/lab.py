"""One open model: its numbers, its words, and what it decides. Everything starts with `load`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from jaxtyping import Float
from torch import Tensor

from mixtral_lab import bundled
from mixtral_lab.checkpoint import CheckpointError
from mixtral_lab.config import PRESETS, Config
from mixtral_lab.edit import Edits, editing
from mixtral_lab.generate import (
    Decode,
    PromptError,
    Sampling,
    check_ids,
    check_length,
    check_new,
    compile_decode,
    decode,
    generate_ids,
)
from mixtral_lab.lora import AdapterError, base_of, is_adapter, load_adapter, merge
from mixtral_lab.model import Transformer
from mixtral_lab.model.linear import pack
from mixtral_lab.model.site import watched
from mixtral_lab.offload import loads
from mixtral_lab.sites import Cost, Site, all_sites, cost, kept_for, recording, resolve, source_of
from mixtral_lab.tokenizer import TextStream, Tokenizer, load_tokenizer
from mixtral_lab.trace import Trace
from mixtral_lab.upcycled import is_upcycled, load_upcycled
from mixtral_lab.weights import load_model, resolve_dtype

if TYPE_CHECKING:
    import pandas as pd

Message = Mapping[str, str]  # {"role": "user", "content": "Hello"}


class Lab:
    """A model and its tokenizer. `model` is a plain `nn.Module`; everything else here is a way to use it.

    `source` is what `load` opens this very model by, a bundled name or a whole path; None if no file holds it.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, name: str, source: str | None = None) -> None:
        if tokenizer.vocab > model.config.vocab:
            raise CheckpointError(
                f"The tokenizer has {tokenizer.vocab} tokens but the model only {model.config.vocab}: "
                "they do not belong together."
            )
        self.model, self.tokenizer, self.name = model, tokenizer.up_to(model.config.vocab), name
        self.source = source
        self._decode: Decode = decode

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def dtype(self) -> str:
        return str(self.model.embed.weight.dtype).removeprefix("torch.")

    def __repr__(self) -> str:
        config = self.config
        experts = (
            f", {config.n_experts} experts of which each token takes {config.n_choices}" if config.n_experts else ""
        )
        return (
            f"Lab({self.name}: {config.parameters / 1e6:,.1f} M parameters, {config.active_parameters / 1e6:,.1f} M "
            f"active, {config.n_layers} layers{experts}; {self.dtype} on {self.device})"
        )

    def compile(self) -> None:
        """From now on, write with a compiled decode step: half a minute to a minute for the first token, then fast.

        Traced and edited texts, and a model of which parts were replaced since, are written as without it.
        """
        self._decode = compile_decode(self.model)

    def pack(self) -> int:
        """Keep a second copy of bfloat16 weights in the order that an AMD processor multiplies fastest; the bytes it takes.

        A written token of a 0.75 B model then took 31 ms instead of 45 (Zen 4). 0 where there is nothing to pack: on a GPU, on
        another processor, in float32.
        """
        return pack(self.model)

    def expert_loads(self) -> pd.DataFrame:
        """How often an expert was at hand and how much was copied, by layer, since the model was loaded with offloaded experts."""
        return loads(self.model)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Float[Tensor, "batch seq vocab"]:
        """Scores of every possible next token after each position, from ids `batch seq`.

        Raises `PromptError` for ids of another shape or kind, out of the vocabulary, or too many.
        """
        try:
            ids = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PromptError(
                f"Token ids must be whole numbers of shape (batch, seq), but these are {ids!r}. Of a text: "
                "torch.tensor([lab.tokenizer.encode(text)])."
            ) from error
        check_ids(self.config, ids)
        return self.model(ids.to(self.device, torch.long))

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str, max_new_tokens: int = ..., temperature: float = ..., top_p: float = ...,
        seed: int | None = ..., stop: str | Sequence[str] = ..., top_k: int | None = ...,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: Sequence[str], max_new_tokens: int = ..., temperature: float = ..., top_p: float = ...,
        seed: int | None = ..., stop: str | Sequence[str] = ..., top_k: int | None = ...,
    ) -> list[str]: ...  # fmt: skip

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        top_k: int | None = None,
    ) -> str | list[str]:
        """What the model writes after `prompt`, without the prompt; several prompts give several texts.

        Ends at the model's end token, before the first of the `stop` strings, or after `max_new_tokens`.
        `temperature=0` is greedy and always the same; otherwise `seed` makes a draw repeatable.
        """
        prompts = _texts(prompt)
        ids = [self._read(text) for text in prompts]
        sampling = Sampling(temperature, top_p, top_k, seed)
        texts = ["".join(pieces) for pieces in zip(*self._write(ids, max_new_tokens, sampling, stop), strict=True)]
        texts = texts or ["" for _ in prompts]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        top_k: int | None = None,
    ) -> Iterator[str]:
        """The same as `generate`, piece by piece as it is written. A list of messages is answered as a chat."""
        ids = self._read(prompt) if isinstance(prompt, str) else self.tokenizer.chat(prompt)
        for pieces in self._write([ids], max_new_tokens, Sampling(temperature, top_p, top_k, seed), stop):
            if pieces[0]:
                yield pieces[0]

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        top_k: int | None = None,
    ) -> str:
        """The assistant's next message. `messages` are `{"role", "content"}`, the last by the user."""
        return "".join(self.stream(messages, max_new_tokens, temperature, top_p, seed, stop, top_k)).strip()

    @property
    def sites(self) -> dict[str, Site]:
        """Every value inside the model that can be read and written: name, axes, and what it is."""
        return all_sites(self.config)

    @overload
    def trace(  # type: ignore[overload-overlap]
        self, text: str, max_new_tokens: int = ..., sites: str | Sequence[str] | None = ...,
        positions: Sequence[int] | None = ..., dtype: str | None = ...,
    ) -> Trace: ...  # fmt: skip

    @overload
    def trace(
        self, text: Sequence[str], max_new_tokens: int = ..., sites: str | Sequence[str] | None = ...,
        positions: Sequence[int] | None = ..., dtype: str | None = ...,
    ) -> list[Trace]: ...  # fmt: skip

    def trace(
        self,
        text: str | Sequence[str],
        max_new_tokens: int = 0,
        sites: str | Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> Trace | list[Trace]:
        """Read a text, write on greedily for `max_new_tokens`, and record what passes the named sites.

        Without `sites`, every router's decision for every token: `trace.routing.logits` is `layer seq expert`,
        `.experts` and `.weights` are `layer seq choice`, best first. `sites` are names or patterns from `lab.sites`, such
        as "layers.*.experts.weighted"; `trace_cost` says what they take. `positions` keeps those tokens only;
        `dtype` is what numbers are kept in (as computed, if not given). Several texts give several traces.
        """
        if not isinstance(text, str):
            return [self.trace(one, max_new_tokens, sites, positions, dtype) for one in _texts(text)]
        return self.trace_ids(self._read(text), max_new_tokens, sites, positions, dtype)

    def trace_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 0,
        sites: str | Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> Trace:
        """The same for token ids, such as those of `tokenizer.chat(messages)`."""
        ids, config = list(ids), self.config
        check_ids(config, torch.tensor([ids]))
        check_new(max_new_tokens)
        check_length(config, len(ids) + max_new_tokens)
        names = resolve(self.config, sites)
        at = _positions(positions, len(ids) + max_new_tokens)
        kept = kept_for(names, at is None, self._changed())
        numbers = None if dtype is None else resolve_dtype(dtype)
        with recording(self.model, kept, at, numbers) as recorder:
            # One token more than asked for: the last one written is never read, so nothing is known of it.
            steps = list(generate_ids(self.model, [ids], max_new_tokens + 1, stop_ids=self.tokenizer.stop_ids))
        whole = ids + [new[0] for new in steps[:-1] if new[0] is not None]
        if at is not None and int(at.max()) >= len(whole):
            raise PromptError(f"Position {int(at.max())} was asked for, but the text ended after {len(whole)} tokens.")
        return Trace(
            ids=torch.tensor(whole),
            tokens=tuple(self.tokenizer.pieces(whole)),
            n_prompt=len(ids),
            model=self.name,
            dtype=self.dtype,
            n_layers=config.n_layers,
            n_experts=config.n_experts,
            window=self.model.window,
            recorded=recorder.values(),
            positions=at,
        )

    def _changed(self) -> frozenset[str]:
        """Sites that a trace could compute from others, but not now: somebody edits them, or what they are made of."""

        def touched(name: str) -> bool:
            before = name.removesuffix("pattern") + "scores" if name.endswith(".pattern") else name
            return any(watched(self.model.get_submodule(one)) for one in (name, before))

        return frozenset(name for name in self.sites if source_of(name) and touched(name))

    def trace_cost(
        self,
        text: str | int,
        max_new_tokens: int = 0,
        sites: str | Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> Cost:
        """What `trace` with the same arguments will take, in bytes, before doing it; for a text or a number of tokens."""
        seq = (text if isinstance(text, int) else len(self._read(text))) + max_new_tokens
        at = _positions(positions, seq)
        size = resolve_dtype(dtype or self.dtype).itemsize
        return cost(self.config, resolve(self.config, sites), seq, None if at is None else len(at), size)

    def edit(self, *edits: Edits) -> AbstractContextManager[None]:
        """While open (`with lab.edit(...):`), the model computes with these changes; afterwards it is as it was.

        An edit is `{site: function}`, where the function takes the site's value (`batch` first; a copy) and returns
        what shall stand in its place, or one of `mixtral_lab.edit`'s: ablate, reroute, scale, top_k, temperature, patch,
        replay. Raises `SiteError` for an unknown site, `EditError` for a change that does not fit, and at
        the end for one that never took effect.
        """
        return editing(self.model, *edits)

    def _read(self, text: str) -> list[int]:
        if not text:
            raise PromptError("The prompt is empty: write at least one character.")
        return self.tokenizer.encode(text)

    def _write(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, stop: str | Sequence[str]
    ) -> Iterator[list[str]]:
        """For each step, the new text of every prompt ("" while a character or a stop string is unfinished)."""
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(stops):
            raise PromptError("A stop string is empty: it would end every text at once.")
        writers = [Writer(TextStream(self.tokenizer, continues=True), stops) for _ in prompts]
        steps = generate_ids(
            self.model, prompts, max_new_tokens, sampling, self.tokenizer.stop_ids, decode=self._decode
        )
        for new in steps:
            yield [writer.feed(token) for writer, token in zip(writers, new, strict=True)]
            if all(writer.done for writer in writers):
                break
        yield [writer.flush() for writer in writers]


def _texts(given: str | Sequence[str]) -> list[str]:
    """One text or several as several; `PromptError` for anything else."""
    texts = [given] if isinstance(given, (str, bytes)) or not isinstance(given, Iterable) else list(given)
    for text in texts:
        if not isinstance(text, str):
            raise PromptError(f"A prompt is a text (str), or several in a list; this is {text!r}.")
    return texts


def _positions(asked: Sequence[int] | None, seq: int) -> Tensor | None:
    """Positions as a sorted tensor; negative ones count from the end of what is read and written."""
    if asked is None:
        return None
    try:
        asked = [operator.index(p) for p in asked]
    except TypeError:
        raise PromptError(f"positions are {asked!r}: give whole numbers in a list, such as [0, -1].") from None
    wrong = [p for p in asked if not -seq <= p < seq]
    if wrong or not asked:
        raise PromptError(f"positions are {asked}: they must name at least one of the {seq} tokens, 0 to {seq - 1}.")
    return torch.tensor(sorted({p % seq for p in asked}))


class Writer:
    """One text as it grows: ends before the first stop string, and holds back what may be the start of one."""

    def __init__(self, text: TextStream, stops: list[str]) -> None:
        self._text, self._stops = text, stops
        self._held = ""
        self.done = self._stopped = False  # nothing more comes; because of a stop string

    def feed(self, token: int | None) -> str:
        if self.done or token is None:
            self.done = True
            return ""
        return self._release(self._text.feed(token))

    def flush(self) -> str:
        """What was held back, now that nothing follows it."""
        if self._stopped:
            return ""
        out = self._release(self._text.flush()) + self._held
        self._held = ""
        return out

    def _release(self, new: str) -> str:
        text = self._held + new
        ends = [text.find(stop) for stop in self._stops if stop in text]
        if ends:
            self.done = self._stopped = True
            self._held = ""
            return text[: min(ends)]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def load(
    path: str | Path = "mini-mixtral",
    device: str = "auto",
    dtype: str = "auto",
    experts: str = "memory",
    resident: int | None = None,
    quantize: str | None = None,
    share: tuple[int, int] | None = None,
    adapter: str | Path | None = None,
) -> Lab:
    """Open a model: a checkpoint folder, a GGUF file, the name of a bundled model, or what `mixtral-lab finetune` wrote.

    `device` is "auto" (CUDA if there is one), "cpu", "cuda", ...; `dtype` is "auto" (float32 for small models on a
    CPU, bfloat16 on CUDA, else as stored), "float32", "bfloat16" or "float16". Where the experts do not fit:
    `experts="offload", resident=N` keeps N of each layer in memory and reads the others from the files when a token chooses
    them (`lab.expert_loads()` counts); `quantize="int8"` or "int4" keeps them rounded, in half or a quarter of bfloat16's
    space. `share=(rank, size)` is for several processes (`run.py`). `adapter` is a folder with a low-rank adapter
    in peft's layout, which is merged into the weights; given as `path`, such a folder opens the model that it names, with itself
    merged.
    Raises `CheckpointError` (and its kinds) if the files are not a model that this package can read.
    """
    where = Path(path).expanduser()
    if is_adapter(where):
        if adapter is not None:
            raise AdapterError(f"{path} is an adapter, not a model: merge it first (mixtral-lab merge).")
        return load(base_of(where), device, dtype, experts, resident, quantize, share, adapter=where)
    name = str(path).removeprefix("data/")
    source: str | None = str(where.resolve()) if where.exists() else name
    if not where.exists():
        if name in bundled.MODELS:
            where = bundled.folder(name)
        elif name in bundled.UPCYCLED:
            where = bundled.folder(bundled.UPCYCLED[name])
        else:
            hint = (
                f" {name} is a published shape without weights: see `mixtral-lab info {name}`."
                if name in PRESETS
                else ""
            )
            raise CheckpointError(
                f"There is no file or folder {path}.{hint} "
                f"Bundled models are {', '.join((*bundled.MODELS, *bundled.UPCYCLED))}."
            )
    name = where.stem if where.is_file() else where.resolve().name
    if is_upcycled(where):
        if experts != "memory" or quantize or share:
            raise CheckpointError(
                f"{path} is made from its parent in memory: save it as a folder first (data/README.md), and open that so."
            )
        model, tokenizer = load_upcycled(where, device, dtype)
        name = next((short for short, folder in bundled.UPCYCLED.items() if folder == name), name)
    else:
        model = load_model(where, device, dtype, experts, resident, quantize, share)
        tokenizer = load_tokenizer(where)
    if adapter is not None:
        merge(model, load_adapter(adapter, model.config))
        name, source = f"{name} + {Path(adapter).resolve().name}", None
    return Lab(model, tokenizer, name, source)
