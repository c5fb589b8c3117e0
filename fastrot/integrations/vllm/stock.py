"""R4 in the words that vLLM itself understands, without fastrot beside it.

vLLM multiplies the input of a linear layer by a matrix where the ``transform_config`` of a
checkpoint of compressed-tensors asks for it. A deterministic Hadamard matrix of a power of two is
computed by a kernel, any other matrix is read from a tensor, ``√n`` times the block of order ``n``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastrot.edits import OnlineSite
from fastrot.errors import RotationError
from fastrot.patterns import matches
from fastrot.resolve.places import layer_of
from fastrot.rotations import Rotation
from fastrot.rotations.stages import dense
from fastrot.transform_config import TransformArgs, TransformConfig, TransformScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

R4 = "R4"
LARGEST = 1 << 15
"""Order of the largest Hadamard matrix that vLLM's kernel computes."""


@dataclass(frozen=True)
class StockScheme:
    """One matrix, and the layers whose inputs it rotates.

    Attributes:
        name: of the scheme.
        rotation: one block.
        sites: where it acts.
    """

    name: str
    rotation: Rotation
    sites: tuple[OnlineSite, ...]

    @property
    def computed(self) -> bool:
        """Whether vLLM has a kernel, which reads no matrix."""
        order = self.rotation.size
        return not self.rotation.has_operand and order & (order - 1) == 0 and order <= LARGEST

    @property
    def scheme(self) -> TransformScheme:
        """In compressed-tensors' schema; every type but ``hadamard`` is read from a tensor."""
        kind = "random-matrix" if self.rotation.dense else "random-hadamard"
        targets = tuple(pattern_of(site.module) for site in self.sites)
        inverse = self.sites[0].inverse
        return TransformScheme(
            type="hadamard" if self.computed else kind,
            apply=(
                TransformArgs(targets, "input", inverse),
                TransformArgs(targets, "weight_input", not inverse),
            ),
            head_dim=self.rotation.size,
            precision=self.sites[0].dtype,
        )

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The matrix ``√n Q``, ``(n, n)``, by the names under which vLLM's layers read it.

        vLLM keeps one for all layers; each has it in the file, as each may be the first of a
        pipeline's rank. What no kernel reads is there once: a vLLM that does not know the layer
        refuses the tensor, instead of leaving the rotation out.
        """
        matrix = (dense(self.rotation.stages()) * self.rotation.size**0.5).to(dtype)
        sites = self.sites[:1] if self.computed else self.sites
        return {f"{site.module}.{self.name}_input.weight": matrix for site in sites}

    def __str__(self) -> str:
        way = "vLLM's kernel" if self.computed else f"a dense matrix of order {self.rotation.size}"
        return f"{self.name}: {self.sites[0].rotation}, {len(self.sites)} layers, by {way}"


def stock_schemes(model: "PreTrainedModel", sites: Sequence[OnlineSite]) -> tuple[StockScheme, ...]:
    """The schemes by which vLLM rotates as these sites do.

    Args:
        model: without weights.
        sites: its online rotations, with their matrices.

    Raises:
        RotationError: a site that vLLM alone can't rotate, and the way out.
    """
    groups: dict[tuple[Rotation, bool, torch.dtype], list[OnlineSite]] = {}
    for site in sites:
        _check(model, site)
        block = replace(site.rotation, size=site.rotation.block, block_size=None)
        groups.setdefault((block, site.inverse, site.dtype), []).append(site)
    _check_targets(model, {site.module for site in sites})
    names = [R4] if len(groups) == 1 else [f"{R4}_{n}" for n in range(len(groups))]
    return tuple(
        StockScheme(name, block, tuple(found))
        for name, ((block, *_), found) in zip(names, groups.items(), strict=True)
    )


def transform_config(schemes: Iterable[StockScheme]) -> TransformConfig:
    """What stands in ``quantization_config``."""
    return TransformConfig({scheme.name: scheme.scheme for scheme in schemes})


def pattern_of(module: str) -> str:
    """The module by what vLLM calls it, too: the names of what is around the layers may differ."""
    parts, layer = module.split("."), layer_of(module)
    start = next(i for i in range(len(parts)) if ".".join(parts[i:]).startswith(layer))
    return rf"re:.*\b{re.escape('.'.join(parts[start:]))}$"


def _check(model: "PreTrainedModel", site: OnlineSite) -> None:
    module = model.get_submodule(site.module)
    if site.group != R4:
        kept = ", or without keep_head where that asked for it" if site.group == "R1" else ""
        raise RotationError(
            f"{site.group} is online ({site.location} of {site.module}), and of online rotations "
            f"vLLM alone computes R4; rotate without {site.group}{kept}, or serve the checkpoint "
            "as it is with fastrot beside vLLM"
        )
    problem = None
    if site.location != "input" or ".experts." in site.module:
        problem = "belongs to experts"
    elif not isinstance(module, nn.Linear):
        problem = f"is a {type(module).__name__}"
    elif module.bias is not None:
        problem = "has a bias"
    if problem is not None:
        raise RotationError(
            f"{site.module} {problem}, and vLLM alone rotates the input of linear layers without "
            "a bias; rotate without R4, or serve the checkpoint as it is with fastrot beside vLLM "
            "or in transformers"
        )


def _check_targets(model: "PreTrainedModel", rotated: set[str]) -> None:
    patterns = {pattern_of(name) for name in rotated}
    for name, _ in model.named_modules():
        if name not in rotated and any(matches(name, pattern) for pattern in patterns):
            raise RotationError(
                f"vLLM can't tell {name}, which is not rotated, from a layer that is, as both have "
                "the same name in their towers; serve the checkpoint as it is with fastrot beside "
                "vLLM"
            )
