"""Every site can be read and written, by name and by plain hooks, however the model computes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from test_model import random_model
from test_parity import mixtral

import mixtral_lab
from mixtral_lab.config import Config
from mixtral_lab.edit import EditError, editing
from mixtral_lab.generate import decode, prefill
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.model.attention import attention_pattern, attention_scores, visible
from mixtral_lab.model.moe import DISPATCH
from mixtral_lab.sites import SiteError, all_sites, cost, kept_for, recording, resolve

SPARSE = mixtral(window=6)
DENSE = mixtral(window=6, n_experts=None, n_choices=None)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    torch.manual_seed(3)
    return {"sparse": random_model(SPARSE), "dense": random_model(DENSE)}


@pytest.fixture(scope="module")
def lab() -> Lab:
    return mixtral_lab.load("mini-mixtral")


def every_site() -> list[tuple[str, str]]:
    return [("sparse", name) for name in all_sites(SPARSE)] + [("dense", name) for name in all_sites(DENSE)]


def otherwise(value: torch.Tensor) -> torch.Tensor:
    """Another value of the same shape. For chosen experts: the next one."""
    if value.is_floating_point():
        return 0.5 * value + torch.linspace(-1, 1, value.shape[-1])
    return (value + 1) % SPARSE.n_experts


def run(model: Transformer, way: str) -> torch.Tensor:
    """Logits after the whole text, which is longer than the window."""
    if way == "whole":
        with torch.no_grad():
            return model(IDS)[:, -1]
    cache = model.new_cache(1, IDS.shape[1])
    if way == "prefill":
        return prefill(model, IDS, cache, chunk=5)
    prefill(model, IDS[:, :-1], cache)
    return decode(model, IDS[:, -1], cache)


@pytest.mark.parametrize("way", ["whole", "prefill", "decode"])
@pytest.mark.parametrize(("kind", "site"), every_site())
def test_a_write_changes_the_logits(models, kind, site, way):
    model = models[kind]
    before = run(model, way)
    for dispatch in (*DISPATCH, "auto", "dense") if kind == "sparse" else ("auto",):
        for block in model.blocks:
            if kind == "sparse":
                block.experts.dispatch = dispatch
        with editing(model, {site: otherwise}):
            changed = run(model, way)
        assert (changed - before).abs().max() > 1e-3, dispatch
        torch.testing.assert_close(run(model, way), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "site"), every_site())
def test_a_write_in_the_decode_step_alone_changes_its_logits(models, kind, site):
    model = models[kind]
    cache, same = model.new_cache(1, 12), model.new_cache(1, 12)
    prefill(model, IDS[:, :-1], cache)
    prefill(model, IDS[:, :-1], same)
    before = decode(model, IDS[:, -1], same)
    with editing(model, {site: otherwise}):
        assert (decode(model, IDS[:, -1], cache) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_shapes_are_those_of_the_table(models, kind):
    model = models[kind]
    with torch.no_grad(), recording(model, ["*"]) as recorder:
        model(IDS)
    found = recorder.values()
    assert found.keys() == all_sites(model.config).keys()
    for name, site in all_sites(model.config).items():
        assert tuple(found[name].shape) == site.shape(model.config, 12), name


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_what_is_recorded_in_chunks_is_what_is_recorded_at_once(models, kind, chunk):
    model = models[kind]
    with torch.no_grad(), recording(model, ["*"]) as at_once:
        model(IDS)
    with recording(model, ["*"]) as in_chunks:
        prefill(model, IDS, model.new_cache(1, 12), chunk=chunk)
    whole, parts = at_once.values(), in_chunks.values()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-4, rtol=1e-4, msg=name)


def test_recorded_values_hang_together(models):
    model = models["sparse"]
    with torch.no_grad(), recording(model, ["*"]) as recorder:
        logits = model(IDS)
    at = recorder.values()
    close = torch.testing.assert_close
    close(at["logits"], logits[0])
    close(at["layers.1.residual.before"], at["layers.0.residual.after"])
    for layer in ("layers.0", "layers.1"):
        stream = at[f"{layer}.residual.before"] + at[f"{layer}.attention.output"]
        close(at[f"{layer}.residual.between"], stream)
        close(at[f"{layer}.residual.after"], stream + at[f"{layer}.experts"], atol=1e-5, rtol=1e-5)
        weights, out = at[f"{layer}.router.weights"], at[f"{layer}.experts.out"]
        close(at[f"{layer}.experts.weighted"], weights[..., None] * out)
        close(at[f"{layer}.experts"], at[f"{layer}.experts.weighted"].sum(1))
        close(weights.sum(-1), torch.ones(12))
        query, key = at[f"{layer}.attention.heads.query"][None], at[f"{layer}.attention.heads.key"][None]
        positions = torch.arange(12)[None]
        mask = visible(positions, positions, 6)
        close(at[f"{layer}.attention.pattern"], attention_pattern(attention_scores(query, key), mask)[0])
        scores = at[f"{layer}.attention.scores"]
        assert scores.isinf().equal(~mask[0].expand_as(scores))


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_plain_hooks_see_the_same(models, kind):
    model, seen, hooks = models[kind], {}, []
    for name in all_sites(model.config):
        hooks.append(
            model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
        )
    with torch.no_grad(), recording(model, ["*"]) as recorder:
        model(IDS)
    for hook in hooks:
        hook.remove()
    for name, value in recorder.values().items():
        here = seen[name][0]
        assert torch.equal(torch.where(value.isinf(), value, here), value), name


def test_names_and_patterns():
    assert resolve(SPARSE, "layers.*.router.logits") == ("layers.0.router.logits", "layers.1.router.logits")
    assert resolve(SPARSE, ["logits", "embed"]) == ("embed", "logits")
    assert resolve(DENSE, None) == ()
    with pytest.raises(SiteError, match=r"layers\.9.*Its layers are 0 to 1"):
        resolve(SPARSE, "layers.9.residual.after")
    with pytest.raises(SiteError, match=r"Did you mean layers\..\.router\.logits"):
        resolve(SPARSE, "layers.0.router.logit")
    with pytest.raises(SiteError, match="this is a dense model"):
        resolve(DENSE, "layers.0.router.logits")
    with pytest.raises(SiteError, match="this is a mixture of experts"):
        resolve(SPARSE, "layers.0.feed_forward")


@pytest.mark.parametrize("site", all_sites(SPARSE))
def test_a_shape_that_does_not_fit_is_refused(models, site):
    with pytest.raises(EditError, match="but the edit returned"), editing(models["sparse"], {site: lambda x: x[:, 1:]}):
        run(models["sparse"], "whole")


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda x: None, "returned NoneType: return the new value"),
        (lambda x: x + 5, "has no expert"),
        (lambda x: x - 5, "has no expert -"),
        (lambda x: x.float(), "holds whole numbers"),
    ],
)
def test_choices_that_cannot_be_are_refused(models, fn, says):
    with pytest.raises(EditError, match=says), editing(models["sparse"], {"layers.1.router.experts": fn}):
        run(models["sparse"], "whole")


def test_a_write_without_effect_is_an_error(models):
    with pytest.raises(EditError, match="never took effect"), editing(models["sparse"], {"embed": otherwise}):
        pass


def test_an_edit_gets_a_copy(models):
    model = models["sparse"]

    def in_place(x):
        x.zero_()
        return x

    with (
        recording(model, ["layers.0.residual.after"]) as recorder,
        editing(model, {"layers.1.residual.before": in_place}),
    ):
        run(model, "whole")
    assert recorder.values()["layers.0.residual.after"].abs().max() > 0


def test_the_lab_lists_its_sites(lab):
    assert [*lab.sites][:: len(lab.sites) - 1] == ["embed", "logits"]
    assert lab.sites["layers.3.attention.pattern"].axes == "batch kv group query key"
    assert all(site.what for site in lab.sites.values())


@pytest.mark.parametrize("positions", [None, [0, 3, -1]])
@pytest.mark.parametrize("sites", [None, "*", "layers.*.attention.pattern", ["embed", "layers.2.experts.weighted"]])
def test_the_cost_is_what_it_takes(lab, sites, positions):
    expected = lab.trace_cost("Once upon a time", 7, sites, positions)
    trace = lab.trace("Once upon a time", 7, sites, positions)
    taken = {name: value.nbytes for name, value in trace.recorded.items()}
    assert taken == expected.by_site
    assert expected.bytes == sum(taken.values())
    assert f"{expected.bytes / 1e6:,.2f} MB" in repr(expected)


def test_scores_and_patterns_come_from_queries_and_keys(lab):
    derived = lab.trace("Once upon a time", 5, "layers.*.attention.pattern")
    assert {name.split(".", 2)[2] for name in derived.recorded} == {"attention.heads.query", "attention.heads.key"}
    everywhere = list(range(len(derived)))
    recorded = lab.trace("Once upon a time", 5, ["layers.*.attention.*"], positions=everywhere)
    assert "layers.0.attention.pattern" in recorded.recorded
    for what in ("layers.*.attention.pattern", "layers.*.attention.scores"):
        torch.testing.assert_close(derived[what], recorded[what], atol=1e-4, rtol=1e-4)
    some = lab.trace("Once upon a time", 5, ["layers.*.attention.pattern"], positions=[2, -1])
    torch.testing.assert_close(
        some["layers.*.attention.pattern"], derived["layers.*.attention.pattern"][..., [2, -1], :], atol=1e-4, rtol=1e-4
    )


def test_an_edited_pattern_is_recorded_as_edited(lab):
    with lab.edit({"layers.1.attention.pattern": lambda p: p.flip(-1)}):
        edited = lab.trace("Once upon a time", 0, "layers.*.attention.pattern")
    plain = lab.trace("Once upon a time", 0, "layers.*.attention.pattern")
    torch.testing.assert_close(
        edited["layers.1.attention.pattern"], plain["layers.1.attention.pattern"].flip(-1), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(edited["layers.0.attention.pattern"], plain["layers.0.attention.pattern"])


def test_recorded_tensors_are_ordinary(lab):
    trace = lab.trace("Once upon a time", 3, "layers.2.residual.after", dtype="float16")
    value = trace["layers.2.residual.after"]
    assert value.dtype == torch.float16 and not value.is_inference() and not value.requires_grad
    (value.float() @ torch.ones(256, 1, requires_grad=True)).sum().backward()  # a probe can be trained on it


def test_positions_are_checked(lab):
    with pytest.raises(mixtral_lab.generate.PromptError, match="0 to 5"):
        lab.trace("Once upon a time", 0, positions=[6])
    trace = lab.trace("Once upon a time", 0, positions=[-1, 2])
    assert trace.positions.tolist() == [2, 5]
    assert trace.experts.shape == (8, 2, 2)
    assert set(trace.frame()["position"]) == {2, 5}


def test_a_cost_without_a_text():
    config = Config(
        dim=16, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24, vocab=61, context=128,
        n_experts=4, n_choices=2,
    )  # fmt: skip
    assert (
        cost(config, ["layers.0.router.logits", "layers.0.router.experts"], 10, None, 4).bytes
        == 10 * 4 * 4 + 10 * 2 * 8
    )
    assert kept_for(["layers.0.attention.pattern"]) == (
        "layers.0.attention.heads.query",
        "layers.0.attention.heads.key",
    )


def test_two_thousand_tokens_of_routing_fit_a_megabyte(lab, tmp_path):
    texts = [one["text"] for one in mixtral_lab.bundled.excerpts()["prose"]]
    ids = lab.tokenizer.encode("\n".join(texts) * 3)[:2048]
    path = lab.trace_ids(ids).save(tmp_path / "long.safetensors")
    assert len(ids) == 2048 and path.stat().st_size < 1_000_000


def test_the_documented_table_is_the_models():
    table = (Path(__file__).parents[1] / "docs" / "sites.md").read_text("utf-8")
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    written = {row[0].strip(" `"): (row[1].strip(" `"), row[3].strip()) for row in rows if len(row) == 4}
    known = all_sites(SPARSE) | all_sites(DENSE)
    assert written == {
        name.replace("layers.0", "layers.N"): (site.axes, site.what)
        for name, site in known.items()
        if not name.startswith("layers.1")
    }


def test_two_threads_at_one_model_are_told(models):
    """The hooks hang on the model that both use: each would keep what belongs to the other."""
    model, meet, said = models["sparse"], threading.Barrier(2), []

    def read():
        with pytest.raises(SiteError, match="Several threads") as caught, recording(model):
            meet.wait()
            model(IDS)
            meet.wait()
        said.append(str(caught.value))

    both = [threading.Thread(target=read) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(said) == 2
