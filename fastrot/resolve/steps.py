"""The weight part: which rotations act on which dimension of which parameter."""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from fastrot.edits import FoldedNorm, Rotate, Scale
from fastrot.errors import RotationError
from fastrot.heads import head_around, latent_part, lender_of, lenders_of, value_part
from fastrot.index import Index
from fastrot.resolve.places import places, rotation_of
from fastrot.sites import find_sites
from fastrot.transform_config import TransformConfig


@dataclass
class Steps:
    """What happens to each parameter, while it is being worked out.

    Attributes:
        scales: parameter → norms that are folded into it.
        rotates: parameter → its rotations.
        inputs: name of a reader → the fused rotations of its input.
        norms: those that become scale-free.
    """

    scales: dict[str, tuple[Scale, ...]] = field(default_factory=dict)
    rotates: dict[str, tuple[Rotate, ...]] = field(default_factory=lambda: defaultdict(tuple))
    inputs: dict[str, tuple[Rotate, ...]] = field(default_factory=lambda: defaultdict(tuple))
    norms: list[FoldedNorm] = field(default_factory=list)


def rotate_sites(index: Index, config: TransformConfig, seed: int, steps: Steps) -> None:
    """Note every fused rotation of a configuration in ``steps``."""
    lenders = lenders_of(index)
    for group, scheme, args in places(config, online=False):
        bare = args.rows == "transposed"
        found = find_sites(index, args.targets, args.ignore, group=group, transposed=bare)
        for name, site in found.items():
            outwards = args.location == "weight_output"
            dim = site.output if outwards else site.input
            if dim is None:
                raise RotationError(f"{group}: {name} is an embedding, it has no weight_input")
            part = None
            if outwards and args.rows == "compressed":
                latent = latent_part(index.model, site)
                part = latent if latent.behind else None
            elif outwards and args.rows not in ("all", "heads", "transposed"):
                part = value_part(index.model, site, args.rows)
            size = site.shape[dim] if part is None else part.size
            by_heads = args.rows == "heads"
            head = head_around(index, name) if by_heads else None
            at = lender_of(lenders, name) if by_heads else name
            rotation = rotation_of(index, group, scheme, at, size, seed, head)
            inverse = args.inverse if outwards else not args.inverse
            step = Rotate(dim, rotation, inverse, group, part)
            _add(steps, site.weight, step)
            if not outwards:
                steps.inputs[name] += (step,)
            elif site.bias is not None:
                _add(steps, site.bias, replace(step, dim=max(len(site.shape) - 2, 0)))


def _add(steps: Steps, parameter: str, step: Rotate) -> None:
    old = [s for s in steps.rotates[parameter] if s.dim == step.dim]
    if old and (step.part or any(s.part for s in old)):
        raise RotationError(
            f"{old[0].group} and {step.group} act on the same dimension of {parameter}, one on "
            "its values only; apply them one after the other"
        )
    steps.rotates[parameter] += (step,)
