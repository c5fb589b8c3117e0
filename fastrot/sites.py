"""Where a weight meets the activations: which dimension of which parameter is input, which output.

=====================  ======================  =====  ======
holder                 weight                  input  output
=====================  ======================  =====  ======
``nn.Linear``, router  ``(out, in)``           1      0
``nn.Embedding``       ``(count, out)``               1
``Conv1D``             ``(in, out)``           0      1
bare matrix            ``(out, in)``           1      0
bare, transposed       ``(in, out)``           0      1
stacked experts        ``(experts, out, in)``  2      1
stacked, transposed    ``(experts, in, out)``  1      2
bare vector            ``(out,)``                     0
=====================  ======================  =====  ======
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from fastrot.errors import RotationError
from fastrot.index import Index, find_holders


@dataclass(frozen=True)
class Site:
    """A weight, its bias, and its dimensions.

    Attributes:
        name: of the module, or of a bare parameter.
        module: the module, or the owner of a bare parameter.
        weight: full name of the parameter.
        shape: of the weight.
        output: dimension along which the outputs lie.
        input: dimension along which the inputs lie; None if there are none.
        bias: full name of the bias, ``(…, out)``, or None.
    """

    name: str
    module: nn.Module
    weight: str
    shape: tuple[int, ...]
    output: int
    input: int | None = None
    bias: str | None = None

    @property
    def is_bare(self) -> bool:
        """Whether the weight is a parameter of a module that is more than this weight."""
        return self.name == self.weight


def find_sites(
    model: nn.Module | Index,
    patterns: Iterable[str],
    ignore: Iterable[str] = (),
    *,
    group: str = "",
    transposed: bool = False,
    missing_ok: bool = False,
) -> dict[str, Site]:
    """The sites that patterns name, in the model's order.

    Args:
        model: where to look.
        patterns: of modules or bare parameters.
        ignore: patterns to leave out.
        group: the rotation that asks, for errors.
        transposed: bare matrices are ``(in, out)``.
        missing_ok: let patterns match nothing.

    Raises:
        NoMatchError: one of the patterns names nothing.
        RotationError: a module that holds no weight of a known form.
    """
    index = Index.of(model)
    found = find_holders(index, patterns, ignore, missing_ok=missing_ok)
    return {
        name: site_of(index, name, holder, group=group, transposed=transposed)
        for name, holder in found.items()
    }


def holds_itself(name: str, module: nn.Module) -> bool:
    """Whether an online rotation at a module lies on it: on a norm, or a layer in a list.

    Whatever else has an input is linear; tools may swap it, so the block around it holds what acts
    there. A quantizer's layer says so itself: its weight may have any shape.
    """
    if isinstance(getattr(module, "in_features", None), int):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.dim() == 1
    return weight is None and name.rpartition(".")[2].isdigit()


def site_of(
    index: Index,
    name: str,
    holder: nn.Module | nn.Parameter,
    *,
    group: str = "",
    transposed: bool = False,
) -> Site:
    """The site of one module or bare parameter; the rest as for :func:`find_sites`."""
    if isinstance(holder, nn.Parameter):
        return _of_parameter(index, name, holder, transposed)
    return _of_module(group, name, holder)


def _of_module(group: str, name: str, module: nn.Module) -> Site:
    from transformers.pytorch_utils import Conv1D

    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) and isinstance(module, (nn.Linear, nn.Embedding)):
        raise RotationError(
            f"{group}: {name} has a 'weight' that is no parameter (quantized or parametrized?); "
            "rotate the plain model first"
        )
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise RotationError(
            f"{group}: {name} is a {type(module).__name__}; fused rotations act on nn.Linear, "
            "nn.Embedding, Conv1D, routers and bare parameters"
        )
    bias = getattr(module, "bias", None)
    if bias is not None and module._parameters.get("bias") is None:
        raise RotationError(
            f"{group}: {name} has a 'bias' that is no parameter (quantized or parametrized?); "
            "rotate the plain model first"
        )
    # A router may own more than its matrix; each further parameter needs a role of its own.
    further = [n for n, _ in module.named_parameters() if n not in ("weight", "bias")]
    if further and isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
        raise RotationError(
            f"{group}: {name} ({type(module).__name__}) has further parameters, "
            f"{', '.join(further)}, which are not rotated (an adapter?); merge them first"
        )
    into, out = (1, 0)
    if isinstance(module, nn.Embedding):
        into, out = None, 1  # type: ignore[assignment]
    elif isinstance(module, Conv1D):
        into, out = 0, 1
    return Site(
        name=name,
        module=module,
        weight=f"{name}.weight",
        shape=tuple(weight.shape),
        input=into,
        output=out,
        bias=None if bias is None else f"{name}.bias",
    )


def _of_parameter(index: Index, name: str, weight: nn.Parameter, transposed: bool) -> Site:
    owner, _, leaf = name.rpartition(".")
    module = index.modules[owner]
    bias = (
        f"{name}_bias" if isinstance(getattr(module, f"{leaf}_bias", None), nn.Parameter) else None
    )
    into: int | None
    if weight.dim() == 1:
        into, out = None, 0
    elif weight.dim() == 2:
        into, out = (0, 1) if transposed else (1, 0)
    elif weight.dim() == 3:
        into, out = (1, 2) if _is_transposed(name, module) else (2, 1)
    else:
        raise RotationError(f"{name} has {weight.dim()} dimensions; a bare weight has one to three")
    return Site(name, module, name, tuple(weight.shape), out, into, bias)


def _is_transposed(name: str, experts: nn.Module) -> bool:
    """Whether stacked experts hold ``(in, out)``: their own word, or the shapes of both weights."""
    known = getattr(experts, "is_transposed", None)
    if isinstance(known, bool):
        return known
    sizes = getattr(experts, "output_size", None), getattr(experts, "input_size", None)
    shape = tuple(getattr(experts, name.rpartition(".")[2]).shape[1:])
    if shape in (sizes, sizes[::-1]):
        return shape != sizes
    up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if up is not None and down is not None and up.dim() == down.dim() == 3:
        if up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]:
            return True
        if up.shape[2] == down.shape[1] and up.shape[1] == 2 * down.shape[2]:
            return False
    raise RotationError(
        f"{name}: can't tell whether these experts are (out, in) or (in, out); give "
        f"{type(experts).__name__} an attribute is_transposed"
    )
