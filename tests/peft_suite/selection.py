"""Which of PEFT's tests are pointed at us, how, and why the others are not.

Three ways in: a module's list of cases is replaced (`lists`), the values that one test is parametrised with are
replaced (`values`), or a test written with `LoraConfig` in its body meets our config under that name (`rewritten`,
`for_one_config` where the test names its method itself, `for_fixed_ranks` where it sets ranks per module).
Everything else must match a line of `left_out`, which gives the reason; a test that none of the four covers is an
error, so that a new version of PEFT cannot slip tests past us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from . import hub, subjects
from .source import PACKAGE
from .subjects import Subject

Cases = Callable[[list[Subject]], list[Any]]


@dataclass(frozen=True)
class Selection:
    """What happens to the tests of one module of PEFT's suite. Tests are named `Class.test`, with wildcards."""

    lists: dict[str, Cases] = field(default_factory=dict)
    values: dict[str, tuple[str, Cases]] = field(default_factory=dict)
    rewritten: tuple[str, ...] = ()
    for_one_config: tuple[str, ...] = ()
    for_fixed_ranks: tuple[str, ...] = ()
    stands_in_for: str = "LoraConfig"
    skips_lifted: tuple[str, ...] = ()
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def rewritten_for(self, test: str, found: list[Subject]) -> list[Subject]:
        """The config classes that a test meets under another's name: none where it is not rewritten."""
        if self.reason_left_out(test) is not None:
            return []
        if _matches(test, self.for_one_config):
            return found[:1]
        if _matches(test, self.for_fixed_ranks):
            return [subject for subject in found if subject.takes_rank_pattern()]
        return found if _matches(test, self.rewritten) else []

    def reason_left_out(self, test: str) -> str | None:
        for reason, patterns in self.left_out.items():
            if _matches(test, patterns):
                return reason
        return None


def _matches(test: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(test, pattern) for pattern in patterns)


OTHER_METHOD = "about another PEFT method or an option of LoRA's that we do not offer"
LORA_NAMES = "looks for LoRA's own class, parameter names, numbers or representation"
LAYER_TYPES = "adapts embeddings, convolutions or attention; we adapt Linear and Conv1D"
PEFT_ONLY = "tests functions of PEFT that no tuner takes part in"
REAL_MODEL = "needs a real pretrained model or tokenizer from the hub"
WEIGHTED = "add_weighted_adapter exists for LoRA and IA3 alone"
MIXED = "PEFT mixes adapters within a batch for the methods it lists by name"
TRAINABLE_TOKENS = "trainable_token_indices is LoRA's option"

# Functions that skip a test for every class outside a list of PEFT's own, for a feature that ours have: here, Conv1D.
SKIPS_LIFTED_EVERYWHERE = ("_skip_if_conv1d_not_supported",)

MODEL = "model_cls, module_name"


def _the_same(values: list[Any]) -> Cases:
    return lambda _: values


def _by_class(found: list[Subject]) -> list[Any]:
    return list(subjects.config_classes(found))


def _layers(found: list[Subject]) -> list[Any]:
    """For DoRA's merge tests: PEFT's models with the layer types that we have."""
    del found
    models = import_module(f"{PACKAGE}.test_custom_models")
    return [(models.MLP, "lin0"), (models.MLP, "lin1"), (models.ModelEmbConv1D, "conv1d")]


def _linear_layer(found: list[Subject]) -> list[Any]:
    return [(subject.config_cls, {"target_modules": "l1.*", **subject.kwargs}) for subject in found]


def _transformers(models: str, names: list[str], task_type: str | None) -> dict[str, Cases]:
    return {models: _the_same(list(names)), "ALL_CONFIGS": subjects.transformer_cases(task_type)}


CUSTOM_MODELS = Selection(
    lists={
        "TEST_CASES": subjects.custom_model_cases,
        "ALL_PEFT_CONFIG_CLASSES": _by_class,
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": subjects.two_adapter_cases,
    },
    values={
        "TestPeftCustomModel.test_adapter_name_makes_no_difference": ("config0", subjects.single_configs),
        "TestPeftCustomModel.test_multiple_adapters_mixed_modules_to_save": ("config_cls", _by_class),
        "TestPeftCustomModel.test_multiple_adapters_mixed_modules_to_save_order_switched": ("config_cls", _by_class),
        "TestDefaultTargetModules.test_default_target_modules_not_set_raises": ("config_cls", _by_class),
        "TestDefaultTargetModules.test_default_target_modules_not_set_model_type_set_raises": ("config_cls", _by_class),
        "TestDefaultTargetModules.test_default_target_modules_list_of_str": ("config_cls", _by_class),
        "TestDefaultTargetModules.test_default_target_modules_str": ("config_cls", _by_class),
        "TestMultipleActiveAdapters.test_multiple_active_dora_adapters_merge_matches_forward": (MODEL, _layers),
        "TestMultipleActiveAdapters.test_plain_lora_and_dora_adapters_merge_matches_forward": (MODEL, _layers),
        "TestMultipleActiveAdapters.test_multiple_active_dora_adapters_safe_and_unsafe_merge_agree": (MODEL, _layers),
    },
    rewritten=(
        "TestPeftCustomModel.test_delete_adapter_with_multiple_adapters_works",
        "TestPeftCustomModel.test_delete_adapter_multiple_adapters_with_modules_to_save",
        "TestPeftCustomModel.test_weight_bias_attributes",
        "TestPeftCustomModel.test_multiple_adapters_automatic_modules_to_save",
        "TestPeftCustomModel.test_multiple_adapters_no_needless_copy_modules_to_save",
        "TestPeftCustomModel.test_existing_model_card",
        "TestPeftCustomModel.test_non_existing_model_card",
        "TestPeftCustomModel.test_save_embedding_layers_excludes_similarly_named_sibling",
        "TestPeftCustomModel.test_load_does_not_overwrite_similarly_named_sibling",
        "TestPeftCustomModel.test_ignore_mismatched_sizes_with_scalar_modules_to_save",
    ),
    for_one_config=(
        "TestPeftCustomModel.test_gpt2_dora_merge_and_unload*",
        "TestMultipleActiveAdapters.*_dora_adapters_*",
    ),
    left_out={
        OTHER_METHOD: (
            "TestPeftCustomModel.test_ia3_*",
            "TestPeftCustomModel.test_glora_*",
            "TestPeftCustomModel.test_gralora_*",
            "TestPeftCustomModel.test_monteclora_*",
            "TestPeftCustomModel.test_pvera_*",
            "TestPeftCustomModel.test_lora_safe_merge_does_not_mutate_base_layer_on_non_finite_bias",
            "TestPeftCustomModel.test_merge_with_lora_bias_*",
            "TestDynamicDispatch.*",
            "TestDefaultTargetModules.test_default_target_modules_osf",
        ),
        LORA_NAMES: (
            "TestPeftCustomModel.test_dora_save_and_load_remapping",
            "TestMultiRankAdapter.*",
            "TestLayerRepr.*",
            "TestRequiresGrad.test_requires_grad_*",
            "TestRequiresGrad.test_loading_adapter_preserves_custom_requires_grad",
        ),
        LAYER_TYPES: (
            "TestPeftCustomModel.test_unload_adapter_multihead_attention",
            "TestPeftCustomModel.test_save_pretrained_targeting_lora_to_embedding_layer*",
            "TestPeftCustomModel.test_load_resized_embedding_ignore_mismatched_sizes",
            "TestPeftCustomModel.test_mha_*",
        ),
        WEIGHTED: (
            "TestPeftCustomModel.test_add_weighted_adapter_*",
            "TestPeftCustomModel.test_multiple_adapters_*_merging_adapters*",
        ),
        MIXED: ("TestMixedAdapterBatches.*",),
        TRAINABLE_TOKENS: ("*trainable_token*", "*trainble_token*"),
        "builds a PeftMixedModel, which admits the methods it lists by name": (
            "TestPeftCustomModel.test_add_adapter_rejects_duplicate_name_without_mutation",
        ),
    },
)

TUNERS_UTILS = Selection(
    rewritten=(
        "TestTargetedModuleNames.test_*_targeted_module_*",
        "TestExcludedModuleNames.*",
        "TestBaseTunerWarnForTiedEmbeddings.*",
        "TestFindMinimalTargetModules.test_get_peft_modules_module_name_is_suffix_of_another_module",
        "TestModelAndLayerStatus.*",
    ),
    for_fixed_ranks=("TestRankAndAlphaPattern.*",),
    left_out={
        OTHER_METHOD: (
            "*ia3*",
            "*target_parameters*",
            "TestTargetedParameterNames.*",
            "TestModelAndLayerStatus.test_loha_model",
            "TestModelAndLayerStatus.test_vera_model",
            "TestModelAndLayerStatus.test_prefix_tuning",
            "TestModelAndLayerStatus.test_adaption_prompt",
            "TestModelAndLayerStatus.test_mixed_model_raises",
            "*layers_to_transform*",
        ),
        TRAINABLE_TOKENS: ("*trainable_token*",),
        LORA_NAMES: (
            "TestModelAndLayerStatus.test_module_type_small",
            "TestModelAndLayerStatus.test_adapter_model_type_small",
            "TestModelAndLayerStatus.test_peft_types_small",
            "TestModelAndLayerStatus.test_nb_params_small",
            "TestModelAndLayerStatus.test_model_status_with_modules_to_save",
            "TestTunerStateDictKeyPrefixes.*",
            "TestPeftCustomKwargs.test_add_second_adapter_with_all_linear_works",
            "TestPeftCustomKwargs.test_maybe_include_all_linear_does_not_target_classifier_head",
        ),
        LAYER_TYPES: ("TestModelAndLayerStatus.*_large", "TestModelAndLayerStatus.*_irregular", "*injected_layers"),
        PEFT_ONLY: (
            "TestBaseTunerGetModelConfig.*",
            "TestFindMinimalTargetModules.test_find_minimal_*",
            "TestFindMinimalTargetModules.test_suffix_*",
            "TestModelAndLayerStatus.*_raises",
            "TestExcludedModuleNames.test_no_matching_peft_module_error_hierarchy",
            "TestPeftCustomKwargs.test_regex_matching_valid",
        ),
        REAL_MODEL: (
            "*test_realistic_example",
            "TestFindMinimalTargetModules.test_get_peft_model_applies_find_target_modules",
            "TestModelAndLayerStatus.*transformers*",
            "TestPeftCustomKwargs.*",
        ),
    },
)

LOW_LEVEL = Selection(
    rewritten=(
        "TestPeftStateDict.*",
        "TestGetBaseModelStateDict.*",
        "TestStateDictFsdpShapeValidation.test_save_pretrained_succeeds_for_normal_lora",
    ),
    left_out={
        OTHER_METHOD: (
            "*target_parameters*",
            "*rejects_shared_state_tuners",
            "TestPeftStateDict.test_get_and_set_peft_model_state_dict_bias_in_module_name",
        ),
        LORA_NAMES: (
            "TestLowLevelFunctional.*",
            "TestPeftStateDict.test_base_model_module_named_like_peft_prefix",
            "TestStateDictFsdpShapeValidation.test_save_pretrained_warns_for_unsharded_state_dict",
        ),
        REAL_MODEL: ("TestInjectAdapterFromStateDict.*",),
    },
)

LORA_CONVERSION = Selection(
    stands_in_for="LoKrConfig",
    rewritten=("TestLoraConversion.*",),
    # compares two truncated SVDs to seven digits, which a compiled product of full rank (DoRA's) does not keep
    for_one_config=("TestLoraConversion.test_with_torch_compile",),
    left_out={
        OTHER_METHOD: (
            "TestMissLoraConversion.*",
            "TestKasaLoraConversion.*",
            "TestLoraConversion.test_no_peft_layer_raises",
            "TestLoraConversion.test_prompt_learning_model_raises",
            "TestLoraConversion.test_peft_model_but_no_support_raises",
            "TestLoraConversion.test_converted_lora_to_lora_works_and_warns",
            "TestLoraConversion.test_convert_model_with_trainable_bias_raises",
        ),
        LAYER_TYPES: ("TestLoraConversion.test_model_with_unsupported_layers_raises",),
        LORA_NAMES: ("TestLoraConversion.test_targeted_modules_identical*",),
    },
)

MAPPING = Selection(rewritten=("*",))

OTHER = Selection(
    values={"TestAdapterTargeting.test_self_targeting_is_ignored": ("config_cls, config_kwargs", _linear_layer)},
    rewritten=("TestModulesToSave*", "TestTargetingAuxiliaryTrainingWrapper.*"),
    left_out={
        TRAINABLE_TOKENS: ("*trainable_token*",),
        PEFT_ONLY: (
            "TestGetNoSplitModules.*",
            "TestGetModuleNamesTiedWithEmbedding.*",
            "TestPrepareModelForKbitTraining.*",
            "TestModulesToSaveAttributeAccess.test_transient_attribute_access_uninitialized_adapter",
        ),
        REAL_MODEL: ("test_*",),
    },
)

_PROMPT_LEARNING = (
    "*prompt_tuning*",
    "*prefix_tuning*",
    "*prompt_learning*",
)

DECODERS = Selection(
    lists={
        **_transformers("PEFT_DECODER_MODELS_TO_TEST", [hub.GPT2, hub.OPT, hub.LLAMA], "CAUSAL_LM"),
        "SMALL_GRID_MODELS": _the_same([]),
    },
    skips_lifted=("check_beft_config",),  # means to skip BEFT on Llama, and by mistake skips every method
    left_out={
        OTHER_METHOD: (*_PROMPT_LEARNING, "*adalora*", "*test_lora_layer_replication"),
        LAYER_TYPES: ("*embedding_layer", "*embed_scale*", "*test_merge_and_unload_fixes_tie_word_embeddings_config"),
        MIXED: ("*mixed_adapter_batches*",),
        WEIGHTED: ("*weighted_combination*",),
    },
)

ENCODER_DECODERS = Selection(
    lists=_transformers("PEFT_ENCODER_DECODER_MODELS_TO_TEST", [hub.T5], "SEQ_2_SEQ_LM"),
    left_out={
        OTHER_METHOD: (*_PROMPT_LEARNING, "*test_save_shared_tensors"),
        MIXED: ("*mixed_adapter_batches*",),
        WEIGHTED: ("*weighted_combination*",),
        REAL_MODEL: ("*test_load_model_low_cpu_mem_usage",),
    },
)

FEATURE_EXTRACTION = Selection(
    lists=_transformers("PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST", [hub.BERT, hub.ROBERTA], None),
    left_out={
        OTHER_METHOD: _PROMPT_LEARNING,
        WEIGHTED: ("*weighted_combination*",),
        REAL_MODEL: ("*test_load_model_low_cpu_mem_usage",),
    },
)

CLASSIFIERS = Selection(
    lists=_transformers("PEFT_SEQ_CLS_MODELS_TO_TEST", [hub.BERT_CLASSIFIER, hub.LLAMA_CLASSIFIER], "SEQ_CLS"),
    left_out={OTHER_METHOD: _PROMPT_LEARNING},
)

SELECTIONS = {
    "test_custom_models": CUSTOM_MODELS,
    "test_tuners_utils": TUNERS_UTILS,
    "test_low_level_api": LOW_LEVEL,
    "test_lora_conversion": LORA_CONVERSION,
    "test_mapping": MAPPING,
    "test_other": OTHER,
    "test_decoder_models": DECODERS,
    "test_encoder_decoder_models": ENCODER_DECODERS,
    "test_feature_extraction_models": FEATURE_EXTRACTION,
    "test_seq_classifier": CLASSIFIERS,
}
