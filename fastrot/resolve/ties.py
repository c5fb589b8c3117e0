"""Tied parameters: embedding and head come apart if their edits differ."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from fastrot.edits import WeightEdit
from fastrot.errors import RotationError
from fastrot.index import Index, find_modules
from fastrot.mapping import Mapping


def untie(index: Index, mapping: Mapping | None, edits: Sequence[WeightEdit]) -> list[WeightEdit]:
    """Split tied parameters whose edits differ, if they are embedding and head; refuse others."""
    tied: dict[int, list[str]] = defaultdict(list)
    for name, parameter in index.parameters.items():
        tied[id(parameter)].append(name)
    by_name = {edit.parameter: edit for edit in edits}
    heads = _heads(index, mapping)
    for names in tied.values():
        first, *others = names
        if not others or not any(name in by_name for name in names):
            continue
        steps = [by_name[name].steps if name in by_name else () for name in names]
        if all(other == steps[0] for other in steps):
            for name in others:
                del by_name[name]
        elif len(others) == 1 and others[0] in heads:
            known = next(by_name[name] for name in names if name in by_name)
            by_name[others[0]] = replace(known, parameter=others[0], steps=steps[1], source=first)
        else:
            raise RotationError(
                f"{first} and {others[0]} share one tensor but need different edits; "
                "give one of them a copy of its own first"
            )
    return list(by_name.values())


def _heads(index: Index, mapping: Mapping | None) -> set[str]:
    if mapping is not None:
        return {f"{name}.weight" for name in find_modules(index, mapping.lm_head, missing_ok=True)}
    head = getattr(index.model, "get_output_embeddings", lambda: None)()
    return {f"{name}.weight" for name, module in index.modules.items() if module is head}
