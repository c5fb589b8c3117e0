"""Models without weights: what a configuration describes, on the meta device."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrot.mapping import SHELLS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def auto_class(config: "PreTrainedConfig") -> Any:
    """The class of transformers that makes a language model, with eyes or without.

    Or a classifier, where the configuration is of a saved one.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    )

    name = config.model_type
    for auto, listed in (
        (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ):
        if listed.get(name) in (config.architectures or ()):
            return auto
    # Some are listed as both, the second time without eyes; and what only hears is not listed here.
    sees = name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    whole = name in SHELLS or name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if sees and whole else AutoModelForCausalLM


def model_of(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model of a configuration, its names and shapes alone."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config)
    # Some of them draw numbers on the CPU whatever device is asked for.
    nn.Module.to(model, "meta")
    return model
