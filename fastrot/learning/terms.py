"""Which sites and which weights each of R1, R2 and R3 turns, of a model that Hadamard turned.

Everything is relative to that: a learned ``R`` comes behind the rotation that is there already, so
``Q R`` is what the model gets in the end.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastrot.coverage import some
from fastrot.edits import Plan
from fastrot.edits.steps import Part, Rotate
from fastrot.errors import RotationError
from fastrot.heads import lenders_of
from fastrot.index import Index
from fastrot.lab.quantized import decoder_layers, layer_of, linears_of
from fastrot.lab.schemes import Scheme
from fastrot.learning.capture import Captured
from fastrot.learning.objective import Term, Vectors, Weight
from fastrot.rotations import Rotation

SITES = {"R1": ("attention", "mlp"), "R2": ("o", "values"), "R3": ("keys", "latents")}
"""What the rotations that can be learned turn."""

LEFT_BY_GPTQ = 0.2
"""The share of the cost of rounding weights to nearest that is left: of SmolLM2's 0.98 predicted
nats 0.13 are. Beside activations in 4 bits, 0 and 1 learned as good rotations, but for luck."""

Place = tuple[str, int | None]
"""A rotation: its name and, but for R1, its layer; a layer that uses the keys and values of another
has the rotations of that one."""


def bases(plan: Plan, model: Any) -> dict[str, dict[int | None, Rotation]]:
    """The rotations of a plan by name and layer; R1 has one, of the layer None."""
    layers, lent = decoder_layers(model), _lent(model)
    found: dict[str, dict[int | None, Rotation]] = {name: {} for name in SITES}
    for edit in plan.weights:
        for step in edit.steps:
            if isinstance(step, Rotate) and step.group in found:
                _, layer = _place(step.group, layer_of(edit.parameter, layers), lent)
                found[step.group][layer] = step.rotation
    for site in plan.online:
        if site.group == "R3":
            _, layer = _place("R3", layer_of(site.module, layers), lent)
            found["R3"][layer] = site.rotation
    return {
        name: dict(sorted(each.items(), key=lambda item: item[0] or 0))
        for name, each in found.items()
        if each
    }


def check_one_order(rotations: Mapping[str, Mapping[int | None, Rotation]]) -> None:
    """Refuse rotations that differ in size between layers: their matrices are of one order.

    Raises:
        RotationError: names the rotation, the layers with each size, and the ways out.
    """
    for name, each in rotations.items():
        layers: dict[int, list[str]] = defaultdict(list)
        for layer, base in each.items():
            layers[base.block].append(str(layer))
        if len(layers) > 1:
            found = " and ".join(f"{size} in {some(at)}" for size, at in layers.items())
            common = math.gcd(*layers)
            way = f"give block_size={{{name!r}: {common}}}, which divides all, or "
            raise RotationError(
                f"{name} can't be learned: a list of matrices has one order, and its orders by "
                f"layers are {found}; {way if common > 1 else ''}leave {name} out"
            )


def _lent(model: Any) -> dict[int | None, int | None]:
    """The layers that use the keys and values of another, and which."""
    layers = decoder_layers(model)
    lenders = lenders_of(Index(model)).items()
    return {layer_of(block, layers): layer_of(lender, layers) for block, lender in lenders}


def _place(group: str, layer: int | None, lent: Mapping[int | None, int | None]) -> Place:
    return group, None if group == "R1" else lent.get(layer, layer)


def terms_of(model: Any, plan: Plan, scheme: Scheme, captured: Captured) -> dict[Place, list[Term]]:
    """The terms of every rotation: by its name and layer.

    Args:
        model: rotated by the plan.
        plan: what was done.
        scheme: decides which terms there are.
        captured: of the rotated model.
    """
    found: dict[Place, list[Term]] = defaultdict(list)
    lent = _lent(model)
    for group, sites in SITES.items():
        for (site, layer), sample in captured.samples.items():
            numbers = scheme.at(site)
            if site in sites and numbers is not None and sample.shares.any():
                found[_place(group, layer, lent)].append(Vectors(sample, numbers))
    if scheme.weights is not None:
        left = LEFT_BY_GPTQ if scheme.weights.gptq else 1
        for turn in turns_of(model, plan):
            # One of a fused projection mixes few of its rows; some modules wait for images.
            if turn.part is None and turn.name in captured.weights:
                energy = left * captured.weights[turn.name] * len(turn.matrix) / 2
                term = Weight(turn.matrix, energy, scheme.weights, turn.outputs)
                found[turn.place].append(term)
    return dict(found)


class Turn(NamedTuple):
    """What a rotation does to a linear module.

    Attributes:
        name: of the module.
        place: the rotation.
        outputs: whether the outputs are turned, not the inputs.
        part: of the outputs; None for all.
        matrix: the weight, ``(outputs, inputs)``.
    """

    name: str
    place: Place
    outputs: bool
    part: Part | None
    matrix: Tensor


def turns_of(model: Any, plan: Plan) -> Iterator[Turn]:
    """What turns the linear modules in the layers."""
    layers, lent = decoder_layers(model), _lent(model)
    edits = {edit.parameter: edit for edit in plan.weights}
    for name, module in linears_of(model).items():
        edit = edits.get(f"{name}.weight")
        plain = isinstance(module, nn.Linear)
        weight: Any = module.weight
        matrix = weight.detach() if plain else weight.detach().T
        for step in edit.steps if edit else ():
            if isinstance(step, Rotate) and step.group in SITES:
                place = _place(step.group, layer_of(name, layers), lent)
                yield Turn(name, place, step.dim == (0 if plain else 1), step.part, matrix)
