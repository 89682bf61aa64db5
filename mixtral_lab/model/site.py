"""Places in the model that have a name, where one can look and lay hands on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from mixtral_lab.model.module import Module, as_made, last_change


class Site(Module):
    """Lets a value pass. A PyTorch forward hook on it reads the value, or returns another to take its place.

    What else is known at this place (`known`) is handed to the hook with it. `sites.py` lists every site by name.
    """

    def forward(self, value: Tensor, *known: Tensor) -> Tensor:
        return value

    def __call__(self, value: Tensor, *known: Tensor) -> Any:
        """PyTorch's own call takes a microsecond; a model has hundreds of sites, and most have no hook."""
        if asked(self):
            return super().__call__(value, *known)
        return value

    @property
    def watched(self) -> bool:
        return watched(self)


def asked(site: nn.Module) -> bool:
    """Whether what passes a site must be shown to somebody: it is watched, or another module stands in its place."""
    return not as_made(site, Site) or watched(site)


def watched(module: nn.Module) -> bool:
    """Whether anybody looks at what passes here."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def free_of_hooks(module: nn.Module) -> bool:
    """Whether nobody looks anywhere inside. Asked at every step, so it looks only if a hook was made, or a part set, since
    last time.

    PyTorch numbers the hooks that it makes, in all modules together.
    """
    made = RemovableHandle.next_id, last_change()
    if module.__dict__.get("_free_of_hooks_at") == made:
        return True
    free = not _has_any_global_hook() and not any(watched(inner) for inner in module.modules())
    module.__dict__["_free_of_hooks_at"] = made if free else None  # set aside: it is no change
    return free
