"""Every checker accepts the solution, knows the stub, and has a word of its own for each usual mistake."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixtral_lab.exercises import check_fused_expert, check_our_name, check_shared_head

ROLES = {"w1": "gate", "w2": "down", "w3": "up"}


def our_name(name, roles=ROLES):
    _, _, layer, _, _, expert, matrix, _ = name.split(".")
    return f"layers.{layer}.experts.ffn.{expert}.{roles[matrix]}.weight"


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (our_name, True, "keep their numbers"),
        (lambda name: None, None, "still returns None"),
        (lambda name: 7, False, "Return a name"),
        (lambda name: "model." + our_name(name), False, "do not begin with 'model.'"),
        (lambda name: our_name(name, {"w1": "gate", "w2": "up", "w3": "down"}), False, "w2 is down"),
        (lambda name: "layers.0.experts.ffn.0.gate.weight", False, "but it is 'layers.3"),
        (lambda name: our_name(name).replace("layers.12", "layers.1"), False, "number of digits"),
        (lambda name: our_name(name).removesuffix(".weight"), False, "but it is"),
        (lambda name: name[99], False, "IndexError"),
    ],
)
def test_our_name(answer, solved, says):
    verdict = check_our_name(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


def fused(x, gate_up_proj, down_proj, expert, act=F.silu, swap=False, of=None):
    gate, up = gate_up_proj[expert].chunk(2)
    gate, up = (up, gate) if swap else (gate, up)
    return (act(x @ gate.T) * (x @ up.T)) @ down_proj[expert if of is None else of].T


def every_second(x, gate_up_proj, down_proj, expert):
    gate, up = gate_up_proj[expert, ::2], gate_up_proj[expert, 1::2]
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down_proj[expert].T


def silu_of_the_product(x, gate_up_proj, down_proj, expert):
    gate, up = gate_up_proj[expert].chunk(2)
    return F.silu((x @ gate.T) * (x @ up.T)) @ down_proj[expert].T


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (fused, True, "One slice of each"),
        (lambda *given: None, None, "still returns None"),
        (lambda *given: fused(*given, swap=True), False, "exchanged"),
        (every_second, False, "every second row"),
        (lambda *given: fused(*given, act=lambda it: it), False, "through silu"),
        (silu_of_the_product, False, "not to the product"),
        (lambda x, gate_up, down, expert: fused(x, gate_up, down, 0), False, "That is expert 0"),
        (lambda *given: fused(*given, of=0), False, "down is of another"),
        (lambda *given: 2 * fused(*given), False, "off by up to"),
        (lambda x, gate_up, down, expert: x @ gate_up[expert].T, False, "not shape (4, 10)"),
        (lambda *given: "expert", False, "not 'expert'"),
        (lambda x, gate_up, down, expert: x @ gate_up[expert], False, "RuntimeError"),
    ],
)
def test_fused_expert(answer, solved, says):
    verdict = check_fused_expert(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


def test_the_fused_expert_is_the_one_that_transformers_runs():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts = MixtralExperts(MixtralConfig(hidden_size=6, intermediate_size=5, num_local_experts=3))
    x = torch.randn(4, 6)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_()
        theirs = experts(x, torch.full((4, 1), 2), torch.ones(4, 1))
        torch.testing.assert_close(fused(x, experts.gate_up_proj, experts.down_proj, 2), theirs)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda head, heads, kv: head // (heads // kv), True, "head // group"),
        (lambda head, heads, kv: None, None, "still returns None"),
        (lambda head, heads, kv: head % kv, False, "runs and is wrong"),
        (lambda head, heads, kv: head % (heads // kv), False, "inside the group"),
        (lambda head, heads, kv: head // kv, False, "how many share one"),
        (lambda head, heads, kv: head / 2, False, "with //"),
        (lambda head, heads, kv: 0, False, "look at [0, 0, 1, 1, 2, 2, 3, 3]"),
        (lambda head, heads, kv: [][head], False, "IndexError"),
        (lambda head, heads, kv: head // 2, False, "With 12 query heads"),
    ],
)
def test_shared_head(answer, solved, says):
    verdict = check_shared_head(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)
