"""Code that the tables do not know: forwards and hooks of others where a rotation acts.

A table says what the classes of transformers compute. Whatever replaces a forward, or hooks into
one, may read or write what is rotated; only its author can say that it does not.
"""

import functools
import gc
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from fastrot.edits import Plan, Rotate
from fastrot.errors import RotationError
from fastrot.index import Index
from fastrot.mapping import STREAM
from fastrot.rotations import PERMUTATION

KNOWN = ("torch", "transformers", "accelerate", "fastrot")
"""Packages whose forwards and hooks are those of the tables, or only move data."""

ON_STREAM = re.compile(r"drop|norm|_proj")
"""Names of modules without parameters through which the residual stream goes."""

INSIDE = re.compile(r"(q|k|v|qk|b|c|dt)_|(attn|attention)_drop")
"""How such names begin where it does not."""


class ForeignCodeError(RotationError):
    """A forward or a hook that fastrot knows nothing of, where a rotation acts."""


def check_foreign(index: Index, plan: Plan, *, classes: bool) -> None:
    """Refuse forwards and hooks of others on the way of what a plan rotates.

    For R1 that is every module with a weight of the plan, all modules around it, and in these the
    dropouts and norms without weights; for others the module itself and the block around it.

    Args:
        index: of the model the plan was made for.
        plan: what will be rotated.
        classes: whether classes must be known too; not if the user described them.

    Raises:
        ForeignCodeError: names the module, the code, and the way out.
    """
    for name in _touched(index, plan):
        module = index.module(name)
        where = f"{name or 'the model'} ({type(module).__name__})"
        for what in _foreign(module, classes):
            raise ForeignCodeError(
                f"{where} has {what}, which may read or write what is rotated; remove it, or pass "
                "trust=True if it does neither"
            )
    everywhere = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    for hook in (hook for hooks in everywhere for hook in hooks.values()):
        if not _known(hook):
            raise ForeignCodeError(
                f"a global forward hook ({_label(hook)}) acts on every module; remove it, or pass "
                "trust=True if it writes nothing"
            )


def check_whole(model: nn.Module, *, trust: bool = False) -> None:
    """Refuse a part of a larger pretrained model: its record would not be saved with the whole.

    And a model that shares a part with another, which would be rotated without its own head.

    Args:
        model: what will be rotated.
        trust: let other models be changed too.

    Raises:
        RotationError: names the whole, or the other model.
    """
    from transformers import PreTrainedModel

    parts = [module for module in model.modules() if any(True for _ in module.parameters())]
    if not _held(model) and (trust or not _shared(parts)):
        return
    inside = set(map(id, parts))
    kinds = _with_subclasses(PreTrainedModel)
    for other in [found for found in gc.get_objects() if type(found) in kinds]:
        if id(other) not in inside:
            # Another thread may be making it: copying, unpickling.
            for name, child in dict(other.__dict__.get("_modules", ())).items():
                if child is model:
                    raise RotationError(
                        f"this {type(model).__name__} is {name!r} of a {type(other).__name__}, "
                        "which would be saved without a word of the rotation; pass that model as "
                        "a whole"
                    )
                if id(child) in inside and not trust:
                    raise RotationError(
                        f"{name!r} of a {type(other).__name__} is a part of this "
                        f"{type(model).__name__} too and would be rotated with it; delete that "
                        "model, give it a copy (copy.deepcopy), or pass trust=True if it is not "
                        "used any more"
                    )


def _held(model: nn.Module) -> bool:
    """Whether something holds a model as modules hold others, in a dict of modules alone.

    The collector walks all objects for it, but in C.
    """
    holders = (list(d.values()) for d in gc.get_referrers(model) if isinstance(d, dict))
    return any(all(v is None or issubclass(type(v), nn.Module) for v in d) for d in holders)


def _shared(parts: list[nn.Module]) -> bool:
    """Whether anything but each other refers to the parts of a model, which come after it.

    Or to what one of them holds its own parts in, which ``copy.copy`` does not copy.
    """
    within = Counter(id(child) for part in parts for child in part._modules.values())
    # What the list of parts and this call count for.
    alone = next(map(sys.getrefcount, [object()]))
    counts = list(map(sys.getrefcount, parts))
    if any(n - alone != within[id(p)] for p, n in zip(parts[1:], counts[1:], strict=True)):
        return True
    bare = nn.Module()
    own = sys.getrefcount(bare._modules)
    return any(sys.getrefcount(part._modules) != own for part in parts)


def _with_subclasses(kind: type) -> set[type]:
    found: set[type] = {kind}
    below: type
    for below in type.__subclasses__(kind):
        found |= _with_subclasses(below)
    return found


def _touched(index: Index, plan: Plan) -> list[str]:
    stream: dict[str, None] = {}
    names: dict[str, None] = {}
    for edit in plan.weights:
        of_stream = STREAM in edit.groups
        within = stream if of_stream else names
        holder = edit.parameter.rpartition(".")[0]
        within |= dict.fromkeys(_around(holder, of_stream))
        if any(isinstance(s, Rotate) and s.rotation.kind == PERMUTATION for s in edit.steps):
            # Every channel takes its number along, through all that is between.
            block = holder.rpartition(".")[0]
            inside = index.module(block).named_modules(prefix=block)
            names |= dict.fromkeys(name for name, _ in inside)
    for norm in plan.written_norms:
        stream |= dict.fromkeys(_around(norm.module, True))
    for name in list(stream):
        stream |= dict.fromkeys(_passed(index, name))
    names = stream | names
    for site in plan.online:
        # Attention and experts are blocks themselves.
        inside = site.location not in ("input", "output")
        whole = site.group == STREAM
        names |= dict.fromkeys((site.module,) if inside else _around(site.module, whole))
    return list(names)


def _around(name: str, whole: bool) -> Iterator[str]:
    """A module and the one around it, or all around it; numbers are places in a list."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name
        if not whole and not name.rpartition(".")[2].isdigit():
            return


def _passed(index: Index, name: str) -> Iterator[str]:
    """What has no weight that a table could name, and passes the stream on."""
    for leaf, child in index.module(name).named_children():
        bare = next(child.parameters(), None) is None
        if bare and ON_STREAM.search(leaf) and not INSIDE.match(leaf):
            yield f"{name}.{leaf}" if name else leaf


def _foreign(module: nn.Module, classes: bool) -> Iterator[str]:
    """What is not known of a module, in words."""
    kind = type(module)
    for own in filter(None, map(module.__dict__.get, ("forward", "_old_forward"))):
        # The second is what accelerate's hooks stand around; that of the class is judged below.
        if getattr(own, "__func__", None) is not kind.forward and not _known(own):
            yield f"a forward of its own, {_label(own)}"
    for function in (kind.forward, kind.__call__) if classes else ():
        if not _known(function):
            yield f"a forward that transformers does not have, {_label(function)}"
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for hook in (*hooks, *_around_forward(module.__dict__.get("_hf_hook"))):
        if not _known(hook):
            yield f"a forward hook, {_label(hook)}"


def _around_forward(hook: Any) -> Iterator[Any]:
    """What a hook of accelerate runs; one may hold others."""
    if hook is not None:
        yield hook.pre_forward
        yield hook.post_forward
        for inner in getattr(hook, "hooks", ()):
            yield from _around_forward(inner)


def _functions(function: Any) -> Iterator[Any]:
    """What a callable runs: through partials, methods and decorators that name what they wrap."""
    while function is not None:
        if isinstance(function, functools.partial):
            function = function.func
        else:
            function = getattr(function, "__func__", function)
            yield function
            function = getattr(function, "__wrapped__", None)


def _home(function: Any) -> str:
    # A decorated function takes the name of another module along, but not its globals.
    space = getattr(function, "__globals__", {})
    return str(space.get("__name__", type(function).__module__))


def _known(function: Any) -> bool:
    return all(_home(inner).partition(".")[0] in KNOWN for inner in _functions(function))


def _label(function: Any) -> str:
    inner = next(f for f in _functions(function) if _home(f).partition(".")[0] not in KNOWN)
    return f"{_home(inner)}.{getattr(inner, '__qualname__', type(inner).__name__)}"
