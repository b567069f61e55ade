import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_mobilequant.config.config import FORMAT_VERSION, MobileQuantConfig
from optimum_mobilequant.config.recipes import EFFORTS, MATRIX_SITES, RECIPES, SIGN_SITES, SITES
from optimum_mobilequant.plan.presets import PRESETS


def round_trip(config: MobileQuantConfig) -> MobileQuantConfig:
    return MobileQuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))


class Tokenizer:
    name_or_path = "owner/tokenizer"

    def __call__(self, text): ...

    def __deepcopy__(self, memo):
        raise AssertionError("the tokenizer was copied")


EXAMPLES = {
    "default": {},
    "in-memory texts and tokenizer": {"dataset": ["one", "two"], "tokenizer": Tokenizer()},
    "in-memory ids": {"dataset": [[1, 2, 3], [4]]},
    "fine-tuning": {
        "recipe": "qad",
        "dataset": "self",
        "finetune_dataset": [[1, 2, 3], [4]],
        "finetune_samples": 12,
        "finetune_steps": 20,
        "feature_steps": 10,
        "teachers": ("float", "owner/larger", {"model": "owner/largest", "weight": 0.5}),
        "adapter_rank": 8,
        "cross_entropy": 0.1,
        "temperature": 2,
        "attention_alignment": 0.5,
        "attention_entropy": 0.01,
        "token_share": 0.5,
    },
    "every kind of value": {
        "preset": "w4a8-asym",
        "dataset": "python-stdlib",
        "tokenizer": "owner/name",
        "overrides": {"*.down_proj": {"weight_bits": 8, "weight_granularity": "tensor"}, "*.v": {"bits": 16}},
        "transforms": ("norm_qkv", "up_down", "q_k_rotation"),
        "rotate": "r1r2",
        "untie": True,
        "lr_matrices": 1e-2,
        "smooth_alpha": 0,
        "learn_clips": False,
        "steps": 7,
        "bos": True,
        "recorded": {"losses": [1.5, 0.5], "versions": {"torch": "2"}},
    },
}


@pytest.mark.parametrize("options", EXAMPLES.values(), ids=EXAMPLES)
def test_json_round_trip_keeps_every_option(options):
    config = MobileQuantConfig(**options)
    reloaded = round_trip(config)
    assert reloaded.to_dict() == config.to_dict()
    assert reloaded == config
    assert reloaded.resolve() == config.resolve()
    assert reloaded.resolve_scheme() == config.resolve_scheme()


@pytest.mark.parametrize("options", EXAMPLES.values(), ids=EXAMPLES)
def test_diff_dict_rebuilds_the_config(options):
    config = MobileQuantConfig(**options)
    diff = json.loads(config.to_json_string())
    assert MobileQuantConfig.from_dict(diff) == config
    assert len(diff) < len(config.to_dict())
    assert diff["preset"] == config.preset


def test_is_a_transformers_quantization_config():
    config = MobileQuantConfig()
    assert isinstance(config, QuantizationConfigMixin)
    assert config.to_dict()["quant_method"] == config.quant_method == "mobilequant"
    assert dict(config) == config.to_dict()
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    assert "MobileQuantConfig" in repr(config)


def test_equality_looks_at_the_options():
    assert MobileQuantConfig(seed=1) == MobileQuantConfig(seed=1)
    assert MobileQuantConfig(seed=1) != MobileQuantConfig(seed=2)


def test_saved_form_names_the_data_and_never_contains_it():
    texts = ["first secret text", "second"]
    saved = MobileQuantConfig(dataset=texts, tokenizer=Tokenizer()).to_dict()
    assert saved["dataset"]["kind"] == "texts"
    assert saved["dataset"]["count"] == 2
    assert saved["tokenizer"] == "owner/tokenizer"
    assert "secret" not in json.dumps(saved)
    other = MobileQuantConfig(dataset=["first secret tex", "tsecond"]).to_dict()
    assert other["dataset"]["sha256"] != saved["dataset"]["sha256"]  # text borders count
    assert MobileQuantConfig(dataset="python-stdlib").to_dict()["dataset"] == "python-stdlib"


def test_same_ids_hash_the_same_as_lists_or_tensors():
    lists = MobileQuantConfig(dataset=[[1, 2], [3]]).to_dict()["dataset"]
    tensors = MobileQuantConfig(dataset=[torch.tensor([1, 2]), torch.tensor([3])]).to_dict()["dataset"]
    assert lists == tensors
    assert lists["kind"] == "ids"


def test_deepcopy_shares_dataset_and_tokenizer_only():
    config = MobileQuantConfig(dataset=["a", "b"], tokenizer=Tokenizer(), recorded={"a": [1]}, transforms=["v_o"])
    copied = copy.deepcopy(config)
    assert copied.dataset is config.dataset
    assert copied.tokenizer is config.tokenizer
    assert copied.recorded == config.recorded
    copied.recorded["a"].append(2)
    copied.transforms.append("q_k")
    assert config.recorded == {"a": [1]}
    assert config.transforms == ["v_o"]


def test_stored_scheme_wins_over_the_preset_table():
    scheme = replace(PRESETS["w4a8"], activations={**PRESETS["w4a8"].activations, "gate": 16})
    saved = {**MobileQuantConfig("w4a8").to_dict(), "scheme": scheme.to_dict()}
    assert MobileQuantConfig.from_dict(saved).resolve_scheme() == scheme != PRESETS["w4a8"]
    saved["preset"] = "a row of some later version"
    assert MobileQuantConfig.from_dict(saved).resolve_scheme() == scheme


def test_a_new_preset_drops_the_stored_scheme():
    saved = MobileQuantConfig("w8a8").to_dict()
    assert MobileQuantConfig.from_dict(saved, preset="w4a8").resolve_scheme() == PRESETS["w4a8"]
    config = MobileQuantConfig.from_dict(saved)
    config.update(preset="w4a8")
    assert config.resolve_scheme() == PRESETS["w4a8"]


def test_damaged_scheme_is_one_clear_error():
    with pytest.raises(ValueError, match="scheme is damaged"):
        MobileQuantConfig(scheme={"weights": {}})


def test_newer_format_asks_for_an_upgrade_before_anything_else():
    saved = {"format_version": FORMAT_VERSION + 1, "quant_method": "mobilequant", "option of the future": 1}
    with pytest.raises(ValueError, match="upgrade optimum-mobilequant"):
        MobileQuantConfig.from_dict(saved)


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match='"sampels" is unknown; did you mean "samples"'):
        MobileQuantConfig.from_dict({"sampels": 3})
    with pytest.raises(ValueError, match='did you mean "samples"'):
        MobileQuantConfig.from_dict({}, sampels=3)
    with pytest.raises(ValueError, match='"gptq"'):
        MobileQuantConfig.from_dict({"quant_method": "gptq"})
    config, unused = MobileQuantConfig.from_dict({"seed": 1}, return_unused_kwargs=True, seed=2, revision="main")
    assert config.seed == 2
    assert unused == {"revision": "main"}


def test_update_sets_all_or_nothing():
    config = MobileQuantConfig()
    assert config.update(seed=5, revision="main") == {"revision": "main"}
    assert config.seed == 5
    with pytest.raises(ValueError, match="samples"):
        config.update(seed=6, samples=0)
    assert config.seed == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "w4a88"}, 'preset "w4a88" is unknown; did you mean "w4a8"'),
        ({"recipe": "smoothqant"}, 'recipe "smoothqant" is unknown; did you mean "smoothquant"'),
        ({"effort": "defualt"}, 'did you mean "default"'),
        ({"objective": "logit_kl"}, 'did you mean "logits_kl"'),
        ({"tuning": "blockwise"}, 'did you mean "block-wise"'),
        ({"range_init": "min-max"}, 'did you mean "minmax"'),
        ({"transforms": ["norm_qvk"]}, 'did you mean "norm_qkv"'),
        ({"transforms": ["v_o_dens"]}, 'did you mean "v_o_dense"'),
        ({"rotate": "r3"}, 'rotate "r3" is unknown; known: r1, r2, r1r2'),
        ({"untie": "yes"}, "untie must be True or False"),
        ({"transforms": "norm_qkv"}, "transforms must be a list of names"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": True}, "seed must be a whole number"),
        ({"samples": 0}, "samples must be a whole number from 1"),
        ({"seq_len": 1}, "seq_len must be a whole number from 2"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"lr_ranges": 0}, "lr_ranges must be a number"),
        ({"smooth_alpha": 1.1}, r"smooth_alpha must be a number in \[0, 1\]"),
        ({"smooth_alpha": float("nan")}, "smooth_alpha must be a number"),
        ({"learn_clips": 1}, "learn_clips must be True or False"),
        ({"bos": "yes"}, "bos must be"),
        ({"device": "gpu"}, 'device "gpu" is not a torch device'),
        ({"tokenizer": 3}, "tokenizer must be"),
        ({"dataset": (text for text in "ab")}, "generator into a list"),
        ({"dataset": []}, "dataset is empty"),
        ({"dataset": {"train": ["a"]}}, "pick one"),
        ({"overrides": {"*.up_proj": {"weight_bit": 4}}}, 'did you mean "weight_bits"'),
        ({"overrides": {"*.up_proj": {"weight_bits": 5}}}, r"must be one of \(3, 4, 8, 16\)"),
        ({"overrides": {"*.up_proj": {"weight_symmetric": 1}}}, r"must be one of \(True, False\)"),
        ({"overrides": {"*.up_proj": {}}}, "overrides maps patterns"),
        ({"finetune": "scale"}, 'finetune "scale" is unknown; did you mean "scales"'),
        ({"recipe": "qad", "adapter_rank": -1}, "adapter_rank must be a whole number from 0"),
        ({"recipe": "qad", "token_share": 0}, r"token_share must be a number in \(0, 1\]"),
        ({"recipe": "qad", "temperature": 0}, "temperature must be a number"),
        ({"recipe": "qad", "cross_entropy": 1.5}, "cross_entropy must be a number"),
        ({"recipe": "qad", "attention_entropy": -1}, "attention_entropy must be a number"),
    ],
)
def test_bad_values_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MobileQuantConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "rtn", "learn_ranges": True}, 'learn_ranges=True .* recipe "rtn" trains nothing'),
        ({"recipe": "rtn", "tuning": "end-to-end"}, "tuning='end-to-end' .* trains nothing"),
        ({"recipe": "smoothquant", "steps": 5}, "steps=5 would have no effect"),
        ({"recipe": "rtn", "transforms": ["up_down"]}, 'use recipe="smoothquant"'),
        ({"recipe": "rtn", "smooth_alpha": 0.5}, "has no transform to act on"),
        ({"effort": "none", "steps": 10}, 'steps=10 would have no effect: effort="none"'),
        ({"steps": 0, "learn_clips": True}, "learn_clips=True would have no effect: steps=0"),
        ({"effort": "none", "lr_clips": 0.1}, "lr_clips=0.1 would have no effect"),
        ({"recipe": "mobilequant", "tuning": "none", "objective": "hidden_mse"}, 'tuning="none" trains nothing'),
        (
            {"learn_transforms": False, "learn_clips": False, "learn_ranges": False, "steps": 9},
            "are all off",
        ),
        ({"learn_ranges": False, "lr_ranges": 1e-3}, "learn_ranges is off"),
        ({"transforms": [], "learn_transforms": True}, "has no transform to act on"),
        ({"tuning": "block-wise", "objective": "logits_kl"}, "needs the logits"),
        ({"rotate": "r1", "objective": "hidden_mse"}, 'use objective="logits_kl"'),
        ({"rotate": "r1r2", "tuning": "block-wise"}, 'use objective="logits_kl"'),
        ({"rotate": "r1", "recipe": "omniquant-edge"}, 'or rotate="r2"'),
        ({"rotate": "r2", "transforms": ["v_o_dense"]}, "leave out one"),
        ({"learn_matrices": True}, "has no matrix to act on"),
        ({"lr_matrices": 0.1}, "learn_matrices is off"),
        ({"transforms": ["v_o_dense"], "smooth_alpha": 0.5}, "has no transform to act on"),
        ({"objective": "hidden_mse", "top_k": 5}, "top_k=5 would have no effect"),
        ({"finetune_steps": 5}, 'nothing is fine-tuned; set finetune="scales" or "qad"'),
        ({"recipe": "best", "teachers": ["float"]}, "teachers would have no effect: nothing is fine-tuned"),
        ({"finetune_dataset": "python-stdlib"}, "finetune_dataset would have no effect"),
        ({"finetune": "scales", "finetune_samples": 5}, "belongs to a finetune_dataset, and there is none"),
        ({"finetune": "scales", "finetune_split": "train"}, "belongs to a finetune_dataset, and there is none"),
        (
            {"recipe": "qad", "finetune_dataset": "calibration", "finetune_samples": 5},
            "belongs to a finetune_dataset, and there is none",
        ),
        ({"finetune": "scales", "adapter_rank": 4}, 'leaves the integers as they are; set finetune="qad"'),
        ({"recipe": "qad", "lr_adapters": 1e-3}, "has an offset of its own; set adapter_rank=32"),
        (
            {"recipe": "rtn", "finetune": "qad", "adapter_rank": 8, "lr_offsets": 0.02},
            "products of two matrices; set adapter_rank=0",
        ),
        (
            {"recipe": "mobilequant", "finetune": "scales", "lr_offsets": 0.1},
            'lr_offsets=0.1 .* set rounding="learned"',
        ),
        ({"finetune": "scales", "finetune_steps": 0}, "finetune_steps=0 runs no step of it"),
        ({"finetune": "qad", "effort": "none"}, 'effort="none" runs no step of it'),
    ],
)
def test_contradictions_are_refused_not_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        MobileQuantConfig(**options)


def test_validation_also_sees_later_assignments():
    config = MobileQuantConfig(recipe="rtn")
    config.learn_ranges = True
    with pytest.raises(ValueError, match="trains nothing"):
        config.resolve()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("effort", EFFORTS)
def test_every_recipe_resolves_at_every_effort(recipe, effort):
    settings = MobileQuantConfig(recipe=recipe, effort=effort).resolve()
    trains = RECIPES[recipe].tuning != "none" and effort != "none"
    assert settings.samples == EFFORTS[effort].samples
    assert set(settings.transforms) <= {*SITES, *MATRIX_SITES, *SIGN_SITES}
    assert (settings.steps > 0) is trains
    assert (settings.tuning != "none") is trains
    assert (settings.learn_transforms or settings.learn_clips or settings.learn_ranges) is trains
    assert (settings.eval_every > 0) is trains
    balanced = settings.transforms and settings.smoothing == "balance"
    assert (settings.smooth_alpha is None) is not bool(balanced)


def test_text_of_fine_tuning():
    def chosen(**options):
        config = MobileQuantConfig(dataset="calib.txt", **options)
        return config.finetune_text(config.resolve()), config.resolve().finetune_samples

    assert chosen(recipe="qad") == ("self", 8 * EFFORTS["default"].finetune_steps)
    assert chosen(recipe="qad", finetune_steps=3, feature_steps=2, batch_size=4) == ("self", 20)
    assert chosen(recipe="qad", finetune_samples=7) == ("self", 7)
    assert chosen(recipe="qad", finetune_dataset="calibration")[0] is None
    assert chosen(recipe="qad", finetune_dataset=["a text"])[0] == ["a text"]
    assert chosen(finetune="scales")[0] is None
    assert chosen(finetune="scales", finetune_dataset="self")[0] == "self"


def test_fine_tuning_moves_ranges_in_a_recipe_that_learns_none_unless_they_are_fixed():
    scales = {"recipe": "rtn", "finetune": "scales"}
    settings = MobileQuantConfig(**scales, lr_finetune=2e-3).resolve()
    assert (settings.finetune_ranges, settings.learn_ranges, settings.steps) == (True, False, 0)
    assert settings.eval_every == EFFORTS["default"].eval_every
    every = MobileQuantConfig(recipe="rtn", finetune="qad", lr_offsets=0.02).resolve()
    assert (every.adapter_rank, every.lr_offsets, every.rounding) == (0, 0.02, "nearest")
    assert MobileQuantConfig(**scales, learn_ranges=False).resolve().finetune_ranges is False
    assert MobileQuantConfig("w4a8").resolve().finetune_ranges is False
    none = MobileQuantConfig(recipe="qad", effort="none").resolve()
    assert (none.finetune, none.finetune_steps, none.feature_steps) == ("none", 0, 0)


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ({}, "best"),
        ({"effort": "best"}, "best"),
        ({"effort": "light"}, "mobilequant"),
        ({"effort": "none"}, "mobilequant"),
        ({"recipe": "mobilequant", "effort": "best"}, "mobilequant"),
        ({"preset": "w4a16", "weight_format": "adpq"}, "mobilequant"),
        ({"preset": "w4a16", "weight_format": "int"}, "best"),
        ({"tuning": "none"}, "mobilequant"),
        ({"steps": 0}, "mobilequant"),
    ],
)
def test_the_recipe_of_who_names_none_is_the_efforts_own(options, recipe):
    config = MobileQuantConfig(**options)
    assert config.recipe == config.resolve().recipe == config.to_dict()["recipe"] == recipe
    assert MobileQuantConfig.from_dict(config.to_diff_dict()) == config


def test_user_values_win_over_effort_and_recipe():
    options = {"samples": 3, "steps": 10, "smooth_alpha": 0, "lr_ranges": 0.5, "learn_clips": False}
    settings = MobileQuantConfig(recipe="mobilequant", **options).resolve()
    assert (settings.samples, settings.steps, settings.smooth_alpha, settings.lr_ranges) == (3, 10, 0, 0.5)
    assert settings.learn_clips is False
    assert settings.learn_ranges is True
    assert settings.eval_every == 10  # never beyond the last step
    assert settings.seq_len == EFFORTS["default"].seq_len


def test_block_wise_tuning_implies_its_objective():
    assert MobileQuantConfig(recipe="mobilequant", tuning="block-wise").resolve().objective == "hidden_mse"
    assert MobileQuantConfig(recipe="omniquant-edge", objective="hidden_mse").resolve().tuning == "block-wise"


def test_no_transforms_means_no_transform_is_learned():
    settings = MobileQuantConfig(transforms=[]).resolve()
    assert settings.transforms == ()
    assert settings.smooth_alpha is None
    assert settings.learn_transforms is False
    assert settings.learn_ranges is True


def test_matrices_are_learned_where_there_are_any():
    assert MobileQuantConfig().resolve().learn_matrices is False
    for options in ({"rotate": "r2"}, {"transforms": ["q_k_rotation"]}):
        settings = MobileQuantConfig(**options).resolve()
        assert settings.learn_matrices is True
        assert settings.learn_transforms is ("transforms" not in options)
        assert MobileQuantConfig(effort="none", **options).resolve().learn_matrices is False
