"""Matrix times vector, by the fastest road this machine has. Everything learned in the model is one of these.

Which road that is was measured on AMD's processors (Zen 4 and Zen 5) and on Intel's (Sapphire Rapids); others are taken for
the second kind. `portable()` leaves all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mixtral_lab.model.module import Module, as_made
from mixtral_lab.model.site import free_of_hooks

TINY = 2**15  # numbers in a matrix; up to here one core alone is the quickest
SWEPT = {torch.float32: 2**19, torch.bfloat16: 2**17}  # numbers; smaller ones are swept (`small_products`) ...
WIDENED = 2**17  # ... or widened from bfloat16: oneDNN needs 13 to 25 microseconds to start
ROWS = 32  # oneDNN compiles a kernel for every number of rows it meets; rounding rows up keeps them few
PACKED_ROWS = 4  # of one row oneDNN makes less than of four: 0.94 of a decode step on Zen 4 (eight: 1.07)
TURNED = 384  # rows; up to here products are turned over where AMX is (`_product`) ...
LARGE = 2**19  # ... if the matrix has so many numbers
PLACES = 4  # at which a compiled step reads such a matrix at once (`dots`)
_tuned = True


class Linear(Module, nn.Linear):
    """`out = x @ weight.T`, without a bias, as everywhere in Mistral's models."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out, bias=False)
        self.packed: Packed | None = None

    def forward(self, x: Float[Tensor, "*rows features_in"]) -> Float[Tensor, "*rows features_out"]:
        packed = None if torch.compiler.is_compiling() else self.packed
        if packed is not None and packed.serves(x, self):
            return packed.product(x)
        return linear(x, self.weight)

    def row(self, x: Float[Tensor, " features_in"]) -> Float[Tensor, " features_out"]:
        """The same for one row, in float32."""
        packed = self.packed
        if packed is not None and packed.serves(x, self):
            return packed.row(x)
        return row(x, self._parameters["weight"])  # type: ignore[arg-type]  # found at once, unlike self.weight


class Packed(NamedTuple):
    """One or several weights, one below the other, in the order in which oneDNN multiplies them fastest, and the place and version
    of each that it is a copy of. The first of them keeps it.
    """

    weight: Tensor
    of: tuple[tuple[int, int], ...]

    def serves(self, x: Tensor, *linears: Linear) -> bool:
        """Whether this may stand for these, all of them. Not if a weight has changed since (then it is given up), for many
        rows, or where somebody wants gradients, which PyTorch's operator loses.
        """
        if len(linears) != len(self.of) or not _tuned or torch.is_grad_enabled() or x.numel() >= ROWS * x.shape[-1]:
            return False
        for one, was in zip(linears, self.of, strict=True):
            if _version(one) != was:
                linears[0].packed = None
                return False
        return True

    def product(self, x: Float[Tensor, "*rows features_in"]) -> Float[Tensor, "*rows features_out"]:
        """What they make of a few rows, side by side."""
        flat = x.reshape(-1, x.shape[-1])
        more = max(0, PACKED_ROWS - len(flat))
        out = torch.ops.mkldnn._linear_pointwise(F.pad(flat, (0, 0, 0, more)), self.weight, None, "none", [], "")
        return out[: len(flat)].view(*x.shape[:-1], -1)

    def row(self, x: Float[Tensor, " features_in"]) -> Float[Tensor, " features_out"]:
        """The same for one row, in float32, by the fewest operations."""
        same = x.expand(PACKED_ROWS, -1).to(torch.bfloat16)
        return torch.ops.mkldnn._linear_pointwise(same, self.weight, None, "none", [], "")[0].float()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy of a model does without: oneDNN's tensors can be neither copied nor saved."""
        return type(None), ()


def _version(one: Linear) -> tuple[int, int]:
    weight: Any = one._parameters["weight"]
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def fed_alike(
    x: Float[Tensor, "*rows features_in"], *linears: nn.Module
) -> Sequence[Float[Tensor, "*rows features_out"]]:
    """What each of several makes of the same rows: in one product if their weights were packed together (`pack`)."""
    packed = None if torch.compiler.is_compiling() else getattr(linears[0], "packed", None)
    if packed is not None:
        ours = [one for one in linears if isinstance(one, Linear) and as_made(one, Linear) and free_of_hooks(one)]
        if len(ours) == len(linears) and packed.serves(x, *ours):
            return packed.product(x).split([one.out_features for one in ours], dim=-1)
    return [one(x) for one in linears]


def row_fed_alike(x: Float[Tensor, " features_in"], *linears: Linear) -> Sequence[Float[Tensor, " features_out"]]:
    """`fed_alike` for one row, in float32."""
    packed = linears[0].packed
    if packed is not None and packed.serves(x, *linears):
        return packed.row(x).split([one.out_features for one in linears])
    return [one.row(x) for one in linears]


def pack(model: nn.Module) -> int:
    """Keep a packed copy of every large bfloat16 matrix on the CPU beside it, for steps of a few tokens; the bytes it takes.

    It doubles the memory; matrices that are quicker swept (`SWEPT`) stay as they are. Those that a module feeds with the same rows
    (`FED_ALIKE`) are packed together. On an AMD processor (Zen 4) a decode step of a 0.75 B model took 31 ms instead of 45, paired
    in one process; elsewhere, and where PyTorch's private operator for it is missing, nothing happens. A weight that is changed
    afterwards loses its copy, and where gradients are wanted the copies are not used.
    """

    def large(one: object) -> bool:
        if not isinstance(one, Linear) or one.weight.device.type != "cpu" or one.weight.dtype != torch.bfloat16:
            return False
        # Changes to what was made in inference mode cannot be noticed.
        return one.weight.numel() >= SWEPT[torch.bfloat16] and not one.weight.is_inference()

    groups: dict[Linear, list[Linear]] = {}  # by each of their members; a module comes before its parts
    for module in model.modules():
        alike = [getattr(module, name) for name in getattr(module, "FED_ALIKE", ())]
        if alike and all(large(one) for one in alike):
            groups |= dict.fromkeys(alike, alike)
        elif isinstance(module, Linear) and large(module):
            groups.setdefault(module, [module])
    if not (groups and amd() and packing_works()):
        return 0
    taken = 0
    for first, group in groups.items():
        first.packed = None
        if first is group[0]:
            weight = torch.cat([one.weight.detach() for one in group])
            copy = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
            first.packed = Packed(copy, tuple(_version(one) for one in group))
            taken += weight.numel() * weight.itemsize
    return taken


def linear(
    x: Float[Tensor, "*rows features_in"], weight: Float[Tensor, "features_out features_in"]
) -> Float[Tensor, "*rows features_out"]:
    """Multiply by a weight matrix. Inference on a CPU takes a shorter road than `F.linear` where one pays.

    A single row is a matter of starting little and reading the matrix once: `row` says how. For many rows,
    PyTorch's float32 product runs at half of oneDNN's speed on an AMD processor. That operator is private to PyTorch, so
    `onednn_works` tries it once and `F.linear` stays the way back. In bfloat16 `F.linear` is oneDNN's product already; there
    and with oneDNN's own, the number of rows is rounded up (`ROWS`), and large products of few rows are turned over where
    that pays (`_product`).
    """
    if torch.compiler.is_compiling():
        if x.numel() != x.shape[-1]:
            return F.linear(x, weight)
        return dots(weight, settled(x.view(-1).float())).to(x.dtype).view(*x.shape[:-1], -1)
    if x.dtype == torch.float32 and not amd():
        return F.linear(x, weight)
    if single(x) and _tuned and x.dtype in SWEPT and x.dtype == weight.dtype:
        return row(x.reshape(-1).float(), weight).to(x.dtype).view(*x.shape[:-1], -1)
    if not rounds_up(x) or x.dtype != weight.dtype:
        return F.linear(x, weight)
    rows = x.numel() // x.shape[-1]
    few = rows < ROWS and weight.numel() < SWEPT[torch.float32]
    if x.dtype == torch.float32 and (few or torch.is_autocast_enabled("cpu")):
        return F.linear(x, weight)
    missing = rounded_up(rows, ROWS) - rows
    # A text's rows have batch and seq. (Those of attention by heads have not, but an AMD processor has no AMX.)
    of_expert = x.dim() == 2
    if not missing:
        return _product(x, weight, of_expert)
    flat = x.reshape(rows, -1)
    return _product(torch.cat((flat, flat[:missing])), weight, of_expert)[:rows].reshape(*x.shape[:-1], -1)


def row(
    x: Float[Tensor, " features_in"], weight: Float[Tensor, "features_out features_in"]
) -> Float[Tensor, " features_out"]:
    """A single row times a matrix, both ways in float32, whatever the matrix is.

    By size, dtype and processor; each limit is where two roads took the same time.
    """
    numbers, swept = weight.numel(), _tuned and amd()
    if weight.dtype == torch.float32 and (not swept or numbers <= TINY):
        return torch.mv(weight, x)
    if not _tuned:
        return F.linear(x.to(weight.dtype)[None], weight)[0].float()
    if numbers <= (TINY if swept else WIDENED):
        return torch.mv(weight.float(), x)
    if not swept:
        return torch.mv(weight, x.to(weight.dtype)).float()
    if numbers < SWEPT.get(weight.dtype, 0):
        return small_products(weight[None], x.view(1, 1, -1)).view(-1)
    return _product(x.to(weight.dtype)[None], weight)[0].float()


def dots(
    matrix: Float[Tensor, "*places features_out features_in"],
    vector: Float[Tensor, "*places #features_out features_in"],
) -> Float[Tensor, "*places features_out"]:
    """Every row's dot product with a vector, in float32, written out as multiply and sum: compiled, one loop that reads the
    matrix once.

    A large matrix is cut into parts of consecutive rows that are read side by side: a step of a 0.75 B model takes 0.8 (float32)
    and 0.65 (bfloat16) of the time on a Xeon. Probably because a processor fetches ahead to the end of a page (4 KiB) only.
    """
    out, features = matrix.shape[-2:]
    if not (torch.compiler.is_compiling() and matrix.is_cpu) or out * features < LARGE or out % PLACES:
        return (matrix.float() * vector).sum(-1)
    parts = matrix.unflatten(-2, (PLACES, -1)).unbind(-3)
    return torch.cat([(part.float() * vector).sum(-1) for part in parts], dim=-1)


def rounds_up(x: Tensor) -> bool:
    """Whether products with this are oneDNN's, which wants a round number of many rows."""
    if not _tuned or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and amd() and onednn_works())


def rounded_up(rows: int, multiple: int) -> int:
    """The next multiple; of twice that from eight on, where it costs little more; fewer rows than one stay as they are."""
    if multiple > 1 and rows > 8 * multiple:
        multiple *= 2
    return rows + (-rows % multiple if rows >= multiple else 0)


def small_products(
    weight: Float[Tensor, "expert features_out features_in"], x: Float[Tensor, "expert 1 features_in"]
) -> Float[Tensor, "expert 1 features_out"]:
    """A row times a small matrix, for each of a few; bfloat16 is widened first, the result is float32.

    On an AMD processor, where PyTorch's product with a vector keeps one core busy, in two sweeps over the matrices: a product
    and a sum, which all cores share alike, so that the second finds in a core's cache what the first left there.
    """
    if amd():
        return (weight * x.float()).sum(-1).unsqueeze(1)
    return torch.bmm(x.float(), weight.float().mT)


def _product(x: Tensor, weight: Tensor, of_expert: bool = False) -> Tensor:
    """By oneDNN, whichever operator leads to it.

    A processor that multiplies tiles of bfloat16 numbers (AMX) wants the second factor in a special order, and every product
    begins with bringing it there. Turned over, `out.T = weight @ x.T`, that is the smaller factor while there are few rows: 128
    rows and the matrices of Mixtral 8x7B take 0.8 of the time. What comes out lies column by column, which does no harm
    to the rows of an expert; what attention and the sites get is laid out as ever.
    """
    if x.dtype == torch.float32 and amd() and onednn_works():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    if x.dtype == torch.bfloat16 and of_expert and amx() and len(x) <= TURNED and weight.numel() >= LARGE:
        return torch.mm(weight, x.T).T
    return F.linear(x, weight)


def single(x: Tensor) -> bool:
    """Whether this is one token alone, on a CPU, and nobody wants gradients or a compiled step.

    What is done with it takes less time than PyTorch needs to start an operation, so the fewest operations are the quickest.
    """
    alone = x.is_cpu and x.numel() == x.shape[-1] and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return alone and not torch.is_autocast_enabled("cpu")  # which would mix dtypes in what is added up in float32


def settled(x: Tensor) -> Tensor:
    """The same values; compiled code computes them once, here, and not again wherever they are used.

    Left to itself, the compiler would compute a vector anew for each row of the matrix that it is multiplied with.
    """
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


def tuned() -> bool:
    """Whether shorter roads than plain PyTorch's may be taken."""
    return _tuned


@contextmanager
def portable() -> Iterator[None]:
    """While open, nothing but plain PyTorch: what the model does where the shorter roads do not exist."""
    global _tuned
    before, _tuned = _tuned, False
    try:
        yield
    finally:
        _tuned = before


@functools.cache
def amd() -> bool:
    """Whether this is one of AMD's processors: PyTorch's own products on x86 are MKL's, which is at home on Intel's."""
    about: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMD" in about.get("cpu_name", "") or bool(about.get("sse4a"))  # which only AMD's have


@functools.cache
def wide() -> bool:
    """Whether this is one of AMD's processors since Zen 5, whose units are 512 bits wide: there oneDNN's float32 product is
    twice as fast as PyTorch's own, on Zen 4 1.3 times.

    They are told apart by an instruction (VP2INTERSECT) that AMD's earlier ones lack. Checked on a Zen 4 only.
    """
    about: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return amd() and bool(about.get("avx512_vp2intersect"))


@functools.cache
def amx() -> bool:
    """Whether this processor multiplies tiles of bfloat16 numbers: some of Intel's do."""
    about: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(about.get("amx_bf16"))


@functools.cache
def onednn_works() -> bool:
    """Whether oneDNN's linear operator is present here and agrees with PyTorch's own."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 8, generator=generator, device="cpu") for n in (3, 5))
    try:
        out = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(out, F.linear(x, weight), atol=1e-5)


@functools.cache
def packing_works() -> bool:
    """Whether oneDNN's packed bfloat16 product is present here and agrees with PyTorch's own."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator, device="cpu").bfloat16() for n in (1, 96))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        out = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(out.float(), F.linear(x, weight).float(), atol=0.1)
