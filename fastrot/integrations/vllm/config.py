"""vLLM's quantization method ``fastrot``: which layer gets which of the recorded rotations.

vLLM asks a quantization config for the method of every layer, by name. This one gives each the
method it would have anyway, with the rotation of the record in front: that of the tool with which
the checkpoint was quantized after it was rotated, if it was.
"""

from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import PPMissingLayer, WeightsMapper

from fastrot.edits import OnlineSite
from fastrot.errors import RecordError, RotationError
from fastrot.integrations.vllm.experts import rotate_experts
from fastrot.integrations.vllm.layers import rotate_attention, rotate_input
from fastrot.integrations.vllm.operands import OPERAND, with_matrices
from fastrot.integrations.vllm.recorded import DELEGATED, exported, recorded_sites
from fastrot.integrations.vllm.stream import rotate_stream
from fastrot.record import QUANT_METHOD, has_online
from fastrot.resolve.places import layer_of
from fastrot.transform_config import ATTENTION_LOCATIONS

Place = tuple[str, str]
"""vLLM's name of a module, and a location in it."""


class FastrotConfig(QuantizationConfig):
    """The online rotations of a checkpoint, each of which must find its layer.

    Attributes:
        base: of the tool that quantized the checkpoint; None where the weights are plain numbers.
        sites: the recorded rotations.
        served: the places of those that a layer of this process has taken.
        layers: the decoder layers of this process, which may be one rank of a pipeline.
    """

    def __init__(self, base: Any = None) -> None:
        super().__init__()
        self.base = base
        if base is not None:
            self._ignore_unexpected_suffixes = base._ignore_unexpected_suffixes
        self.sites: dict[Place, OnlineSite] = {}
        self.served: set[Place] = set()
        self.layers: set[str] = set()

    def get_name(self) -> str:
        """What config.json calls it."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those in which a model can be served."""
        if self.base is not None:
            return list(self.base.get_supported_act_dtypes())
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of the GPU: whatever runs Triton."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """There is no file but config.json."""
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take over what another tool quantized after fastrot rotated it.

        But not what vLLM itself rotates.
        """
        known = hf_quant_cfg.get("quant_method") in (QUANT_METHOD, *DELEGATED)
        ours = known and has_online(hf_config) and not exported(hf_config, hf_quant_cfg)
        return QUANT_METHOD if ours else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FastrotConfig":
        """Of ``quantization_config`` alone; :meth:`maybe_update_config` sees the record."""
        method = config["quant_method"]
        if method == QUANT_METHOD:
            return cls()
        return cls(get_quantization_config(method).from_config(config))

    @property
    def kv_cache_scheme(self) -> Any:
        """How a quantized checkpoint wants its cache."""
        return getattr(self.base, "kv_cache_scheme", None)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the record, in the process that starts the others; they get it pickled.

        Raises:
            RecordError: there is none, or it is damaged.
        """
        sites = with_matrices(recorded_sites(hf_config), model_name)
        if not sites:
            raise RecordError(
                f"config.json of {model_name} says that this model has online rotations "
                "(quant_method=fastrot), but its record ('fastrot') names none; take the "
                "checkpoint as it was written"
            )
        self.sites = {(site.module, site.location): site for site in sites}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take over vLLM's names of modules."""

        def renamed(name: str) -> str:
            weight = hf_to_vllm_mapper.map_name(f"{name}.weight") or f"{name}.weight"
            return weight.removesuffix(".weight")

        if self.base is not None:
            self.base.apply_vllm_mapper(hf_to_vllm_mapper)
        self.sites = {(renamed(name), where): site for (name, where), site in self.sites.items()}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Leave the operands out of what is loaded: the layers have theirs already."""
        mapper = (self.base or QuantizationConfig).get_checkpoint_weight_mapper()
        return mapper | WeightsMapper(orig_to_new_regex={OPERAND: None})

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """Where the scales of a quantized cache go."""
        return (self.base or QuantizationConfig).get_cache_scale_mapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer, which rotates where the record asks for it.

        Attention layers ask twice, when they are built and after the weights were loaded. At the
        second time all layers are there, so every recorded rotation must have found its own.

        Raises:
            RotationError: one has not, or another quantization would take a rotation's place.
        """
        if self.online_quantization_config is not None:
            raise RotationError(
                "the checkpoint has online rotations, and vLLM would quantize while loading "
                "(quantization_config), which passes by them; leave quantization_config out, and "
                "quantize before serving"
            )
        self.layers.add(layer_of(prefix))
        if isinstance(layer, Attention | MLAAttention):
            if hasattr(layer, "fastrot_asked"):
                self._check_served()
            else:
                layer.fastrot_asked = True
                self._rotate_attention(layer, prefix.rpartition(".")[0])
            return self._base_method(layer, prefix)
        method = self._base_method(layer, prefix)
        if isinstance(layer, LinearBase):
            method = method or UnquantizedLinearMethod()
            site = self._take(prefix, "input")
            if site is not None:
                rotate_input(method, site)
        elif isinstance(layer, RoutedExperts):
            site = self._take(prefix, "down_input")
            if site is not None:
                method = method or UnquantizedFusedMoEMethod(layer.moe_config)
                rotate_experts(layer, method, site)
        return method

    def rotate_built(self, model: torch.nn.Module) -> None:
        """Rotate at norms and decoder layers, for which vLLM asks no method.

        Args:
            model: built, and without its weights; or a part of one, with names of its own.
        """
        modules = dict(model.named_modules())
        for name, location in set(self.sites) - self.served:
            module = modules.get(name)
            if isinstance(module, PPMissingLayer):  # another rank of the pipeline has it
                del self.sites[name, location]
            elif module is not None and rotate_stream(module, self.sites[name, location]):
                self.served.add((name, location))

    def _base_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if self.base is None:
            return None
        self.base.packed_modules_mapping = self.packed_modules_mapping
        return self.base.get_quant_method(layer, prefix)

    def _rotate_attention(self, layer: torch.nn.Module, owner: str) -> None:
        found = {where: self._take(owner, where) for where in ATTENTION_LOCATIONS}
        sites = {where: site for where, site in found.items() if site is not None}
        if sites:
            rotate_attention(layer, sites)

    def _take(self, name: str, location: str) -> OnlineSite | None:
        site = self.sites.get((name, location))
        if site is not None:
            self.served.add((name, location))
        return site

    def _check_served(self) -> None:
        missing = [place for place in self.sites if place not in self.served]
        if get_pp_group().world_size > 1:
            missing = [(name, where) for name, where in missing if layer_of(name) in self.layers]
        if missing:
            name, location = missing[0]
            group = self.sites[missing[0]].group
            raise RotationError(
                f"vLLM can't rotate the {location} of {name} online ({group}, {len(missing)} such "
                f"places); serve the model rotated without {group}, or in transformers"
            )
