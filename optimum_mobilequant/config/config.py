"""`MobileQuantConfig`: everything a quantization run is told, and everything a checkpoint says about itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NoReturn

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..data.sources import CALIBRATION, SELF, dataset_kind, dataset_record
from ..lookup import lookup, unknown_name
from ..methods import NO_ADAPTERS
from .options import DEFAULT_GROUP, DEFAULT_OUTLIERS, check_bits, check_format_options, check_values, whole
from .recipes import EFFORTS
from .settings import Settings, settings_of

if TYPE_CHECKING:
    from ..plan.presets import Scheme

FORMAT_VERSION = 1  # of what `to_dict` writes; raised whenever an older package could misread it


@dataclass(eq=False, repr=False)
class MobileQuantConfig(QuantizationConfigMixin):
    """Settings of one quantization run; stored in ``config.json`` of the result.

    For every option that accepts None (except where noted), None means "as the recipe and the effort say";
    [`resolve`] gives the concrete values. Options that contradict each other are refused, never ignored.

    Args:
        preset: bits of every tensor, a key of ``optimum_mobilequant.plan.PRESETS``.
        dataset: calibration text: ``"python-stdlib"``, ``"self"`` (the model writes it), a Hub dataset
            ``"owner/name"`` or ``"owner/name:config"``, the path of a ``.txt``, ``.jsonl`` or ``.parquet`` file, a
            list of texts, a list of token id sequences, or a ``datasets.Dataset``. Shared, never copied; only its
            name (or count and hash) is saved.
        dataset_split: split of a named dataset; None takes ``"train"``.
        text_column: column that holds the text; None takes ``"text"``, then ``"input_ids"``.
        tokenizer: tokenizer object or name; None loads the one that belongs to the model.
        recipe: what is done, a key of ``optimum_mobilequant.config.recipes.RECIPES``. None takes the effort's own:
            ``"best"`` at ``"default"`` and ``"best"``, ``"mobilequant"`` below, wherever ``weight_format`` has no
            integers to learn, and with ``tuning="none"`` or ``steps=0``. The config then states its name.
        effort: how much is spent on it, a key of ``optimum_mobilequant.config.recipes.EFFORTS``.
        seed: seed of data order and training.
        overrides: exceptions to the preset. Keys are ``fnmatch`` patterns of module or tensor names, values hold
            any of ``weight_bits`` (3, 4, 8 or 16), ``weight_symmetric`` (bool), ``weight_granularity`` (``"channel"``,
            ``"tensor"``, ``"group32"``, ``"group64"`` or ``"group128"``) and ``bits`` (activations, 8 or 16). They
            win over any preset, the paper's included.
        bits: a budget that decides over the weight bits of the projections: ``"auto:1.2GB"`` of saved tensors,
            ``"auto:4.5"`` bits on average, or ``"auto:device"``, the memory that is free here when the run begins. The
            result is a set of ``overrides``. None: the preset's bits.
        sensitivity: what an allocation goes by, ``"hessian"`` (the default), ``"kl"`` or ``"jaccard"``.
        bit_choices: bits an allocation chooses from, any of 3, 4, 8 and 16; None takes 4 and 8.
        weight_format: how the projections are stored: ``"int"`` (the default), or for CPU and GPU only ``"adpq"`` or
            ``"e0m4"``; see ``docs/formats.md``. weight_group: columns that share a range there, 32, 64 or 128 (the
            default). outlier_share: share of a row that ``"adpq"`` keeps apart, in [0, 0.2]; None takes 0.01.
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
        transforms: sites to transform, any of ``norm_qkv``, ``norm_mlp``, ``up_down``, ``v_o``, ``q_k`` (scales),
            ``v_o_dense`` and ``q_k_rotation`` (matrices), ``signs`` (of channels).
        rotate: ``"r1"`` rotates the residual stream, ``"r2"`` the values of each KV head, ``"r1r2"`` both; all merge
            into weights. None means as the recipe says.
        untie: give a head that shares the embedding's table a table of its own (vocabulary x hidden bytes at 8 bits);
            ``rotate="r1"`` needs it.
        smoothing: ``"balance"`` (SmoothQuant) or ``"adaptive"`` (QQQ). smooth_alpha: strength of the former in [0, 1].
        learn_transforms, learn_matrices, learn_clips, learn_ranges: what training moves.
        range_init: ``"minmax"``, ``"percentile"``, ``"mse"``, ``"lp"`` (errors to a power) or
            ``"output"`` (least error of each layer's output). clip_init: ``"none"``, ``"mse"`` or ``"adpq"``.
        range_norm: that power.
        bias_correction: take the mean error of each channel out of the biases of projections; they get one where the
            architecture has a flag for it.
        rounding: ``"nearest"``, ``"learned"``, ``"gptq"`` or ``"qronos"``; always after the transforms are final.
        rounding_start: what learned rounding starts from: ``"nearest"``, ``"gptq"`` or ``"qronos"``.
        hidden_weight: of learned rounding: weight of the error of the last hidden states, beside the divergence of the
            logits.
        rounding_steps: optimiser steps of learned rounding.
        magr: reduce the largest weight of each row before ``"gptq"`` or ``"qronos"``.
        rounding_damping: share of the mean of the Hessian's diagonal that these two add to it, in (0, 1].
        rounding_act_order: round the columns with the largest inputs first. rounding_block: columns at a time.
        lr_transforms, lr_matrices, lr_clips, lr_ranges, lr_offsets, lr_gains: learning rates.
        top_k: teacher logits that enter ``logits_kl`` one by one.
        finetune: what is trained behind the rounding: ``"none"``, ``"scales"`` (row scales, activation ranges, norm
            gains and biases, the integers of the matrices frozen) or ``"qad"`` (the weights as well, by offsets inside
            the rounding). finetune_steps: optimiser steps on the logits. feature_steps: on hidden states, before
            those.
        finetune_dataset, finetune_split, finetune_samples: text for it, as ``dataset``, or ``"calibration"`` for the
            calibration text. ``"self"``: the model writes it, and begins half of it with pieces of the calibration
            text. None is ``"calibration"`` for ``"scales"`` and ``"self"`` for ``"qad"``, which learns by heart what
            it reads many times. Samples: as many as the steps read. Validation stays on the calibration text.
        teachers: models to imitate while fine-tuning, of the same vocabulary: names or folders, ``"float"`` for the
            model itself, or ``{"model": name, "weight": number}``; weights are relative. None means ``["float"]``.
        adapter_rank: rank of the offsets of ``"qad"``; 0 gives each weight one of its own, at ``lr_offsets``.
            lr_adapters: learning rate of low-rank ones; lr_finetune: that of norm gains and biases.
        cross_entropy, temperature, attention_alignment, attention_entropy, token_share: the loss of fine-tuning, see
            ``optimum_mobilequant.tune.distill.Terms``.
        gradient_checkpointing: recompute each layer in the backward pass: a third more time for a fraction of the
            memory, the same result bit for bit. None recomputes where the tensors of all layers would fill more than
            half of the free memory.
        teacher_dtype: ``"float32"`` or ``"bfloat16"``.
        prefix: tokens whose keys and values stand in the cache before every text, so that the text has no massive
            activations: True searches them, a number searches at most so many, a list of token ids is taken as it is,
            ``"auto"`` searches them where the model has massive activations and else does nothing, False does
            nothing. A finished checkpoint states the list, or False. See ``docs/prefix.md``.
        key_shift: add a constant to the rotated keys of each layer, which attention does not see and which makes their
            static range smaller; one addition at run time. A finished checkpoint states True or False. See
            ``docs/transforms.md``.
        device: where to work, e.g. ``"cuda:0"``; None stays where the model is.
        backend: what the result, and a model loaded from it, computes with: ``"auto"``, ``"cpp"``, ``"onednn"``,
            ``"triton"``, ``"reference"`` or ``"simulate"``; see :func:`optimum_mobilequant.set_backend`.
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
    recipe: str | None = None
    effort: str = "default"
    seed: int = 0
    overrides: dict[str, dict[str, Any]] | None = None
    bits: str | None = None
    sensitivity: str | None = None
    bit_choices: list[int] | tuple[int, ...] | None = None
    weight_format: str | None = None
    weight_group: int | None = None
    outlier_share: float | None = None
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
    smoothing: str | None = None
    rotate: str | None = None
    untie: bool = False
    smooth_alpha: float | None = None
    learn_transforms: bool | None = None
    learn_matrices: bool | None = None
    learn_clips: bool | None = None
    learn_ranges: bool | None = None
    range_init: str | None = None
    range_norm: float | None = None
    bias_correction: bool | None = None
    clip_init: str | None = None
    lr_transforms: float | None = None
    lr_matrices: float | None = None
    lr_clips: float | None = None
    lr_ranges: float | None = None
    rounding: str | None = None
    rounding_start: str | None = None
    hidden_weight: float | None = None
    rounding_steps: int | None = None
    magr: bool | None = None
    rounding_damping: float | None = None
    rounding_act_order: bool | None = None
    rounding_block: int | None = None
    lr_offsets: float | None = None
    lr_gains: float | None = None
    top_k: int | None = None
    finetune: str | None = None
    finetune_steps: int | None = None
    feature_steps: int | None = None
    finetune_dataset: Any = None
    finetune_split: str | None = None
    finetune_samples: int | None = None
    teachers: list[str | dict[str, Any]] | tuple[str | dict[str, Any], ...] | None = None
    adapter_rank: int | None = None
    lr_adapters: float | None = None
    lr_finetune: float | None = None
    cross_entropy: float | None = None
    temperature: float | None = None
    attention_alignment: float | None = None
    attention_entropy: float | None = None
    token_share: float | None = None
    gradient_checkpointing: bool | None = None
    teacher_dtype: str = "float32"
    prefix: bool | int | str | list[int] | tuple[int, ...] | None = None
    key_shift: bool | None = None
    device: str | None = None
    backend: str = "auto"
    run_dir: str | PathLike[str] | None = None
    recorded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.run_dir, PathLike):
            self.run_dir = fspath(self.run_dir)
        if isinstance(self.dataset, PathLike):
            self.dataset = fspath(self.dataset)
        if isinstance(self.finetune_dataset, PathLike):
            self.finetune_dataset = fspath(self.finetune_dataset)
        for name in ("transforms", "bit_choices", "teachers", "prefix"):
            if isinstance(value := getattr(self, name), tuple):
                setattr(self, name, list(value))
        self.validate()
        self.recipe = self.resolve().recipe

    def validate(self) -> None:
        """Check every field and their combination.

        Raises:
            ValueError: see the class.
        """
        for f in fields(self):
            if f.default is not None and getattr(self, f.name) is None:
                raise ValueError(f"{f.name} must not be None; leave it out for the default")
        check_values({f.name: getattr(self, f.name) for f in fields(self)})
        dataset_kind(self.dataset)
        dataset_kind(self.finetune_dataset)
        check_bits(self.bits, self.sensitivity, list(self.bit_choices or ()), self.resolve_scheme())
        check_format_options(
            self.weight_format, self.weight_group, self.outlier_share, self.bits, self.clip_init, self.learn_clips
        )
        settings = self.resolve()
        if self.weight_format not in (None, "int") and (settings.rounding, settings.finetune) != ("nearest", "none"):
            raise ValueError(
                f'weight_format="{self.weight_format}" rounds to nearest and has no integers to learn or fine-tune, '
                f'which recipe "{settings.recipe}" does here; use recipe="adpq" or "mobilequant", or '
                'weight_format="int"'
            )

    def resolve(self) -> Settings:
        """Concrete settings: recipe defaults <- effort <- the values set here.

        Raises:
            ValueError: contradicting options.
        """
        choices = {f.name: getattr(self, f.name) for f in fields(self) if f.name in Settings.__dataclass_fields__}
        for name in ("recipe", "effort", "seed"):
            del choices[name]
        recipe = self.recipe
        if recipe is None:
            stored = self.weight_format not in (None, "int")
            untrained = self.tuning == "none" or self.steps == 0
            recipe = "mobilequant" if stored or untrained else lookup("effort", EFFORTS, self.effort).recipe
        settings = settings_of(recipe, self.effort, choices, seed=self.seed)
        if settings.finetune == "none":
            for name in ("finetune_dataset", "teachers"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f'{name} would have no effect: nothing is fine-tuned; set finetune="scales" or "qad"'
                    )
        own = self.finetune_text(settings)
        for name in ("finetune_split", "finetune_samples"):
            if own is None and getattr(self, name) is not None:
                raise ValueError(f"{name} would have no effect: it belongs to a finetune_dataset, and there is none")
        return settings

    def finetune_text(self, settings: Settings) -> Any:
        """The dataset that fine-tuning reads; None where it has none of its own but takes the calibration text."""
        if self.finetune_dataset is None:
            return SELF if settings.finetune == "qad" else None
        shared = isinstance(self.finetune_dataset, str) and self.finetune_dataset == CALIBRATION
        return None if shared else self.finetune_dataset

    def prefix_ids(self) -> tuple[int, ...]:
        """The prefix tokens of a finished checkpoint; empty if it has none."""
        return tuple(self.prefix) if isinstance(self.prefix, list) else ()

    def resolve_scheme(self) -> Scheme:
        """Bits of every role: the stored ``scheme`` if there is one, else the table's row for ``preset``.

        Raises:
            ValueError: unknown preset, or a stored scheme that this version cannot read.
        """
        from ..plan.presets import PRESETS, Scheme, with_format

        if self.scheme is None:
            scheme = lookup("preset", PRESETS, self.preset)
            if self.weight_format in (None, "int"):
                return scheme
            outliers = DEFAULT_OUTLIERS if self.outlier_share is None else self.outlier_share
            return with_format(scheme, self.weight_format, span=self.weight_group or DEFAULT_GROUP, outliers=outliers)
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
            kwargs: options that win over ``config_dict``. A new ``preset`` or weight format drops the stored scheme.

        Returns:
            The config, or with ``return_unused_kwargs`` the pair of config and unused ``kwargs``.

        Raises:
            ValueError: an unknown option, another quantization method, or a format newer than this package.
        """
        values = dict(config_dict)
        if (method := values.pop("quant_method", cls.quant_method)) != cls.quant_method:
            raise ValueError(f'quant_method is "{method}", but this is the config of "{cls.quant_method}"')
        version = values.pop("format_version", FORMAT_VERSION)
        if not whole(1)(version):
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
        if chosen.keys() & {"preset", "weight_format", "weight_group", "outlier_share"}:
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
        for name in ("dataset", "finetune_dataset"):
            values[name] = dataset_record(values[name])
        if not isinstance(self.tokenizer, str):
            values["tokenizer"] = getattr(self.tokenizer, "name_or_path", None) or None
        values["scheme"] = self.resolve_scheme().to_dict()
        return json.loads(json.dumps(values))

    def to_diff_dict(self) -> dict[str, Any]:
        """[`to_dict`] without what equals the default; enough to rebuild the config with this package version."""
        from ..plan.presets import PRESETS

        values, default = self.to_dict(), type(self)().to_dict()
        if self.resolve_scheme() == PRESETS.get(self.preset):
            del values["scheme"]
        kept = {"quant_method", "format_version", "preset", "recipe", "effort", "scheme"}
        return {name: value for name, value in values.items() if name in kept or value != default[name]}

    @property
    def get_apply_tensor_subclass(self) -> NoReturn:
        """Always raises ``ValueError``: peft asks for this before it wraps a quantized model's layers, and for nothing
        else by which a method could tell why it takes no adapters."""
        raise ValueError(NO_ADAPTERS)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MobileQuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> MobileQuantConfig:
        # transformers deep-copies configs; a corpus or tokenizer must neither be duplicated nor fail to copy
        memo |= {id(shared): shared for shared in (self.dataset, self.finetune_dataset, self.tokenizer)}
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new
