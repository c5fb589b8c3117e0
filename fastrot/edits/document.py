"""Plans as plain JSON data and back, each distinct rotation once."""

from collections.abc import Mapping
from dataclasses import astuple, fields, replace
from typing import Any

from torch import Tensor

from fastrot.edits.plan import Plan
from fastrot.edits.steps import FoldedNorm, OnlineSite, Part, Rotate, Scale, WeightEdit
from fastrot.errors import RotationError
from fastrot.rotations import GIVEN, Rotation
from fastrot.transform_config import parse_precision, parse_transform_config

FORMAT = 1

_Fields = dict[str, tuple[type, ...]]
_NAME: tuple[type, ...] = (str,)
_COUNT: tuple[type, ...] = (int,)
_NUMBER: tuple[type, ...] = (int, float)
_FLAG: tuple[type, ...] = (bool,)
_OPTIONAL = type(None)

_ROTATION: _Fields = {
    "kind": _NAME,
    "size": _COUNT,
    "block_size": (int, _OPTIONAL),
    "seed": _COUNT,
    "label": _NAME,
    "fixes_ones": _FLAG,
}
_SCALE: _Fields = {"norm": _NAME, "dim": _COUNT, "offset": _NUMBER, "inverse": _FLAG}
_ROTATE: _Fields = {
    "rotation": _COUNT,
    "dim": _COUNT,
    "inverse": _FLAG,
    "group": _NAME,
    "part": (list, _OPTIONAL),
}
_NORM: _Fields = {
    "name": _NAME,
    "offset": _NUMBER,
    "kind": _NAME,
    "width": _COUNT,
    "weighted": _FLAG,
}
_SITE: _Fields = {
    "module": _NAME,
    "location": _NAME,
    "rotation": _COUNT,
    "inverse": _FLAG,
    "group": _NAME,
    "dtype": _NAME,
}
_WEIGHT: _Fields = {
    "parameter": _NAME,
    "shape": (list,),
    "dtype": _NAME,
    "source": (str, _OPTIONAL),
    "steps": (list,),
}
_PLAN: _Fields = {
    "format": _COUNT,
    "model_class": _NAME,
    "outline": _NAME,
    "by_table": _FLAG,
    "seed": _COUNT,
    "transform_config": (dict,),
    "rotations": (list,),
    "weights": (list,),
    "norms": (list,),
    "online": (list,),
    "notes": (list,),
}


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as data that ``json.dumps`` takes; :func:`plan_from_dict` makes an equal one."""
    numbers: dict[Rotation, int] = {}

    def number(rotation: Rotation) -> int:
        return numbers.setdefault(rotation, len(numbers))

    def step(step: Scale | Rotate) -> dict[str, Any]:
        if isinstance(step, Scale):
            return _written(step, _SCALE)
        part = None if step.part is None else [*astuple(step.part)][: 3 if step.part.behind else 2]
        return _written(step, _ROTATE, rotation=number(step.rotation), part=part)

    weights = [
        _written(
            edit,
            _WEIGHT,
            shape=list(plan.shapes[edit.parameter]),
            dtype=str(edit.dtype),
            steps=[step(s) for s in edit.steps],
        )
        for edit in plan.weights
    ]
    online = [
        _written(site, _SITE, rotation=number(site.rotation), dtype=str(site.dtype))
        for site in plan.online
    ]
    return _written(
        plan,
        _PLAN,
        format=FORMAT,
        transform_config=plan.transform_config.to_dict(),
        rotations=[_written(rotation, _ROTATION) for rotation in numbers],
        weights=weights,
        norms=[_written(norm, _NORM) for norm in plan.norms],
        online=online,
        notes=list(plan.notes),
    )


def plan_from_dict(data: Any, matrices: Mapping[str, Tensor]) -> Plan:
    """The plan that :func:`plan_to_dict` wrote.

    Raises:
        RotationError: another format, a field that is missing, unknown or of another type.
    """
    given = _read(data, _PLAN, "plan")
    if given["format"] != FORMAT:
        raise RotationError(f"plan: format {given['format']} is not {FORMAT}, which this one reads")
    units = {name: _given(name, tensor) for name, tensor in matrices.items()}
    rotations = []
    for i, item in enumerate(given["rotations"]):
        read = Rotation(**_read(item, _ROTATION, f"plan, rotations[{i}]"))
        rotations.append(replace(read, unit=units.get(read.label) if read.kind in GIVEN else None))

    def rotation(number: int, where: str) -> Rotation:
        if not 0 <= number < len(rotations):
            raise RotationError(f"{where}: there is no rotation {number}")
        return rotations[number]

    def step(item: Any, where: str) -> Scale | Rotate:
        if isinstance(item, Mapping) and "norm" in item:
            return Scale(**_read(item, _SCALE, where))
        turn = _read(item, _ROTATE, where)
        turn["rotation"] = rotation(turn["rotation"], where)
        part = turn["part"]
        if part is not None:
            length = 3 if len(part) == 3 else 2
            turn["part"] = Part(*_counts(part, length, f"{where}, part"))
        return Rotate(**turn)

    edits, shapes = [], {}
    for i, item in enumerate(given["weights"]):
        where = f"plan, weights[{i}]"
        weight = _read(item, _WEIGHT, where)
        steps = tuple(step(s, f"{where}, steps[{j}]") for j, s in enumerate(weight["steps"]))
        shapes[weight["parameter"]] = _counts(weight.pop("shape"), None, f"{where}, shape")
        dtype = parse_precision(weight["dtype"])
        edits.append(WeightEdit(**{**weight, "steps": steps, "dtype": dtype}))
    norms = [
        FoldedNorm(**_read(item, _NORM, f"plan, norms[{i}]"))
        for i, item in enumerate(given["norms"])
    ]
    shapes |= {norm.parameter: (norm.width,) for norm in norms if norm.weighted}
    sites = []
    for i, item in enumerate(given["online"]):
        where = f"plan, online[{i}]"
        site = _read(item, _SITE, where)
        turn, dtype = rotation(site["rotation"], where), parse_precision(site["dtype"])
        sites.append(OnlineSite(**{**site, "rotation": turn, "dtype": dtype}))
    return Plan(
        model_class=given["model_class"],
        weights=tuple(edits),
        norms=tuple(norms),
        online=tuple(sites),
        transform_config=parse_transform_config(given["transform_config"]),
        seed=given["seed"],
        shapes=shapes,
        outline=given["outline"],
        by_table=given["by_table"],
        notes=tuple(map(str, given["notes"])),
    )


def _given(name: str, tensor: Tensor) -> Rotation:
    matrix = isinstance(tensor, Tensor) and tensor.is_floating_point()
    found = Rotation.from_matrix(tensor) if matrix else Rotation.from_permutation(tensor)
    if found.label != name:
        raise RotationError(f"plan: the {found.kind} under {name:.12}… has another digest")
    return found


def _written(value: Any, names: _Fields, **instead: Any) -> dict[str, Any]:
    known = {field.name for field in fields(value)}
    return {
        name: instead[name] if name in instead else getattr(value, name)
        for name in names
        if name in instead or name in known
    }


def _read(data: Any, names: _Fields, where: str) -> dict[str, Any]:
    """The fields of a dict, refused unless they are these, of these types."""
    if not isinstance(data, Mapping):
        raise RotationError(f"{where}: expected a dict, got {type(data).__name__} {data!r:.60}")
    wrong = sorted(set(data) ^ set(names), key=str)
    if wrong:
        what = "unknown" if wrong[0] in data else "missing"
        raise RotationError(f"{where}: {what} {wrong[0]}; fields: {', '.join(names)}")
    for name, types in names.items():
        value = data[name]
        if not isinstance(value, types) or (isinstance(value, bool) and types != _FLAG):
            raise RotationError(f"{where}: {name} is {value!r:.60}")
    return dict(data)


def _counts(values: list[Any], length: int | None, where: str) -> tuple[int, ...]:
    whole = all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
    if not whole or length not in (None, len(values)):
        raise RotationError(f"{where}: {values!r:.60} are not {length or ''} counts")
    return tuple(values)
