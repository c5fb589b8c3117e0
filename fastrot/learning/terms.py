"""Which sites and which weights each of R1, R2 and R3 turns, of a model that Hadamard turned.

Everything is relative to that: a learned ``R`` comes behind the rotation that is there already, so
``Q R`` is what the model gets in the end.
"""

from collections import defaultdict
from typing import Any

from torch import nn

from fastrot.edits import Plan
from fastrot.edits.steps import Rotate
from fastrot.index import Index
from fastrot.lab.quantized import decoder_layers, layer_of, linears_of
from fastrot.lab.schemes import Numbers, Scheme
from fastrot.learning.capture import HEADED, Captured
from fastrot.learning.objective import Term, Weight, of_site
from fastrot.rotations import Rotation
from fastrot.rows import roles_of

SITES = {"R1": ("attention", "mlp"), "R2": ("o", "values"), "R3": ("keys",)}
"""What the rotations that can be learned turn; the keys of latent attention are its latents."""


def numbers_at(site: str, scheme: Scheme) -> Numbers | None:
    """How a scheme rounds what a site sees."""
    return scheme.kv if site in HEADED else scheme.activations


def bases(plan: Plan, model: Any) -> dict[str, dict[int | None, Rotation]]:
    """The rotations of a plan by name and layer; R1 has one, of the layer None."""
    layers = decoder_layers(model)
    found: dict[str, dict[int | None, Rotation]] = {name: {} for name in SITES}
    for edit in plan.weights:
        for step in edit.steps:
            if isinstance(step, Rotate) and step.group in found:
                layer = None if step.group == "R1" else layer_of(edit.parameter, layers)
                found[step.group][layer] = step.rotation
    for site in plan.online:
        if site.group == "R3":
            found["R3"][layer_of(site.module, layers)] = site.rotation
    return {
        name: dict(sorted(each.items(), key=lambda item: item[0] or 0))
        for name, each in found.items()
        if each
    }


def terms_of(
    model: Any, plan: Plan, scheme: Scheme, captured: Captured
) -> dict[tuple[str, int | None], list[Term]]:
    """The terms of every rotation: by its name and layer.

    Args:
        model: rotated by the plan.
        plan: what was done.
        scheme: decides which terms there are.
        captured: of the rotated model.
    """
    found: dict[tuple[str, int | None], list[Term]] = defaultdict(list)
    roles, _ = roles_of(Index(model), None, None, ())
    # Where a latent is cached it stands for the keys, and a key with a position for the values.
    absent = ("values",) if roles.latent_writers else ()
    for group, sites in SITES.items():
        for (site, layer), vectors in captured.vectors.items():
            numbers = numbers_at(site, scheme)
            if site in sites and site not in absent and numbers is not None:
                place = None if group == "R1" else layer
                found[group, place].append(
                    of_site(vectors, captured.energies[site, layer], numbers)
                )
    if scheme.weights is not None:
        layers = decoder_layers(model)
        edits = {edit.parameter: edit for edit in plan.weights}
        for name, module in linears_of(model).items():
            edit = edits.get(f"{name}.weight")
            for step in edit.steps if edit else ():
                # Parts of a fused projection mix rows of the values alone, a small share.
                if isinstance(step, Rotate) and step.group in SITES and step.part is None:
                    place = None if step.group == "R1" else layer_of(name, layers)
                    term = _weight(module, step, scheme, captured.weights[name])
                    found[step.group, place].append(term)
    return dict(found)


def _weight(module: Any, step: Rotate, scheme: Scheme, energy: float) -> Weight:
    plain = isinstance(module, nn.Linear)
    matrix = module.weight.detach() if plain else module.weight.detach().T
    assert scheme.weights is not None
    outputs = step.dim == (0 if plain else 1)
    return Weight(matrix, energy * len(matrix) / 2, scheme.weights, outputs)
