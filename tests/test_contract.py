"""What fastrot reads of transformers by name, all of it, and which release lacks what."""

import ast
import inspect
import tempfile
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from helpers import random_ids, tiny

import fastrot
from fastrot.integrations.registration import REGISTRIES
from fastrot.integrations.transformers import cache_argument

SUBMODULE_IMPORTS = {
    "cache_utils": {"Cache", "DynamicCache", "EncoderDecoderCache"},
    "cli.transformers": {"app"},
    "conversion_mapping": {"get_model_conversion_mapping"},
    "core_model_loading": {
        *("WeightConverter", "WeightRenaming", "dot_natural_key"),
        *("rename_source_key", "revert_weight_conversion"),
    },
    "generation.continuous_batching.cache": {"PagedAttentionCache"},
    "integrations.moe": {"ALL_EXPERTS_FUNCTIONS"},
    "models.auto.configuration_auto": {"CONFIG_MAPPING"},
    "models.auto.modeling_auto": {
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    },
    "pytorch_utils": {"Conv1D"},
    "quantizers.auto": {"register_quantization_config", "register_quantizer"},
    "quantizers.base": {"HfQuantizer"},
    "utils": {"logging"},
    "utils.import_utils": {"is_serve_available"},
    "utils.quantization_config": {"QuantizationConfigMixin"},
}
"""Names that do not stand in transformers itself."""

REGISTRY_NAMES = {
    "integrations.moe": "ALL_EXPERTS_FUNCTIONS",
    "quantizers.auto": "AUTO_QUANTIZER_MAPPING",
}
"""Where fastrot registers once the module was imported."""


@cache
def llama():
    return tiny("llama")


@cache
def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, num_local_experts=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def loaded():
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        return transformers.LlamaForCausalLM.from_pretrained(folder)


def module_of(name):
    return import_module(f"transformers.models.{name}")


ATTRIBUTES = {
    "a configuration": (
        lambda: llama().config,
        "_attn_implementation get_text_config tie_word_embeddings model_type is_encoder_decoder",
    ),
    "a model": (
        llama,
        "_adjust_missing_and_unexpected_keys _from_config all_tied_weights_keys "
        "_supports_flash_attn _keys_to_ignore_on_load_unexpected "
        "_keys_to_ignore_on_load_missing base_model_prefix "
        "get_expanded_tied_weights_keys get_input_embeddings "
        "get_output_embeddings set_attn_implementation set_experts_implementation",
    ),
    "a model that was loaded": (loaded, "_weight_conversions"),
    "a parameter that was loaded": (
        lambda: next(loaded().parameters()),
        "_is_hf_initialized",
    ),
    "a conversion of names": (
        lambda: transformers.core_model_loading.WeightRenaming("a", "b"),
        "add_tensor convert was_used source_patterns",
    ),
    "an attention module": (lambda: llama().model.layers[0].self_attn, "config head_dim"),
    "the module of an attention class": (
        partial(module_of, "llama.modeling_llama"),
        "ALL_ATTENTION_FUNCTIONS",
    ),
    "a cache": (transformers.DynamicCache, "update layers"),
    "a cache of cross attention": (
        lambda: transformers.EncoderDecoderCache(
            transformers.DynamicCache(), transformers.DynamicCache()
        ),
        "self_attention_cache cross_attention_cache",
    ),
    "experts": (
        lambda: mixtral().model.layers[0].mlp.experts,
        "_apply_gate act_fn config down_proj gate_up_proj is_transposed",
    ),
    "a configuration with experts": (lambda: mixtral().config, "_experts_implementation"),
    "the module of Llama 4": (partial(module_of, "llama4.modeling_llama4"), "Llama4TextExperts"),
    "a quantizer": (
        lambda: transformers.quantizers.HfQuantizer,
        "_process_model_before_weight_loading postprocess_model remove_quantization_config "
        "get_weight_conversions is_serializable is_trainable",
    ),
}
"""Things of transformers', and the attributes of theirs that fastrot uses."""

IMPLEMENTATIONS = {
    "modeling_utils.ALL_ATTENTION_FUNCTIONS": {"sdpa", "flex_attention", "paged|eager"},
    "integrations.moe.ALL_EXPERTS_FUNCTIONS": {"grouped_mm", "batched_mm"},
}

BY_NAME = ("getattr", "hasattr", "setattr")

TORCH = {
    *("_apply", "_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_load_state_dict_pre_hooks", "_orig_mod"),
    *("_global_forward_hooks", "_global_forward_pre_hooks", "_replace"),
    *("_C", "_are_functorch_transforms_active", "_parser", "_cache", "_is_replica"),
    *("_disable_dynamo", "_dynamo_marked_constant", "_exit"),
    *("_make_wrapper_subclass", "_disabled_torch_function_impl"),
    *("_to_copy", "_unsafe_view", "_reshape_alias"),
    *("_disable_dynamo", "_exit"),
    *("_after_autograd_keyset", "_AutoDispatchBelowAutograd", "_overlaps", "_current_level"),
    *("_dispatch_keys", "_dispatch_tls_local_include_set", "_is_torch_function_mode_enabled"),
}
"""Private attributes of torch's and numba's, and public ones of named tuples and os."""


def missing(what):
    return f"transformers {transformers.__version__} lacks {what}"


@pytest.mark.parametrize("module", SUBMODULE_IMPORTS)
def test_names_stand_where_they_stood(module):
    if module.startswith("cli."):
        pytest.importorskip("requests")  # what transformers 5.17 asks of its own command
    found = set(dir(import_module(f"transformers.{module}")))
    assert not SUBMODULE_IMPORTS[module] - found, missing(f"them in {module}")


def test_attention_functions_rotate():
    """Every one that a forward gets from an interface, whatever its name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []
    function = ALL_ATTENTION_FUNCTIONS.get_interface("eager", lambda *args: seen.append(args))
    function(torch.nn.Module(), *"qkv")
    assert seen[0][1:] == tuple("qkv"), missing("the default of an attention interface")
    assert ALL_ATTENTION_FUNCTIONS.get_interface.fastrot, missing("AttentionInterface")


@pytest.mark.parametrize("module", REGISTRY_NAMES)
def test_registries_know_fastrot(module):
    registry = getattr(import_module(f"transformers.{module}"), REGISTRY_NAMES[module], {})
    assert any(name.startswith("fastrot") for name in registry), missing(f"it in {module}")


@pytest.mark.parametrize("thing", ATTRIBUTES)
def test_attributes_are_there(thing):
    make, names = ATTRIBUTES[thing]
    absent = [name for name in names.split() if not hasattr(make(), name)]
    assert not absent, missing(f"{', '.join(absent)} of {thing}")


@pytest.mark.parametrize("table", IMPLEMENTATIONS)
def test_implementations_are_registered(table):
    module, _, name = table.rpartition(".")
    registered = set(getattr(import_module(f"transformers.{module}"), name))
    absent = IMPLEMENTATIONS[table] - registered
    assert not absent, missing(f"{', '.join(absent)} in {table}")


@torch.no_grad()
def test_keyword_arguments_reach_the_attention_function():
    """R3 gets through an attention module by them."""
    seen = []

    def attention(module, query, key, value, mask, fastrot_test=None, **kwargs):
        seen.append(fastrot_test)
        return value.repeat(1, 3, 1, 1).transpose(1, 2), None

    transformers.AttentionInterface.register("fastrot_test", attention)
    try:
        model = tiny("llama")
        model.config._attn_implementation = "fastrot_test"
        x = torch.zeros(1, 2, 96)
        turns = model.model.rotary_emb(x, torch.arange(2)[None])
        model.model.layers[0].self_attn(x, turns, None, fastrot_test="arrived")
    finally:
        del transformers.AttentionInterface._global_mapping["fastrot_test"]
    assert seen == ["arrived"], missing("keyword arguments that attention modules pass on")


@torch.no_grad()
def test_a_model_takes_a_cache():
    model = llama()
    given = cache_argument(model, transformers.DynamicCache())
    assert given.keys() <= inspect.signature(type(model).forward).parameters.keys(), missing(
        "a name for a model's cache that fastrot knows"
    )
    model(random_ids(model, 1, 3, seed=0), **given, use_cache=True)
    assert next(iter(given.values())).get_seq_length() == 3


def sources():
    for path in Path(fastrot.__file__).parent.rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text()))


def test_every_import_of_a_submodule_is_listed():
    found = {}
    for node in sources():
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            names = found.setdefault(node.module.removeprefix("transformers."), set())
            names.update(alias.name for alias in node.names)
    assert found == SUBMODULE_IMPORTS
    ours = {
        f"transformers.{module}"
        for module in (*REGISTRY_NAMES, "modeling_utils", "quantizers.base")
    }
    assert ours | {"peft.utils.save_and_load"} == {*REGISTRIES}


def test_every_private_attribute_is_listed():
    """Of what is not fastrot's own, read by a dot or by ``getattr``."""
    own, read = set(), set()
    for node in sources():
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (own if mine else read).add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            read.update(a.value for a in node.args[1:2] if isinstance(a, ast.Constant))
    listed = {name for _, names in ATTRIBUTES.values() for name in names.split()}
    private = {name for name in read if name.startswith("_") and not name.startswith("__")}
    assert private - own - listed - TORCH == set()
    assert {name for name in listed if name.startswith("_")} <= private | own
