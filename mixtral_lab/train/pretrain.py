"""Train a mini model from nothing: `python -m mixtral_lab.train.pretrain --help`.

One command for a CPU and for one GPU. A run lives in its own folder: `log.jsonl` (a line per report),
`state.safetensors` (weights and optimizer, to go on from), and in the end the checkpoint itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
import typer
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mixtral_lab.config import PRESETS
from mixtral_lab.model import Routing, Transformer
from mixtral_lab.terminal import in_one_sentence
from mixtral_lab.tokenizer import BPETokenizer
from mixtral_lab.train import stream
from mixtral_lab.train.mixture import mix_for_training
from mixtral_lab.train.saved_state import STATE, load_state, save_state
from mixtral_lab.weights import save_model


@dataclass(frozen=True)
class Recipe:
    """How a run is sized. Two are given: one for a laptop's or server's CPU, one for a single GPU."""

    rows: int  # texts in a batch
    seq: int  # tokens in a text
    long_seq: int  # every `long_every`th step has texts this long instead (as many tokens), so that positions
    long_every: int  # far from the start are not new to a model that looks back without a window
    peak_lr: float
    warmup_steps: int
    min_lr_share: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    balance: float = 0.01
    z: float = 0.001


@runtime_checkable
class Schedule(Protocol):
    """What `learning_rate` asks of a recipe."""

    @property
    def peak_lr(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def min_lr_share(self) -> float: ...


RECIPES = {
    "cpu": Recipe(rows=16, seq=256, long_seq=2048, long_every=40, peak_lr=2e-3, warmup_steps=200),
    "cuda": Recipe(rows=128, seq=512, long_seq=2048, long_every=8, peak_lr=3e-3, warmup_steps=300),
}


def balance_loss(routing: Routing) -> Float[Tensor, ""]:
    """`expert` x sum over experts of (share of assignments x mean probability): 1 if all experts are used alike.

    Source: Switch Transformers (arXiv 2101.03961, section 2.2), with shares of assignments for top-k.
    """
    n_experts = routing.logits.shape[-1]
    probability = reduce(routing.logits.float().softmax(-1), "batch seq expert -> expert", "mean")
    share = routing.experts.flatten().bincount(minlength=n_experts) / routing.experts.numel()
    return n_experts * (share * probability).sum()


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean squared log of the router's partition sum: keeps its logits small. Source: ST-MoE (arXiv 2202.08906)."""
    return routing.logits.float().logsumexp(-1).square().mean()


def initialise(model: Transformer, seed: int) -> None:
    """Normal weights of deviation 0.02; what writes to the residual stream starts smaller, by sqrt(2 layers)."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        writes = name.endswith(("attention.output.weight", "down.weight"))
        deviation = 0.02 / math.sqrt(2 * model.config.n_layers) if writes else 0.02
        weight.data.normal_(0.0, deviation, generator=generator)


class Run:
    """One training run: model, optimizer, and where in its schedule it stands."""

    def __init__(self, model: Transformer, recipe: Recipe, device: torch.device) -> None:
        self.model, self.recipe, self.device = model.to(device), recipe, device
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        kept = [p for p in model.parameters() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas, fused=True)
        self.routings: list[Routing] = []
        for block in model.blocks:
            if block.router is not None:
                block.experts.dispatch = self._mix
        torch._dynamo.config.recompile_limit = 64
        self._losses: Callable[[Tensor], Tensor] = torch.compile(self._token_losses, dynamic=False)

    @torch.compiler.disable
    def _mix(self, x: Tensor, routing: Routing, experts: torch.nn.ModuleList) -> Tensor:
        self.routings.append(routing)
        return mix_for_training(x, routing, experts)

    def _token_losses(self, ids: Int[Tensor, "batch seq_in"]) -> Float[Tensor, "batch seq"]:  # seq_in = seq + 1
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(ids[:, :-1])
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(ids.shape[0], -1)

    def train_step(self, ids: Tensor, domain: Tensor, lr: float) -> dict[str, Tensor]:
        """One batch forward, back, and one step of AdamW. Returns what a report shows, as tensors."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.routings.clear()
        losses = self._losses(ids.to(self.device))
        loss = losses.mean()
        seen: dict[str, Tensor] = {
            "loss": loss.detach(),
            "row_loss": losses.detach().mean(1),
            "domain": domain,
        }
        if self.routings:
            balance = torch.stack([balance_loss(r) for r in self.routings])
            loss = (
                loss + recipe.balance * balance.mean() + recipe.z * torch.stack(list(map(z_loss, self.routings))).mean()
            )
            seen["share"] = torch.stack(
                [r.experts.flatten().bincount(minlength=r.logits.shape[-1]) / r.experts.numel() for r in self.routings]
            )
            seen["entropy"] = torch.stack([_entropy(r.logits.detach()) for r in self.routings])
        loss.backward()
        seen["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.routings.clear()
        self.step += 1
        self.tokens += ids.shape[0] * (ids.shape[1] - 1)
        return seen

    @torch.no_grad()
    def held_out(self, tokens: stream.Tokens, rows: int) -> dict[str, float]:
        """Nats per token on the same `rows` held-out stretches of every domain each time."""
        found = {}
        for d, name in enumerate(tokens.domains):
            ids = tokens.stretches(d, rows, self.recipe.seq).to(self.device)
            self.routings.clear()
            found[name] = self._losses(ids).mean().item()
        self.routings.clear()
        return found

    def save(self, folder: Path) -> None:
        """Write everything that `resume` needs."""
        meta = {"step": str(self.step), "tokens": str(self.tokens), "seconds": str(self.seconds)}
        save_state(folder, dict(self.model.named_parameters()), self.optimizer, meta)

    def resume(self, folder: Path) -> None:
        """Go on from `save`: the same weights, moments, step and schedule."""
        meta = load_state(folder, dict(self.model.named_parameters()), self.optimizer)
        self.step, self.tokens, self.seconds = int(meta["step"]), int(meta["tokens"]), float(meta["seconds"])


def learning_rate(recipe: Schedule, step: int, progress: float) -> float:
    """Rise over `warmup_steps`, then half a cosine down to `min_lr_share`; `progress` is the share of the run done."""
    low = recipe.min_lr_share
    cosine = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return recipe.peak_lr * min(1.0, (step + 1) / recipe.warmup_steps) * cosine


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def train(
    run: Run, train_tokens: stream.Tokens, held_out: stream.Tokens, folder: Path, tokens: int, minutes: float
) -> None:
    """Train until `tokens` are seen or `minutes` are spent (resumed time counts), whichever is nearer to its end."""
    recipe = run.recipe
    saved = reported = evaluated = run.seconds
    with (folder / "log.jsonl").open("a") as log, tqdm(total=100, unit="%", bar_format=BAR) as bar:

        def write(**entry: object) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        write(recipe=asdict(recipe), threads=torch.get_num_threads(), device=str(run.device))
        for seen, progress in _steps(run, train_tokens, tokens, minutes):
            bar.update(int(100 * progress) - bar.n)
            if run.seconds - reported >= 30 or progress >= 1:
                reported = run.seconds
                report = _report(seen, train_tokens.domains)
                write(step=run.step, tokens=run.tokens, seconds=round(run.seconds), **report)
                bar.set_postfix_str(f"loss {report['loss']:.3f}, {run.tokens / 1e6:.1f} M tokens")
            if run.seconds - evaluated >= 600 or progress >= 1:
                evaluated = run.seconds
                write(step=run.step, tokens=run.tokens, held_out=run.held_out(held_out, rows=8))
            if run.seconds - saved >= 300 or progress >= 1:
                saved = run.seconds
                run.save(folder)
        bar.update(100 - bar.n)


BAR = "{l_bar}{bar}| {elapsed}<{remaining} {postfix}"


def _steps(
    run: Run, train_tokens: stream.Tokens, tokens: int, minutes: float
) -> Iterator[tuple[dict[str, Tensor], float]]:
    recipe = run.recipe
    progress = max(run.tokens / tokens, run.seconds / (60 * minutes))
    while progress < 1:
        start = time.perf_counter()
        seq = recipe.long_seq if run.step % recipe.long_every == recipe.long_every - 1 else recipe.seq
        ids, domain = train_tokens.batch(run.step, recipe.rows * recipe.seq // seq, seq)
        seen = run.train_step(ids, domain, learning_rate(recipe, run.step, progress))
        run.seconds += time.perf_counter() - start
        progress = max(run.tokens / tokens, run.seconds / (60 * minutes))
        yield seen, progress


def _report(seen: dict[str, Tensor], domains: tuple[str, ...]) -> dict[str, object]:
    by_domain = {
        name: round(seen["row_loss"].cpu()[seen["domain"] == d].mean().item(), 3)
        for d, name in enumerate(domains)
        if (seen["domain"] == d).any()
    }
    report: dict[str, object] = {"loss": seen["loss"].item(), "by_domain": by_domain}
    report["grad_norm"] = round(seen["grad_norm"].item(), 3)
    if "share" in seen:
        report["largest_share"] = [round(x, 3) for x in seen["share"].max(1).values.tolist()]
        report["smallest_share"] = [round(x, 3) for x in seen["share"].min(1).values.tolist()]
        report["router_entropy_nats"] = [round(x, 3) for x in seen["entropy"].tolist()]
    return report


def main(
    model: Annotated[str, typer.Option(help="Which shape to train: mini-mixtral or mini-mistral.")] = "mini-mixtral",
    corpus: Annotated[Path, typer.Option(help="Folder that mixtral_lab.train.corpus built.")] = Path("corpus"),
    out: Annotated[Path, typer.Option(help="Folder of the run; a run found there goes on.")] = Path("runs"),
    tokens: Annotated[float, typer.Option(help="Stop after so many million tokens.")] = 1e9,
    minutes: Annotated[float, typer.Option(help="Stop after so many minutes of training.")] = 70.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the first weights.")] = 0,
) -> None:
    """Train a mini model on the corpus, evenly over its domains, and save it as a checkpoint."""
    if model not in PRESETS or not model.startswith("mini-"):
        raise typer.BadParameter(f"{model!r} is not a model to train here: choose mini-mixtral or mini-mistral.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = out / model
    folder.mkdir(parents=True, exist_ok=True)
    config = PRESETS[model].config

    if not (corpus / "tokenizer" / "tokenizer.json").exists():
        stream.train_tokenizer(corpus, config.vocab).save(corpus / "tokenizer")
    tokenizer = BPETokenizer.load(corpus / "tokenizer")
    stream.encode_corpus(corpus, tokenizer, corpus / "ids")
    train_tokens = stream.load_tokens(corpus / "ids", stream.TRAIN)
    held_out = stream.load_tokens(corpus / "ids", stream.HELD_OUT)

    network = Transformer(config)
    initialise(network, seed)
    run = Run(network, RECIPES[torch.device(device).type], torch.device(device))
    if (folder / STATE).exists():
        run.resume(folder)
    with contextlib.suppress(KeyboardInterrupt):  # what there is so far is saved below
        train(run, train_tokens, held_out, folder, int(tokens * 1e6), minutes)
    run.save(folder)
    save_model(
        run.model.to("cpu"), folder / "checkpoint", dtype="bfloat16", overwrite=True,
        bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id,
    )  # fmt: skip
    tokenizer.save(folder / "checkpoint")


if __name__ == "__main__":
    typer.run(in_one_sentence(main))
