"""`MobileQuantConfig`: everything a quantization run is told, and everything a checkpoint says about itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .recipes import (
    CLIP_INITS,
    OBJECTIVES,
    RANGE_INITS,
    ROUNDINGS,
    SITES,
    TEACHER_DTYPES,
    TUNINGS,
    Settings,
    lookup,
    settings_of,
    unknown_name,
)
from .sources import dataset_kind, dataset_record

if TYPE_CHECKING:
    from .plan.presets import Scheme

FORMAT_VERSION = 1  # of what `to_dict` writes; raised whenever an older package could misread it

_CHOICES = {
    "objective": OBJECTIVES,
    "tuning": TUNINGS,
    "range_init": RANGE_INITS,
    "clip_init": CLIP_INITS,
    "rounding": ROUNDINGS,
    "teacher_dtype": TEACHER_DTYPES,
}
_OVERRIDES: dict[str, tuple[Any, ...]] = {
    "weight_bits": (4, 8),
    "weight_symmetric": (True, False),
    "weight_granularity": ("channel", "tensor"),
    "bits": (8, 16),
}


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


# (fields, test, what the value must be); None is checked for nowhere else and always passes
_VALUE_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("samples", "batch_size", "top_k"), _whole(1), "a whole number from 1"),
    (("seq_len",), _whole(2), "a whole number from 2"),
    (("steps", "rounding_steps", "seed"), _whole(0), "a whole number from 0"),
    (
        ("lr_transforms", "lr_clips", "lr_ranges", "lr_offsets", "lr_gains"),
        lambda v: _number(v) and 0 < v < 10,
        "a number in (0, 10)",
    ),
    (("smooth_alpha",), lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    (
        ("learn_transforms", "learn_clips", "learn_ranges", "gradient_checkpointing"),
        lambda v: isinstance(v, bool),
        "True or False",
    ),
    (("bos",), lambda v: isinstance(v, bool) or v == "auto", '"auto", True or False'),
    (
        ("device", "family", "run_dir", "dataset_split", "text_column", "target"),
        lambda v: isinstance(v, str),
        "a string",
    ),
    (("transforms",), _strings, "a list of names"),
    (("overrides", "recorded", "scheme"), lambda v: isinstance(v, dict), "a dict"),
    (
        ("tokenizer",),
        lambda v: isinstance(v, str) or callable(v),
        "a tokenizer, the name of one, or None for the model's own",
    ),
)


@dataclass(eq=False, repr=False)
class MobileQuantConfig(QuantizationConfigMixin):
    """Settings of one quantization run; stored in ``config.json`` of the result.

    For every option that accepts None (except where noted), None means "as the recipe and the effort say";
    [`resolve`] gives the concrete values. Options that contradict each other are refused, never ignored.

    Args:
        preset: bits of every tensor, a key of ``optimum_mobilequant.plan.PRESETS``.
        dataset: calibration text: ``"python-stdlib"``, a Hub dataset ``"owner/name"`` or ``"owner/name:config"``, the
            path of a ``.txt``, ``.jsonl`` or ``.parquet`` file, a list of texts, a list of token id sequences, or a
            ``datasets.Dataset``. Shared, never copied; only its name (or count and hash) is saved.
        dataset_split: split of a named dataset; None takes ``"train"``.
        text_column: column that holds the text; None takes ``"text"``, then ``"input_ids"``.
        tokenizer: tokenizer object or name; None loads the one that belongs to the model.
        recipe: what is done, a key of ``optimum_mobilequant.recipes.RECIPES``.
        effort: how much is spent on it, a key of ``optimum_mobilequant.recipes.EFFORTS``.
        seed: seed of data order and training.
        overrides: exceptions to the preset. Keys are ``fnmatch`` patterns of module or tensor names, values hold
            any of ``weight_bits`` (4 or 8), ``weight_symmetric`` (bool), ``weight_granularity`` (``"channel"`` or
            ``"tensor"``) and ``bits`` (activations, 8 or 16). They win over any preset, the paper's included.
        family: architecture family; None derives it from the model.
        target: backend that the result must run on, a key of ``optimum_mobilequant.exporters.targets.TARGETS``. What
            it cannot compute is refused before anything is tuned; nothing else changes. None checks nothing.
        scheme: the preset written out, as saved in a checkpoint; wins over the ``preset`` name, so that old
            checkpoints do not depend on today's preset table. None takes the table.
        samples: sequences for calibration and training. seq_len: tokens in each. batch_size: sequences at a time.
        bos: beginning-of-sequence token at the start of each text: ``"auto"`` follows the tokenizer.
        steps: optimiser steps (for each layer when block-wise); 0 trains nothing.
        objective: ``"logits_kl"`` or ``"hidden_mse"``.
        tuning: ``"end-to-end"``, ``"block-wise"`` or ``"none"``.
        transforms: sites to transform, any of ``norm_qkv``, ``norm_mlp``, ``up_down``, ``v_o``, ``q_k``.
        smooth_alpha: SmoothQuant migration strength in [0, 1].
        learn_transforms, learn_clips, learn_ranges: what training moves.
        range_init: ``"minmax"``, ``"percentile"`` or ``"mse"``. clip_init: ``"none"`` or ``"mse"``.
        rounding: ``"nearest"`` or ``"learned"``. rounding_steps: optimiser steps of learned rounding.
        lr_transforms, lr_clips, lr_ranges, lr_offsets, lr_gains: learning rates.
        top_k: teacher logits that enter ``logits_kl`` one by one.
        gradient_checkpointing: recompute each layer in the backward pass: a third more time for a fraction of the
            memory, the same result bit for bit. None recomputes.
        teacher_dtype: ``"float32"`` or ``"bfloat16"``.
        device: where to work, e.g. ``"cuda:0"``; None stays where the model is.
        run_dir: folder that keeps finished stages so that an interrupted run resumes; None keeps nothing.
        recorded: what the run measured (versions, losses, minutes, peak memory); filled by the run.

    Raises:
        ValueError: an unknown name, a value out of range, or a contradiction; the message names the fix.
    """

    quant_method: str = field(default="mobilequant", init=False)  # type: ignore[assignment]
    format_version: int = field(default=FORMAT_VERSION, init=False)
    preset: str = "w8a8"
    _: KW_ONLY
    dataset: Any = None
    dataset_split: str | None = None
    text_column: str | None = None
    tokenizer: Any = None
    recipe: str = "mobilequant"
    effort: str = "default"
    seed: int = 0
    overrides: dict[str, dict[str, Any]] | None = None
    family: str | None = None
    target: str | None = None
    scheme: dict[str, Any] | None = None
    samples: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    bos: bool | str = "auto"
    steps: int | None = None
    objective: str | None = None
    tuning: str | None = None
    transforms: list[str] | tuple[str, ...] | None = None
    smooth_alpha: float | None = None
    learn_transforms: bool | None = None
    learn_clips: bool | None = None
    learn_ranges: bool | None = None
    range_init: str | None = None
    clip_init: str | None = None
    lr_transforms: float | None = None
    lr_clips: float | None = None
    lr_ranges: float | None = None
    rounding: str | None = None
    rounding_steps: int | None = None
    lr_offsets: float | None = None
    lr_gains: float | None = None
    top_k: int | None = None
    gradient_checkpointing: bool | None = None
    teacher_dtype: str = "float32"
    device: str | None = None
    run_dir: str | PathLike[str] | None = None
    recorded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.run_dir, PathLike):
            self.run_dir = fspath(self.run_dir)
        if isinstance(self.dataset, PathLike):
            self.dataset = fspath(self.dataset)
        if isinstance(self.transforms, tuple):
            self.transforms = list(self.transforms)
        self.validate()

    def validate(self) -> None:
        """Check every field and their combination.

        Raises:
            ValueError: see the class.
        """
        for f in fields(self):
            if f.default is not None and getattr(self, f.name) is None:
                raise ValueError(f"{f.name} must not be None; leave it out for the default")
        for names, passes, what in _VALUE_RULES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not passes(value):
                    raise ValueError(f"{name} must be {what}, not {value!r}")
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) is not None and value not in known:
                raise ValueError(unknown_name(name, value, known))
        for site in self.transforms or ():
            if site not in SITES:
                raise ValueError(unknown_name("transform", site, SITES))
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f'device "{self.device}" is not a torch device, e.g. "cpu" or "cuda:0"') from error
        if self.target is not None:
            from .exporters.targets import TARGETS

            lookup("target", TARGETS, self.target)
        dataset_kind(self.dataset)
        self._validate_overrides()
        self.resolve_scheme()
        self.resolve()

    def _validate_overrides(self) -> None:
        for pattern, values in (self.overrides or {}).items():
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

    def resolve(self) -> Settings:
        """Concrete settings: recipe defaults <- effort <- the values set here.

        Raises:
            ValueError: contradicting options.
        """
        choices = {f.name: getattr(self, f.name) for f in fields(self) if f.name in Settings.__dataclass_fields__}
        for name in ("recipe", "effort", "seed"):
            del choices[name]
        return settings_of(self.recipe, self.effort, choices, seed=self.seed)

    def resolve_scheme(self) -> Scheme:
        """Bits of every role: the stored ``scheme`` if there is one, else the table's row for ``preset``.

        Raises:
            ValueError: unknown preset, or a stored scheme that this version cannot read.
        """
        from .plan.presets import PRESETS, Scheme

        if self.scheme is None:
            return lookup("preset", PRESETS, self.preset)
        try:
            return Scheme.from_dict(self.scheme)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the stored scheme is damaged ({type(error).__name__}: {error}); remove it to use the preset's"
            ) from error

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of [`to_dict`]; the signature is transformers'.

        Args:
            config_dict: saved or hand-written options.
            return_unused_kwargs: also return the ``kwargs`` that are no option here, instead of refusing them.
            kwargs: options that win over ``config_dict``. A new ``preset`` also drops the stored scheme.

        Returns:
            The config, or with ``return_unused_kwargs`` the pair of config and unused ``kwargs``.

        Raises:
            ValueError: an unknown option, another quantization method, or a format newer than this package.
        """
        values = dict(config_dict)
        if (method := values.pop("quant_method", cls.quant_method)) != cls.quant_method:
            raise ValueError(f'quant_method is "{method}", but this is the config of "{cls.quant_method}"')
        version = values.pop("format_version", FORMAT_VERSION)
        if not _whole(1)(version):
            raise ValueError(f"format_version must be a whole number from 1, not {version!r}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has format_version {version}, this package reads up to {FORMAT_VERSION}; "
                "upgrade optimum-mobilequant (pip install -U optimum-mobilequant)"
            )
        known = sorted(f.name for f in fields(cls) if f.init)
        unused = {name: value for name, value in kwargs.items() if name not in known}
        for name in [*values, *([] if return_unused_kwargs else unused)]:
            if name not in known:
                raise ValueError(unknown_name("MobileQuantConfig option", name, known))
        chosen = {name: value for name, value in kwargs.items() if name in known}
        if "preset" in chosen:
            values["scheme"] = None
        config = cls(**{**values, **chosen})
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set the options among ``kwargs`` and return the rest; on a bad value nothing changes (as `from_dict`)."""
        known = {f.name for f in fields(self) if f.init}
        current = {name: getattr(self, name) for name in known}
        changed, unused = type(self).from_dict(current, True, **kwargs)
        self.__dict__.update(changed.__dict__)
        return unused

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON types, with the scheme written out.

        Dataset contents and tokenizer objects are replaced: a dataset by its name or ``{"kind", "count", "sha256"}``,
        a tokenizer by its name or None.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["dataset"] = dataset_record(self.dataset)
        if not isinstance(self.tokenizer, str):
            values["tokenizer"] = getattr(self.tokenizer, "name_or_path", None) or None
        values["scheme"] = self.resolve_scheme().to_dict()
        return json.loads(json.dumps(values))

    def to_diff_dict(self) -> dict[str, Any]:
        """[`to_dict`] without what equals the default; enough to rebuild the config with this package version."""
        from .plan.presets import PRESETS

        values, default = self.to_dict(), type(self)().to_dict()
        if self.resolve_scheme() == PRESETS.get(self.preset):
            del values["scheme"]
        kept = {"quant_method", "format_version", "preset", "recipe", "effort", "scheme"}
        return {name: value for name, value in values.items() if name in kept or value != default[name]}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MobileQuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> MobileQuantConfig:
        # transformers deep-copies configs; a corpus or tokenizer must neither be duplicated nor fail to copy
        memo |= {id(shared): shared for shared in (self.dataset, self.tokenizer)}
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new
