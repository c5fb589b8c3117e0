"""Online rotations through ``save_pretrained`` and ``from_pretrained``.

A checkpoint with online rotations names the quantization method ``fastrot`` in its config.json,
which makes transformers call :class:`FastrotQuantizer` while it loads. As transformers only warns
of a method it does not know, the checkpoint also asks for the experts implementation ``fastrot``:
a transformers without fastrot refuses that, for dense models too, instead of computing nonsense.
"""

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastrot.errors import RecordError
from fastrot.integrations.guard import lift
from fastrot.integrations.loading import check_named, put_on
from fastrot.integrations.marks import mark
from fastrot.online import OnlineRotation, check_parts
from fastrot.record import QUANT_METHOD, check_online, online_sites

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class FastrotConfig(QuantizationConfigMixin):
    """The marker in config.json; what was done stands beside it under ``fastrot``."""

    def __init__(self, **kwargs: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]

    def get(self, name: str, default: Any = None) -> Any:
        """As a dict has it: transformers asks the configuration of a model so, if it is given."""
        return vars(self).get(name, default)


@register_quantizer(QUANT_METHOD)
class FastrotQuantizer(HfQuantizer):
    """Puts the recorded online rotations on a model that is being loaded. Nothing is quantized."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        sites = online_sites(model)
        if not sites:
            raise RecordError(
                "config.json says that this model has online rotations (quant_method=fastrot), but "
                "its record ('fastrot') names none; take the checkpoint as it was written"
            )
        self._rotations = put_on(model, sites)
        _watch_keys(model)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """Names in checkpoints of version 0.1.0."""
        return old_names(self._rotations)

    def postprocess_model(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        """Leave the model as :func:`fastrot.apply` would: rotated, but not "quantized"."""
        self.remove_quantization_config(model)
        mark(model.config)
        check_online(model)
        check_parts(model)
        lift(model)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Everything is saved by ordinary means."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Rotations are linear and differentiable."""
        return True


def old_names(rotations: Iterable[OnlineRotation]) -> list[WeightRenaming]:
    """Renamings of version 0.1.0's operands, where a linear module held its rotation."""
    moved = {(r.child, r.location): r.name for r in rotations if r.child}
    return [
        WeightRenaming(rf"\.{child}\.fastrot_{end}\.", f".{name}.")
        for (child, end), name in moved.items()
    ]


def _watch_keys(model: "PreTrainedModel") -> None:
    """Refuse what transformers would only warn of: weights it makes up, rotations it leaves out."""

    def adjust(info: Any) -> None:
        del model._adjust_missing_and_unexpected_keys
        model._adjust_missing_and_unexpected_keys(info)
        check_named(info.unexpected_keys)
        base = model.base_model_prefix
        inside = f"{base}." if hasattr(model, base) else ""
        wrong = {*info.missing_keys, *(name for name, *_ in info.mismatched_keys)}
        missing = [name for name in sorted(wrong) if name.startswith(inside)]
        if missing:
            raise RecordError(
                f"the rotated checkpoint lacks weights, {missing[0]} ({len(missing)}), which would "
                "be made up; take the checkpoint as it was written"
            )

    model._adjust_missing_and_unexpected_keys = adjust  # type: ignore[method-assign, assignment]


def cache_argument(model: "PreTrainedModel", cache: "Cache | None") -> dict[str, Any]:
    """The keyword argument that hands a cache to a model; transformers 5.24 renamed it."""
    known = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}
