"""fastrot's names in the registries of transformers and PEFT, without importing either.

``import fastrot`` must make ``from_pretrained`` know rotated checkpoints, whichever of the two is
imported first, and whoever needs a kernel only should not wait seconds for transformers. So every
registry gets its names right after the module that holds it was executed: at once if that was
before, else through a finder that hands the import on to those behind it.

A function here touches nothing but the module it is given, so it is all the same in which order
transformers imports its modules. The finder stays: what is reloaded gets its names again.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _models(module: Any) -> None:
    _attention(module)
    init = module.PreTrainedModel.__init__
    if hasattr(init, "fastrot"):
        return

    @functools.wraps(init)
    def guarded(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, config, *args, **kwargs)
        if getattr(config, "fastrot", None) is not None:
            from fastrot.integrations.guard import guard

            guard(self)

    guarded.fastrot = True  # type: ignore[attr-defined]
    module.PreTrainedModel.__init__ = guarded
    load = module.PreTrainedModel.load_adapter

    @functools.wraps(load)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = {*getattr(self, "peft_config", ())}
        result = load(self, *args, **kwargs)
        for adapter in {*getattr(self, "peft_config", ())} - before:
            _note(self, adapter)
        return result

    module.PreTrainedModel.load_adapter = noting
    settle = module.PreTrainedModel._adjust_missing_and_unexpected_keys

    @functools.wraps(settle)
    def settling(self: Any, info: Any) -> None:
        settle(self, info)
        if any(".fastrot_" in name for name in info.unexpected_keys):
            from fastrot.integrations.guard import check_recorded

            check_recorded(self, info.unexpected_keys)

    module.PreTrainedModel._adjust_missing_and_unexpected_keys = settling


def _note(model: Any, adapter: str) -> None:
    if getattr(getattr(model, "config", None), "fastrot", None) is not None:
        from fastrot.integrations.adapters import note

        note(model, adapter)


def _attention(module: Any) -> None:
    from fastrot.online.attention import rotating_interface

    interface = module.AttentionInterface
    if not hasattr(interface.get_interface, "fastrot"):
        interface.get_interface = rotating_interface(interface.get_interface)


def _experts(module: Any) -> None:
    functions = module.ALL_EXPERTS_FUNCTIONS
    functions.register("fastrot", functions["grouped_mm"])


def _quantizer(module: Any) -> None:
    name = "fastrot.integrations.transformers"
    if "fastrot" in module.AUTO_QUANTIZER_MAPPING:
        return
    if hasattr(sys.modules.get(name), "FastrotQuantizer"):
        # Its classes extend those of a transformers that was imported before this one.
        importlib.reload(sys.modules[name])
    else:
        # It registers itself, and may be what imports ``module``.
        importlib.import_module(name)


def _halves(module: Any) -> None:
    quantizer = module.HfQuantizer
    halves = {"preprocess_model": "before_weights", "postprocess_model": "after_weights"}
    for name, ours in halves.items():
        half = getattr(quantizer, name)
        if not hasattr(half, "fastrot"):
            setattr(quantizer, name, _followed(half, ours))


def _followed(half: Callable[..., Any], ours: str) -> Callable[..., Any]:
    """A method of a quantizer, and behind it a function for models with a record."""

    @functools.wraps(half)
    def both(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = half(self, model, *args, **kwargs)
        if getattr(model.config, "fastrot", None) is not None:
            from fastrot.integrations import loading

            getattr(loading, ours)(model)
        return result

    both.fastrot = True  # type: ignore[attr-defined]
    return both


def _adapters(module: Any) -> None:
    load = module.set_peft_model_state_dict
    if hasattr(load, "fastrot"):
        return

    @functools.wraps(load)
    def noting(model: Any, state: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
        _note(model, adapter_name)
        return load(model, state, adapter_name, **kwargs)

    noting.fastrot = True  # type: ignore[attr-defined]
    module.set_peft_model_state_dict = noting


REGISTRIES: dict[str, Callable[[Any], None]] = {
    "transformers.modeling_utils": _models,
    "transformers.integrations.moe": _experts,
    "transformers.quantizers.auto": _quantizer,
    "transformers.quantizers.base": _halves,
    "peft.utils.save_and_load": _adapters,
}
"""Modules that hold a registry, and what registers there.

The class of all models is none, but there is no other place that every model passes while it is
built; one without a record pays for a look at its configuration. Nor is the class of all
quantizers, whose two halves stand around the loading of weights, nor PEFT's function by which all
weights of adapters are loaded.
"""


class _Registering(Loader):
    """Executes a module with its own loader, then registers; the module knows nothing of it."""

    def __init__(self, loader: Any, register: Callable[[Any], None]):
        self._loader = loader
        self._register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._register(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Finder(MetaPathFinder):
    """Finds modules that hold a registry, by the finders behind it; it has no state."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRIES:
            return None
        finders = list(sys.meta_path)
        # Only those behind: one that asks all finders, as this does, can't be asked in turns.
        for finder in finders[finders.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Registering(spec.loader, REGISTRIES[fullname])
                return spec
        return None


def register() -> None:
    """Register now where transformers is imported, and elsewhere when it will be."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, function in REGISTRIES.items():
        if name in sys.modules:
            # Waits if another thread is still importing it.
            function(importlib.import_module(name))
