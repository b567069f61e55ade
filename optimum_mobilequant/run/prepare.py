"""Around the method: input checks before any long work, the run's surroundings, and the record of what it measured."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version as package_version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..calibrate import FoundPrefix
from ..calibrate.prefix import most_tokens
from ..config import MobileQuantConfig
from ..config.settings import Settings
from ..data.overlap import passages_of
from ..data.run_data import RunData, peek, run_data, tokenizer_of
from ..data.sequences import CalibrationData
from ..evaluate.perplexity import exp_or_inf
from ..families import family_of, geometry_of
from ..hub.names import hub_id_of
from ..log import get_logger
from ..nn.prefix import logits_behind
from ..plan import Plan, build_plan
from ..transform import Turn, refuse_unmergeable, turn
from ..tune import LearnResult, correctable
from .checks import check_device, check_model
from .duration import in_words, remaining_work, seconds_of_a_pass
from .machine import cpu_name
from .resources import available_memory, checkpoints, held_memory, memory_estimate, peak_memory, shortage
from .run_dir import STAGES, RunDirectory, fingerprint_of, weights_digest
from .teachers import FLOAT, Teacher, load_teachers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)


@dataclass
class Prepared:
    """A checked job. As a context manager it puts the model into the state tuning needs (float32, eval, no gradients,
    on the run's device) and, if anything fails inside, back into the state it came in."""

    model: PreTrainedModel
    config: MobileQuantConfig
    settings: Settings
    plan: Plan
    source: RunData
    teachers: list[Teacher]
    run: RunDirectory
    started: float = field(default_factory=time.monotonic)
    recorded: dict[str, Any] = field(default_factory=dict)

    turns: list[Turn] = field(default_factory=list)  # signs that the model's parameters have turned meanwhile

    data: CalibrationData = field(init=False)
    finetune_ids: Tensor = field(init=False)

    def __enter__(self) -> Prepared:
        self.float_nll = self.prefix_nll = self.start_nll = math.nan
        self._stack = ExitStack()
        # The caller may sit under no_grad or inference_mode; learning needs neither.
        self._stack.enter_context(torch.inference_mode(False))
        self._stack.enter_context(torch.no_grad())
        self._device = self.model.device
        # By name, for a reference would keep a tensor in memory after its integers have replaced it. The dtype of
        # each tensor, not of the model: the rotary frequencies of a bfloat16 model are float32.
        self._modes = {name: module.training for name, module in self.model.named_modules()}
        self._dtypes = {name: t.dtype for name, t in chain(self.model.named_parameters(), self.model.named_buffers())}
        self._trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if self.model.dtype != torch.float32:
            logger.info(f"working in float32; the model came in {self.model.dtype}")
        try:
            self._move(self.config.device or self.model.device, torch.float32)
            self.model.eval()
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            self.data, self.finetune_ids = self.source.settle(self.model, self.run)
        except BaseException as error:  # out of memory: `with` calls no __exit__ for a failed __enter__
            self.__exit__(type(error), error, None)
            raise
        others = [p for teacher in self.teachers if teacher.model is not None for p in teacher.model.parameters()]
        estimate = memory_estimate(self.plan, self.settings) + 4 * sum(p.numel() for p in others)
        present = 4 * sum(p.numel() for p in chain(self.model.parameters(), others))
        lacking = shortage(self.plan, self.settings, estimate - present, available_memory(self.model.device))
        if lacking:
            logger.warning(lacking)
        self.recorded["memory_estimate_bytes"] = estimate
        # as peak_memory counts: the interpreter with its libraries, too
        peak = estimate + held_memory(self.config.device or self._device, self.model)
        self.recorded["peak_memory_estimate_bytes"] = peak
        minutes = self._minutes()
        self.recorded["minutes_estimate"] = round(minutes, 4)
        logger.info(
            f"this run takes {in_words(minutes)} (by one timed forward pass) and about {peak / 2**30:.2f} GiB of "
            f"memory; {self.data.description}"
        )
        return self

    def _minutes(self) -> float:
        """What is left to do, in minutes; text that the model writes is written already."""
        finished = {stage for stage in STAGES if self.run.finished(stage)}
        if "pack" in finished:
            return 0.0
        passes = remaining_work(self.plan, self.settings, len(self.data.validation), finished)
        probe = self.data.validation[:1].to(self.config.device or self._device)
        return passes * seconds_of_a_pass(self.model, probe) / 60

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._move(self._device, torch.float32)
        if kind is not None:
            turn(self.model, self.turns, back=True)
            for path, module in self.model.named_modules():
                module.training = self._modes.get(path, module.training)
                for name, buffer in list(module.named_buffers(prefix=path, recurse=False)):
                    setattr(module, name.rpartition(".")[2], buffer.to(self._dtypes.get(name, buffer.dtype)))
            for name, parameter in self.model.named_parameters():
                parameter.data = parameter.data.to(self._dtypes.get(name, parameter.dtype))
                parameter.requires_grad_(name in self._trainable)
        self._stack.close()

    def _move(self, device: torch.device | str, dtype: torch.dtype) -> None:
        # nn.Module's own: transformers' wrapper of it is untyped and only adds checks for other methods
        nn.Module.to(self.model, device=device, dtype=dtype)

    def use_prefix(self, found: FoundPrefix) -> None:
        """Put the prefix into the plan, and into the config in place of what asked for it."""
        self.plan = replace(self.plan, prefix=found.tokens)
        self.config.prefix = list(found.tokens) or False
        self.recorded["prefix"] = {"tokens": list(found.tokens), **found.report}

    @property
    def rates(self) -> dict[str, float]:
        """Start learning rate of each parameter group; 0 where the recipe does not learn it."""
        s = self.settings
        return {
            "transforms": s.lr_transforms if s.learn_transforms else 0.0,
            "matrices": s.lr_matrices if s.learn_matrices else 0.0,
            "clips": s.lr_clips if s.learn_clips else 0.0,
            "ranges": s.lr_ranges if s.learn_ranges else 0.0,
        }

    @property
    def rounding_rates(self) -> dict[str, float]:
        """As :attr:`rates`, while rounding is learned: ranges only follow."""
        s = self.settings
        return {"offsets": s.lr_offsets, "gains": s.lr_gains, "ranges": s.lr_ranges / 3 if s.learn_ranges else 0.0}

    @property
    def finetune_rates(self) -> dict[str, float]:
        """As :attr:`rates`, while fine-tuning; where the integers are frozen, the first two have no parameters."""
        s = self.settings
        return {
            "adapters": s.lr_adapters,
            "offsets": s.lr_offsets,
            "gains": s.lr_finetune,
            "norms": s.lr_finetune,
            "biases": s.lr_finetune,
            "ranges": s.lr_ranges if s.finetune_ranges else 0.0,
        }

    def repeated(self, steps: int) -> list[Tensor]:
        """Sequences on which the teacher is worth computing once and for all: those that ``steps`` of tuning read
        several times, unless its hidden states on them would fill more than a quarter of the free memory."""
        s, rows = self.settings, [self.data.validation]
        if s.tuning != "block-wise" and steps * s.batch_size >= 2 * len(self.data.train):
            rows.append(self.data.train)
        size = 4 * self.plan.geometry.hidden * sum(part.numel() for part in rows)
        return rows if steps and size <= available_memory(self.model.device) // 4 else []

    def before(self, student: nn.Module) -> None:
        """Measure the float model and the untuned student on the validation text."""
        self.float_nll = self.prefix_nll = nll(self.model, self.data.validation, self.settings.batch_size)
        if self.plan.prefix:
            self.prefix_nll = nll(self.model, self.data.validation, self.settings.batch_size, self.plan.prefix)
        self.start_nll = nll(student, self.data.validation, self.settings.batch_size)
        if not math.isfinite(self.float_nll):
            raise ValueError("the float model's loss on the validation text is not finite; check model and tokenizer")
        logger.info(
            f"validation perplexity: float {exp_or_inf(self.float_nll):.4f}, "
            + (f"with the prefix {exp_or_inf(self.prefix_nll):.4f}, " if self.plan.prefix else "")
            + f"start {exp_or_inf(self.start_nll):.4f}"
        )

    def _forget_folders(self) -> None:
        """A checkpoint is published; where its maker keeps files is nobody's business. Their names stay."""
        self.config.run_dir = None
        for name in ("dataset", "finetune_dataset"):
            given = getattr(self.config, name)
            if isinstance(given, str) and (path := Path(given).expanduser()).is_file():
                setattr(self.config, name, path.name)
                self.recorded["data"] = self.recorded["data"].replace(given, path.name)

    def record(
        self, result: LearnResult, rounded: LearnResult | None, finetuned: LearnResult | None, final_nll: float
    ) -> None:
        """Fill ``config.recorded`` with what the run measured."""

        def without_time(found: LearnResult | None) -> dict[str, Any] | None:
            return None if found is None else {k: v for k, v in vars(found).items() if k != "seconds"}

        peak = peak_memory(self.config.device or self._device)
        self.recorded |= {
            "versions": versions(),
            "machine": machine(self.config.device or self._device),
            "base_model": hub_id_of(getattr(self.model.config, "_name_or_path", None)),
            "data": self.data.description,
            "data_sha256": self.data.sha256,
            "passages": passages_of([*self.data.train, *self.data.validation, *self.finetune_ids]),
            "validation_perplexity": {
                "float": exp_or_inf(self.float_nll),
                **({"float_prefix": exp_or_inf(self.prefix_nll)} if self.plan.prefix else {}),
                "start": exp_or_inf(self.start_nll),
                "quantized": exp_or_inf(final_nll),
            },
            "loss": {"objective": self.settings.objective, "start": result.start, "best": result.best},
            "best_step": result.best_step,
            "history": result.history,
            "rounding": without_time(rounded),
            "finetune": without_time(finetuned),
            "minutes": round((time.monotonic() - self.started) / 60, 3),
            "peak_memory_bytes": peak,
        }
        self._forget_folders()
        self.config.recorded = self.recorded
        values = self.recorded["validation_perplexity"]
        logger.info(
            f"validation perplexity: float {values['float']:.4f}, start {values['start']:.4f}, quantized "
            f"{values['quantized']:.4f}; {self.recorded['minutes']:.1f} minutes, peak memory {peak / 2**30:.2f} GiB"
        )


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: MobileQuantConfig,
    run_dir: str | None,
) -> Prepared:
    """Check model, config and data against each other and open the run directory.

    Raises:
        ValueError: no dataset; unknown family; preset and overrides that fit no tensor, or that the target cannot
            compute; matrices that do not merge into this architecture; weights that are not finite, missing, offloaded
            or already quantized; too little text.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"quantize needs a transformers model in memory, not a {type(model).__name__}; load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    if not isinstance(config, MobileQuantConfig) or isinstance(tokenizer, MobileQuantConfig):
        raise ValueError(
            "the arguments are quantize(model, tokenizer, config), with a MobileQuantConfig as config and None or a "
            f"tokenizer before it, not {type(tokenizer).__name__} and {type(config).__name__}"
        )
    config = copy.deepcopy(config)  # the run writes into it; the caller's can serve another run (data are shared)
    settings = config.resolve()
    if config.dataset is None:
        raise ValueError(
            "static activation ranges need calibration text: give dataset=... (a .txt/.jsonl/.parquet path, a list of "
            'texts or token ids, a Hub dataset, or "python-stdlib" for text that every Python carries)'
        )
    check_model(model)
    check_device(config.device or model.device)
    family = family_of(model, config.family)
    geometry = geometry_of(model, family)
    if config.untie:
        if not geometry.tied:
            raise ValueError("untie=True would have no effect: the head of this model has a table of its own")
        geometry = replace(geometry, tied=False)
        size = geometry.vocabulary * geometry.hidden / 2**20
        logger.info(f"the head gets a table of its own: {size:.1f} MiB more at 8 bits")
    refuse_unmergeable(model, family, geometry, settings.transforms, settings.rotate)
    if settings.bias_correction:
        correctable(model, family)
    config.key_shift = settings.key_shift
    plan = build_plan(family, geometry, config.resolve_scheme(), config.overrides, key_shift=settings.key_shift)
    if config.target is not None:
        from ..exporters.targets import TARGETS, check_plan

        check_plan(model, plan, TARGETS[config.target])
    peek(config, settings)  # before looking for a tokenizer
    if tokenizer is None:
        tokenizer = tokenizer_of(model, config, settings)
    settings = replace(settings, seq_len=_longest(model, settings))
    settings = replace(settings, gradient_checkpointing=checkpoints(plan, settings, config.device or model.device))
    tunes = settings.finetune != "none"
    teachers = load_teachers(config.teachers, model, tokenizer, seq_len=settings.seq_len) if tunes else []
    source = run_data(model, tokenizer, config, settings)
    chosen = run_dir if run_dir is not None else config.run_dir
    fingerprint = {}
    if chosen is not None:
        others = {FLOAT if t.model is None else weights_digest(t.model): t.weight for t in teachers}
        fingerprint = fingerprint_of(model, source.sha256, config.to_dict(), others)
    return Prepared(model, config, settings, plan, source, teachers, RunDirectory.open(chosen, fingerprint))


def _longest(model: PreTrainedModel, settings: Settings) -> int:
    """Tokens of a sequence: as many as asked for, if the model has positions for them and for a prefix."""
    config: Any = model.config.get_text_config()
    prefix = most_tokens(settings.prefix)
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None)]
    # A window hides a prefix from the far end of the text in the float model, but not on the device.
    known = [limit for limit in (limits if prefix else limits[:1]) if limit]
    room = min([settings.seq_len, *(limit - prefix for limit in known)])
    if room < 2:
        raise ValueError(
            f"a prefix of {prefix} tokens leaves no room for text in the model's {min(known)} positions: "
            "give a shorter one"
        )
    return room


@torch.no_grad()
def nll(model: nn.Module, ids: Tensor, batch_size: int, prefix: Sequence[int] = ()) -> float:
    """Mean next-token negative log-likelihood (nats) within the rows of ``ids``, each read behind ``prefix``."""
    device = next(model.buffers()).device
    total = 0.0
    for batch in ids.split(batch_size):
        logits = logits_behind(model, prefix, batch.to(device))[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().to(device), reduction="sum"))
    return total / ids[:, 1:].numel()


def machine(device: torch.device | str) -> dict[str, Any]:
    """What a result's minutes and last bits depend on."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else cpu_name()
    system = f"{platform.system()} {platform.machine()}"
    return {"system": system, "device": f"{kind}, {name}", "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions a result depends on."""
    from .. import __version__

    return {
        "optimum-mobilequant": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "optimum-quanto": package_version("optimum-quanto"),
    }
