"""Every decoder that transformers lists has a row, or a reason for which it has none."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import fastrot
from fastrot.mapping import ARCHITECTURES, REFUSED, ROTATIONS, SHELLS, find_architecture
from fastrot.mapping.document import architectures_document

LISTED = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def decided(config):
    """Whether the tables say something of a model with this configuration."""
    if config.is_encoder_decoder:
        return True  # refused for what it is, whatever it is called
    names = {config.model_type}
    if config.model_type in SHELLS:
        names = {config.get_text_config().model_type}
    return names <= {*ARCHITECTURES, *REFUSED}


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_decoder_is_decided(name):
    try:
        config = CONFIG_MAPPING[name]()
    except (ValueError, StrictDataclassError):
        assert name in {**ARCHITECTURES, **SHELLS, **REFUSED}  # it has no default
        return
    assert decided(config)


def test_one_that_is_not_is_found():
    config = CONFIG_MAPPING["llama"]()
    config.model_type = "brand_new"
    assert not decided(config)
    assert decided(CONFIG_MAPPING["t5gemma"]())


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why_for_every_rotation(name):
    assert name not in {**ARCHITECTURES, **SHELLS}
    assert tuple(REFUSED[name]) == ROTATIONS
    if name not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know it")
    config = CONFIG_MAPPING["llama"]()
    config.model_type = name
    with pytest.raises(fastrot.UnknownArchitectureError, match="mappings=") as refusal:
        find_architecture(config)
    for reason in REFUSED[name].values():
        assert reason in str(refusal.value)
        assert reason in architectures_document()
