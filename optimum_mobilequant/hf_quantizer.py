"""The transformers adapter: the only file that knows HfQuantizer and its differences between versions."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from .checkpoint import check_files, scheme_digest, skeleton
from .checkpoint.files import DIGEST_KEY, check_values
from .config import MobileQuantConfig
from .data.sources import dataset_record
from .families import family_of, geometry_of
from .hub.tags import add_tags, remove_tags
from .log import get_logger
from .methods import add_methods, remove_methods
from .nn.dynamic import refuse_dynamic
from .plan import Plan, build_plan
from .registration import METHOD
from .runtime import set_backend

logger = get_logger(__name__)


class MobileQuantHfQuantizer(HfQuantizer):
    """Calibrates a float checkpoint as it is loaded, and loads what :func:`~optimum_mobilequant.quantize` saved."""

    requires_calibration = False
    quantization_config: MobileQuantConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, before anything is built, what could not work.

        Raises:
            ValueError: disk or mixed CPU device maps; a float checkpoint spread over devices, or without a dataset.
        """
        device_map = kwargs.get("device_map")
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "mobilequant supports no disk offload or CPU/GPU split; use device_map=None or one device"
            )
        if not self.pre_quantized:
            if len(places) > 1:
                raise ValueError(
                    f"quantizing runs on one device, and this device_map names {len(places)}; use device_map=None or "
                    'one device such as {"": 0} (the saved checkpoint can be spread when it is loaded)'
                )
            if self.quantization_config.dataset is None:
                raise ValueError(
                    'static activation ranges need calibration text: MobileQuantConfig(..., dataset="calib.txt")'
                )
            self.quantization_config.resolve()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Calibration works in float32; a quantized checkpoint is loaded in the dtype asked for."""
        if not self.pre_quantized and dtype != torch.float32:
            logger.info(f"mobilequant tunes in float32; dtype={dtype} applies when the saved checkpoint is loaded")
            return torch.float32
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        plan = plan_of(model, config)
        skeleton(model, plan)
        untie(model)
        ignore_sentinel(model, plan)
        check_files(model, kwargs.get("checkpoint_files") or [], config.to_dict(), sentinel_key(plan))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            check_values(model)
            add_tags(model, self.quantization_config)
            add_methods(model)
            set_backend(model, self.quantization_config.backend)
            return model
        from .pipeline import quantize

        return quantize(model, None, self.quantization_config)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The model's tensors, and a zero-size one under a key that makes transformers without this package fail.

        Without the plugin, ``from_pretrained`` ignores the quantization config and would return random weights with a
        warning; a shape mismatch on one expected key raises instead.

        Raises:
            ValueError: the model is run in a way that no file can hold.
        """
        refuse_dynamic(model, "a checkpoint")
        plan = plan_of(model, self.quantization_config)
        state = dict(model.state_dict())
        state[sentinel_key(plan)] = torch.zeros(0)
        return state, {"format": "pt", DIGEST_KEY: scheme_digest(self.quantization_config.to_dict())}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        from .checkpoint.restore import restore_float

        # save_pretrained leaves a string in the model's config
        set_backend(model, "simulate")
        wanted: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        restore_float(model, plan_of(model, self.quantization_config), wanted)
        remove_tags(model)
        remove_methods(model)
        return model


def plan_of(model: PreTrainedModel, config: MobileQuantConfig) -> Plan:
    """The plan of a model, float or already swapped."""
    family = family_of(model, config.family)
    return build_plan(
        family,
        geometry_of(model, family),
        config.resolve_scheme(),
        config.overrides,
        config.prefix_ids(),
        key_shift=config.key_shift is True,
    )


def sentinel_key(plan: Plan) -> str:
    """Key of the zero-size tensor: the first query projection, which every plain model expects."""
    return f"{plan.family.layer(0, plan.family.query)}.weight"


def ignore_sentinel(model: PreTrainedModel, plan: Plan) -> None:
    """Keep transformers from warning about the sentinel; the attribute's type differs between its versions."""
    pattern = "^" + re.escape(sentinel_key(plan)) + "$"
    ignored = model._keys_to_ignore_on_load_unexpected or set()
    model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, pattern])


def untie(model: Any) -> None:
    """A tied head reads the embedding's table directly, so there is nothing left for transformers to tie."""
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}


def attach(model: Any, config: MobileQuantConfig) -> None:
    """Make an in-memory quantized model saveable: what ``from_pretrained`` would have set on it."""
    config.scheme = config.resolve_scheme().to_dict()
    config.dataset, config.tokenizer, config.run_dir = dataset_record(config.dataset), None, None
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, MobileQuantHfQuantizer):
        quantizer = MobileQuantHfQuantizer(config, pre_quantized=True)
    quantizer.pre_quantized = True  # from here on it behaves as a loaded checkpoint
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config
    model.config._is_quantized = True
    model.config.dtype = torch.float32
    plan = plan_of(model, config)
    untie(model)
    ignore_sentinel(model, plan)
    add_tags(model, config)
    add_methods(model)
    set_backend(model, config.backend)
