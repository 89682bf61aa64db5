"""Routing of the real Mixtral 8x7B on MMLU, recorded by others, where that file lies beside the repository.

`mixtral-8x7b-mmlu-shares.safetensors` holds, for 19 subjects, each question's shares of top-2 assignments
`question layer expert`; it comes from github.com/ajtejankar/mixtral-vis-moe (Apache-2.0).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mixtral_lab import figures
from mixtral_lab.analysis import domain_divergence, mean_divergence, mean_shares, share_entropy

SHARES = Path(__file__).parents[2] / "shared" / "realdata" / "mixtral-8x7b-mmlu-shares.safetensors"
pytestmark = pytest.mark.skipif(not SHARES.is_file(), reason="the recorded shares are not there")


@pytest.fixture(scope="module")
def subjects() -> dict[str, np.ndarray]:
    return load_file(SHARES)


def test_entropy_of_the_mean_share(subjects):
    """Over all questions alike: 2.8562 bits in layer 11 to 2.9990 in layer 2, of 3."""
    questions = np.concatenate(list(subjects.values()))
    assert questions.shape == (5235, 32, 8) and len(subjects) == 19
    (_,), everywhere = mean_shares({"all": questions})
    entropy = share_entropy(everywhere[0])
    assert (int(entropy.argmin()), int(entropy.argmax())) == (11, 2)
    assert (round(float(entropy.min()), 4), round(float(entropy.max()), 4)) == (2.8562, 2.9990)


def test_divergence_of_subjects(subjects):
    """Lowest in layer 0, 0.0062 bits, and highest in layer 9, 0.0198, over all pairs of subjects."""
    _, shares = mean_shares(subjects)
    apart = mean_divergence(domain_divergence(shares))
    assert (int(apart.argmin()), int(apart.argmax())) == (0, 9)
    assert (round(float(apart.min()), 4), round(float(apart.max()), 4)) == (0.0062, 0.0198)


def test_subjects_against_experts(subjects):
    names, shares = mean_shares(subjects)
    figure = figures.domain_experts(shares, names, layers=[0, 9, 31], model="Mixtral 8x7B", dtype="dtype not recorded")
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(maps) == 3
    for heat, layer in zip(maps, (0, 9, 31), strict=True):
        np.testing.assert_allclose(np.array(heat.z), shares[:, layer], atol=1e-6)
        assert list(heat.y) == list(names)
