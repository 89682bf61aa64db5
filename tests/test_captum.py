"""Tools that know nothing of this package find its sites: captum reads and attributes by them."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerActivation, LayerIntegratedGradients

import mixtral_lab
from mixtral_lab.lab import Lab


@pytest.fixture(scope="module")
def lab() -> Lab:
    return mixtral_lab.load("mini-mixtral")


def test_captum_reads_what_a_trace_records(lab):
    trace = lab.trace("Once upon a time", 0, "layers.*")
    ids = trace.ids[None]
    for name in ("layers.2.residual.after", "layers.2.experts.weighted", "layers.2.attention.heads.out"):
        seen = LayerActivation(lab.model, lab.model.get_submodule(name)).attribute(ids)
        torch.testing.assert_close(seen[0].detach(), trace[name], atol=1e-4, rtol=1e-4)


def test_integrated_gradients_add_up(lab):
    """At a site through which everything flows, attributions sum to the change of the target's logit (completeness,
    arXiv 1703.01365, section 3). Before a router that changes its choices on the way, they need not: it jumps.
    """
    ids = torch.tensor([lab.tokenizer.encode("Once upon a")])
    target = lab.tokenizer.encode(" time", bos=False)[0]

    def score(given: torch.Tensor) -> torch.Tensor:
        return lab.model(given)[:, -1, target]

    method = LayerIntegratedGradients(score, lab.model.get_submodule("layers.7.residual.between"))
    parts = method.attribute(ids, torch.zeros_like(ids), n_steps=200)
    with torch.no_grad():
        change = score(ids) - score(torch.zeros_like(ids))
    assert parts.shape[:2] == ids.shape
    assert change.abs().item() > 1
    torch.testing.assert_close(parts.sum(), change[0], atol=0.15 * change.abs().item(), rtol=0)
