"""The token sequences of a run: given as text or ids, or written by the model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..config import MobileQuantConfig
from ..config.settings import Settings
from ..run.run_dir import RunDirectory
from . import selfgen
from .selfgen import check_generates, start_tokens, write_sequences
from .sequences import CalibrationData, calibration_data, held_out_of, sha256_of
from .sources import SELF, dataset_kind, iter_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Writing:
    """Sequences that the model will write, once the run has begun; see :func:`.selfgen.write_sequences`.

    ``continues``: half of them begin with pieces of the calibration text.
    """

    stage: str
    samples: int
    seq_len: int
    seed: int
    bos: int | None
    ends: tuple[int, ...]
    never: tuple[int, ...]
    continues: bool

    @property
    def sha256(self) -> str:
        """Hash of the request: with the model's weights, and text to continue, it decides what is written."""
        return hashlib.sha256(f"{self} {selfgen.BATCH} {selfgen.GREEDY} {selfgen.GIVEN}".encode()).hexdigest()

    def data(self, model: PreTrainedModel, run: RunDirectory, text: Tensor | None = None) -> CalibrationData:
        """Write the sequences, or read those that the run's folder keeps; fine-tuning needs none for validation.

        Args:
            text: int64 ``[n, seq_len]``, what ``continues`` means.
        """
        held_out = held_out_of(self.samples) if self.stage == "write" else 0
        if (kept := run.load(self.stage)) is not None:
            ids = kept[0]["ids"]
        else:
            ids = write_sequences(
                model,
                count=self.samples + held_out,
                seq_len=self.seq_len,
                seed=self.seed,
                bos=self.bos,
                ends=self.ends,
                never=self.never,
                given=text if self.continues else None,
                kept=run.load_progress(self.stage),
                keep=lambda tensors, meta: run.save_progress(self.stage, tensors, meta),
            )
            run.save(self.stage, {"ids": ids}, {})
        train, validation = ids[: self.samples], ids[self.samples :]
        description = (
            f"written by the model itself: {len(train)} training and {len(validation)} validation sequences of "
            f"{self.seq_len} tokens, {'no' if self.bos is None else 'with'} BOS"
        )
        return CalibrationData(train, validation, sha256_of(train, validation), description)


@dataclass(frozen=True)
class RunData:
    """What a run reads: for calibration and tuning, and for fine-tuning if that has data of its own."""

    calibration: CalibrationData | Writing
    finetune: CalibrationData | Writing | None

    @property
    def sha256(self) -> str:
        """One hash for all of it; of a single data set, that data set's own."""
        if self.finetune is None:
            return self.calibration.sha256
        return hashlib.sha256((self.calibration.sha256 + self.finetune.sha256).encode()).hexdigest()

    def settle(self, model: PreTrainedModel, run: RunDirectory) -> tuple[CalibrationData, Tensor]:
        """Calibration data, and the training sequences of fine-tuning."""
        data, more = self.calibration, self.finetune
        if isinstance(data, Writing):
            data = data.data(model, run)
        if isinstance(more, Writing):
            more = more.data(model, run, data.train)
        return data, data.train if more is None else more.train


def peek(config: MobileQuantConfig, settings: Settings) -> None:
    """Read up to the first document: a name with a slip in it shows before anything is loaded.

    Raises:
        ValueError: what :func:`.sources.iter_documents` raises.
    """
    own = config.finetune_text(settings)
    for dataset, split in ((config.dataset, config.dataset_split), (own, config.finetune_split)):
        if dataset is not None and dataset != SELF:
            next(iter_documents(dataset, split=split, text_column=config.text_column), None)


def run_data(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: MobileQuantConfig,
    settings: Settings,
) -> RunData:
    """Read and cut the texts of a run; what the model is to write is only checked.

    Raises:
        ValueError: what :func:`.data.calibration_data` raises; a model that cannot generate.
    """

    def part(
        dataset: object, split: str | None, samples: int, stage: str, seed: int, continues: bool = False
    ) -> CalibrationData | Writing:
        if isinstance(dataset, str) and dataset == SELF:
            if split is not None:
                raise ValueError(f'dataset "{SELF}" has no splits; leave "{split}" out')
            check_generates(model, "dataset" if stage == "write" else "finetune_dataset")
            bos, ends = start_tokens(model, tokenizer, config.bos)
            special = tuple(sorted(getattr(tokenizer, "all_special_ids", None) or ()))
            return Writing(stage, samples, settings.seq_len, seed, bos, tuple(sorted(ends)), special, continues)
        return calibration_data(
            dataset,
            tokenizer,
            samples=samples,
            seq_len=settings.seq_len,
            seed=seed,
            bos=config.bos,
            split=split,
            text_column=config.text_column,
            vocab_size=model.config.get_text_config().vocab_size,
        )

    seed = settings.seed
    more = None
    calibration = part(config.dataset, config.dataset_split, settings.samples, "write", seed)
    if (own := config.finetune_text(settings)) is not None:
        given = not isinstance(calibration, Writing)
        more = part(own, config.finetune_split, settings.finetune_samples, "write_more", seed + 1, continues=given)
    return RunData(calibration, more)


def tokenizer_of(
    model: PreTrainedModel, config: MobileQuantConfig, settings: Settings
) -> PreTrainedTokenizerBase | None:
    """The config's tokenizer, else the one beside the model; None where the data need none.

    Raises:
        ValueError: there is none.
    """
    given = config.tokenizer
    if given is not None and not isinstance(given, str):
        return given
    texts = [d for d in (config.dataset, config.finetune_text(settings)) if d is not None and dataset_kind(d) != "ids"]
    if not texts:
        return None
    from transformers import AutoTokenizer

    name = given or model.config._name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if given is None and all(isinstance(d, str) and d == SELF for d in texts):
            return None  # the model's config names the tokens that writing needs
        raise ValueError(
            f'no tokenizer could be loaded from "{name}"; pass tokenizer=... (an object or a name)'
        ) from error
