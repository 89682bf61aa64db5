"""Every test runs with the shapes and types of the signatures checked, and without a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

if os.environ.get("MIXTRAL_LAB_SHAPES") != "off":  # what checks shapes cannot be compiled
    install_import_hook("mixtral_lab", "beartype.beartype")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("lab", deadline=None, max_examples=20, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("lab")


@pytest.fixture(scope="module", params=["AMD", "another"])
def processor(request):
    """Whichever processor this is: the model takes the roads of an AMD processor, then those of any other."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("linear", "bands"):
            for asked in ("amd", "wide"):
                patch.setattr(f"mixtral_lab.model.{module}.{asked}", lambda: request.param == "AMD")
        yield request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
