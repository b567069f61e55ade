"""What each option of the config may hold; one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..lookup import lookup, unknown_name
from .recipes import (
    CLIP_INITS,
    FINETUNES,
    MATRIX_SITES,
    OBJECTIVES,
    RANGE_INITS,
    ROTATIONS,
    ROUNDING_STARTS,
    ROUNDINGS,
    SENSITIVITIES,
    SIGN_SITES,
    SITES,
    SMOOTHINGS,
    TEACHER_DTYPES,
    TUNINGS,
    WEIGHT_FORMATS,
)

if TYPE_CHECKING:
    from ..plan.presets import Scheme

# What a loaded model computes with; see runtime.set_backend.
BACKENDS = ("auto", "reference", "onednn", "cpp", "triton", "simulate")
_CHOICES = {
    "backend": BACKENDS,
    "objective": OBJECTIVES,
    "tuning": TUNINGS,
    "smoothing": SMOOTHINGS,
    "range_init": RANGE_INITS,
    "clip_init": CLIP_INITS,
    "rounding": ROUNDINGS,
    "rounding_start": ROUNDING_STARTS,
    "finetune": FINETUNES,
    "rotate": ROTATIONS,
    "teacher_dtype": TEACHER_DTYPES,
    "sensitivity": SENSITIVITIES,
    "weight_format": WEIGHT_FORMATS,
}
_BITS = (3, 4, 8, 16)  # of matrices
DEFAULT_GROUP, DEFAULT_OUTLIERS = 128, 0.01  # of the storage formats of weights
_OVERRIDES: dict[str, tuple[Any, ...]] = {
    "weight_bits": _BITS,
    "weight_symmetric": (True, False),
    "weight_granularity": ("channel", "tensor", "group32", "group64", "group128"),
    "weight_format": ("int",),
    "bits": (8, 16),
}


def whole(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _distinct(value: Any, known: tuple[int, ...]) -> bool:
    """Two or more different ones of ``known``."""
    numbers = isinstance(value, list) and all(type(item) is int and item in known for item in value)
    return numbers and len(set(value)) == len(value) > 1


def _teachers(value: Any) -> bool:
    def passes(row: Any) -> bool:
        if isinstance(row, dict) and row.keys() <= {"model", "weight"} and "model" in row:
            weight = row.get("weight", 1.0)
            return passes(row["model"]) and _number(weight) and 0 < weight < float("inf")
        return isinstance(row, str) and bool(row)

    return isinstance(value, list) and bool(value) and all(passes(row) for row in value)


def _token_ids(value: list[Any]) -> bool:
    return bool(value) and all(whole(0)(item) for item in value)


# (fields, test, what the value must be); None is checked for nowhere else and always passes
_VALUE_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("samples", "batch_size", "top_k", "rounding_block", "finetune_samples"),
        whole(1),
        "a whole number from 1",
    ),
    (("seq_len",), whole(2), "a whole number from 2"),
    (
        ("steps", "rounding_steps", "finetune_steps", "feature_steps", "adapter_rank", "seed"),
        whole(0),
        "a whole number from 0",
    ),
    (
        (
            "lr_transforms",
            "lr_matrices",
            "lr_clips",
            "lr_ranges",
            "lr_offsets",
            "lr_gains",
            "lr_adapters",
            "lr_finetune",
        ),
        lambda v: _number(v) and 0 < v < 10,
        "a number in (0, 10)",
    ),
    (("rounding_damping",), lambda v: _number(v) and 0 < v <= 1, "a number in (0, 1]"),
    (("smooth_alpha", "cross_entropy"), lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    (("token_share",), lambda v: _number(v) and 0 < v <= 1, "a number in (0, 1]"),
    (("temperature",), lambda v: _number(v) and 0.1 <= v <= 100, "a number in [0.1, 100]"),
    (
        ("attention_alignment", "attention_entropy", "hidden_weight"),
        lambda v: _number(v) and 0 <= v <= 100,
        "a number in [0, 100]",
    ),
    (
        ("teachers",),
        _teachers,
        'a list of "float" (the model itself), model names, or {"model": name, "weight": positive number}',
    ),
    (("range_norm",), lambda v: _number(v) and 1 <= v <= 10, "a number in [1, 10]"),
    (
        (
            "learn_transforms",
            "learn_matrices",
            "learn_clips",
            "learn_ranges",
            "gradient_checkpointing",
            "magr",
            "rounding_act_order",
            "untie",
            "bias_correction",
            "key_shift",
        ),
        lambda v: isinstance(v, bool),
        "True or False",
    ),
    (("bos",), lambda v: isinstance(v, bool) or v == "auto", '"auto", True or False'),
    (
        ("device", "family", "run_dir", "dataset_split", "text_column", "target", "finetune_split"),
        lambda v: isinstance(v, str),
        "a string",
    ),
    (
        ("prefix",),
        lambda v: isinstance(v, bool) or v == "auto" or whole(1)(v) or (isinstance(v, list) and _token_ids(v)),
        '"auto", True, False, a whole number from 1 or a list of token ids',
    ),
    (("transforms",), _strings, "a list of names"),
    (("weight_group",), lambda v: type(v) is int and v in (32, 64, 128), "32, 64 or 128"),
    (("outlier_share",), lambda v: _number(v) and 0 <= v <= 0.2, "a number in [0, 0.2]"),
    (("bits",), lambda v: isinstance(v, str), 'a string such as "auto:4.5", "auto:1.2GB" or "auto:device"'),
    (
        ("bit_choices",),
        lambda v: _distinct(v, _BITS),
        f"a list of two or more of {_BITS}, e.g. [4, 8]",
    ),
    (("overrides", "recorded", "scheme"), lambda v: isinstance(v, dict), "a dict"),
    (
        ("tokenizer",),
        lambda v: isinstance(v, str) or callable(v),
        "a tokenizer, the name of one, or None for the model's own",
    ),
)


def check_values(values: Mapping[str, Any]) -> None:
    """Check each option by itself; ``values`` holds all of them by name.

    Raises:
        ValueError: a value of the wrong kind, or an unknown name with the nearest known one.
    """
    for names, passes, what in _VALUE_RULES:
        for name in names:
            value = values[name]
            if value is not None and not passes(value):
                raise ValueError(f"{name} must be {what}, not {value!r}")
    for name, known in _CHOICES.items():
        if (value := values[name]) is not None and value not in known:
            raise ValueError(unknown_name(name, value, known))
    for site in values["transforms"] or ():
        if site not in (*SITES, *MATRIX_SITES, *SIGN_SITES):
            raise ValueError(unknown_name("transform", site, (*SITES, *MATRIX_SITES, *SIGN_SITES)))
    if (device := values["device"]) is not None:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f'device "{device}" is not a torch device, e.g. "cpu" or "cuda:0"') from error
    if (target := values["target"]) is not None:
        from ..exporters.targets import TARGETS

        lookup("target", TARGETS, target)
    check_overrides(values["overrides"] or {})


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Check ``{pattern: {name: value}}``.

    Raises:
        ValueError: see above.
    """
    for pattern, values in overrides.items():
        if not isinstance(pattern, str) or not isinstance(values, dict) or not values:
            raise ValueError(
                "overrides maps patterns of names to what changes there, "
                f'e.g. {{"*.down_proj": {{"weight_bits": 8}}}}, not {pattern!r}: {values!r}'
            )
        for key, value in values.items():
            allowed = lookup(f'override of "{pattern}"', _OVERRIDES, key)
            # 1 == True in Python: compare types too
            if not any(value == option and type(value) is type(option) for option in allowed):
                raise ValueError(f'overrides["{pattern}"]["{key}"] must be one of {allowed}, not {value!r}')


def check_bits(bits: str | None, sensitivity: str | None, bit_choices: list[int], scheme: Scheme) -> None:
    """Check the options of an allocation against each other and the bits of the preset.

    Raises:
        ValueError: a budget that cannot be read, or a contradiction.
    """
    if bits is None:
        for name, value in (("sensitivity", sensitivity), ("bit_choices", bit_choices)):
            if value:
                raise ValueError(f'{name}={value!r} would have no effect: it belongs to bits="auto:..."; set bits')
        return
    from ..allocate import parse_budget
    from ..allocate.stage import DEFAULT_CHOICES

    budget, choices = parse_budget(bits), sorted(bit_choices or DEFAULT_CHOICES)
    if budget.kind == "bits" and not min(choices) <= budget.value <= max(choices):
        raise ValueError(
            f'bits="{bits}" lies outside bit_choices={choices}: the smallest is "auto:{min(choices)}", the largest '
            f'"auto:{max(choices)}"; add other bits to bit_choices, or change the budget'
        )
    for role in ("attention", "gate", "up", "down"):
        rule = scheme.weights[role]
        if rule.granularity.startswith("group"):
            raise ValueError(
                f'the preset\'s {role} weights have groups, which are 4 bits always; use preset="w4a8" or "w8a8"'
            )
        if rule.granularity == "tensor" and min(choices) < 8:
            raise ValueError(
                f"the preset has one scale for a whole {role} matrix, which {min(choices)} bits are too few for; use "
                'preset="w8a8", or bit_choices=[8, 16]'
            )
        if rule.bits not in choices:
            raise ValueError(
                f"the preset has {rule.bits}-bit {role} weights, which are not among bit_choices={choices}: use a "
                f"preset with {' or '.join(map(str, choices))} bits, or add {rule.bits}"
            )


def check_format_options(
    name: str | None,
    group: int | None,
    outliers: float | None,
    bits: str | None,
    clip_init: str | None,
    learn_clips: bool | None,
) -> None:
    """Check the options of a storage format against each other.

    Raises:
        ValueError: a contradiction, or an option without effect.
    """
    stored = name not in (None, "int")
    for option, value, needed in (
        ("weight_group", group, 'weight_format="adpq" or "e0m4"'),
        ("outlier_share", outliers, 'weight_format="adpq"'),
    ):
        if value is not None and (not stored or (option == "outlier_share" and name != "adpq")):
            raise ValueError(f"{option}={value} would have no effect: it belongs to {needed}")
    if not stored:
        return
    if bits is not None:
        raise ValueError(f'weight_format="{name}" has fixed bits, which bits="{bits}" is to choose; leave one out')
    if learn_clips:
        raise ValueError(f'learn_clips=True would have no effect with weight_format="{name}", which clips nothing')
    if clip_init == "adpq":
        raise ValueError(f'clip_init="adpq" would have no effect with weight_format="{name}"; it is for "int"')
