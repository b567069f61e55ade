"""Downstream tasks through lm-eval's own HFLM and task manager, from the Hub or from a folder of local files."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.names import is_hub_id
from ..lookup import unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Draws for the standard error of what has no formula, such as a perplexity.
_DRAWS = 1000


@dataclass(frozen=True)
class TaskScores:
    """What lm-eval measured, and how.

    Attributes:
        asked: names that were asked for: of tasks, groups or tags.
        scores: task -> metric (as lm-eval names it, filters other than "none" behind a comma) -> value.
        errors: the same for standard errors, where lm-eval gives one.
        versions: of the tasks. shots: examples in the prompt, by task.
        data: by task, ``path``, ``config`` and ``split`` on the Hub; of local files the split alone.
        bos: whether a beginning-of-sequence token was asked for; "auto" left it to lm-eval and the tokenizer.
        bos_added: whether there was one. limit: documents of each task, or None for all. seed: of few-shot sampling.
        packages: versions of lm-eval and transformers.
    """

    asked: tuple[str, ...]
    scores: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, float]]
    versions: Mapping[str, Any]
    shots: Mapping[str, int]
    data: Mapping[str, Mapping[str, str]]
    bos: bool | str
    bos_added: bool
    limit: int | None
    seed: int
    packages: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self) | {"asked": list(self.asked)}


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, for any number of models.

    Attributes:
        names: that were asked for. manager: lm-eval's. items: its tasks and groups.
    """

    names: tuple[str, ...]
    manager: Any
    items: tuple[Any, ...]


def load_tasks(names: Sequence[str], folder: Path | None = None) -> LoadedTasks:
    """Find tasks and fetch their data; no model is needed for it.

    Args:
        names: tasks, groups or tags. folder: of task YAMLs, searched before lm-eval's own.

    Raises:
        ImportError: lm-eval is missing. FileNotFoundError: no such folder, or none with a YAML file; a data file of a
            task is missing.
        ValueError: no or an unknown task; names the nearest.
        ConnectionError: a task's data are on the Hub, which cannot be reached.
    """
    if find_spec("lm_eval") is None:
        raise ImportError('tasks need lm-eval: pip install "optimum-mobilequant[eval]"')
    if folder is not None and not (folder.is_dir() and any(folder.rglob("*.y*ml"))):
        raise FileNotFoundError(f"no folder with task YAMLs at {str(folder)!r}: see the template in the documentation")
    if not names:
        raise ValueError("no task is named: give at least one")
    manager = _manager(names, folder)
    for name in names:
        if name not in manager.all_tasks:
            near = unknown_name("task", name, manager.all_tasks).partition(" known:")[0]
            raise ValueError(f"{near} `mobilequant lm-eval ls tasks` lists all, --task-dir adds a folder of yours")
    items: list[Any] = []
    for name in dict.fromkeys(names):
        try:
            found = manager.load([name])
        except Exception as error:  # every library below has errors of its own for the same thing
            if not _is_connection(error):
                raise
            offline = " (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set)" if _offline() else ""
            raise ConnectionError(
                f"the data of {name} could not be fetched{offline}: {_first_line(error)} Load them once with a "
                "network, or use tasks with local data (--task-dir)"
            ) from error
        groups = found["groups"]
        items += [groups[name]] if name in groups else found["tasks"].values()
    return LoadedTasks(tuple(names), manager, tuple(items))


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    local = TaskManager(include_path=str(folder), include_defaults=False)
    if set(names) <= set(local.all_subtasks):  # reading the thousands of files that lm-eval brings takes seconds
        return local
    return TaskManager(include_path=str(folder))


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | LoadedTasks,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    bos: bool | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> TaskScores:
    """Score a float or quantized model on tasks of lm-eval.

    Args:
        model, tokenizer: as loaded by transformers; the model stays as it is.
        tasks: names of tasks, groups or tags, or what :func:`load_tasks` returned. folder: of further task YAMLs.
        limit: only the first documents of each task. shots: examples in the prompt; None takes each task's own.
        bos: add the beginning-of-sequence token; None leaves it to lm-eval, which follows the tokenizer.
        batch_size: requests at a time. seed: of few-shot sampling.

    Raises:
        ImportError, FileNotFoundError, ValueError, ConnectionError: see :func:`load_tasks`.
        ValueError: BOS is asked of a tokenizer that has none.
    """
    loaded = tasks if isinstance(tasks, LoadedTasks) else load_tasks(tasks, folder)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if bos:
        tokenizer = _with_bos(tokenizer)
    # HFLM insists on a device of its own for a model it is given only where it moves inputs
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=bos,
        device=str(model.device),
    )
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    with redirect_stdout(sys.stderr):  # lm-eval prints there while it works, and stdout is for the result
        found = lm_eval.simple_evaluate(
            harness, tasks=list(loaded.items), task_manager=loaded.manager, num_fewshot=shots, limit=limit,
            bootstrap_iters=_DRAWS, log_samples=False, **seeds,
        )  # fmt: skip
    if found is None:
        raise RuntimeError("lm-eval returned no result: it runs on the first process only")
    added = harness.tok_encode("a")[:1] == [tokenizer.bos_token_id]
    return _scores(found, loaded.names, "auto" if bos is None else bos, added, limit, seed)


def _with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One that adds its BOS token: lm-eval only asks for special tokens, which of many tokenizers BOS is none."""
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no BOS token to begin with: leave the BOS policy to it, or switch BOS off")
    if _adds_bos(tokenizer):
        return tokenizer
    changed: Any = copy.deepcopy(tokenizer)
    changed.add_bos_token = True
    if not _adds_bos(changed):
        raise ValueError("this tokenizer does not add its BOS token, and cannot be told to: give one that does")
    return changed


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: Any = tokenizer("a")["input_ids"]
    return list(ids[:1]) == [tokenizer.bos_token_id]


def _is_connection(error: BaseException) -> bool:
    """Whether data that are not on this machine are the reason."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    from ..hub.errors import HTTP_ERROR

    kinds = (ConnectionError, DatasetNotFoundError, HTTP_ERROR, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return isinstance(error, kinds)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."


def _offline() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def _scores(
    found: Mapping[str, Any], asked: tuple[str, ...], bos: bool | str, added: bool, limit: int | None, seed: int
) -> TaskScores:
    scores: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for task, row in found["results"].items():
        for key, value in row.items():
            metric, _, chosen = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not chosen:
                continue
            table, name = (errors, metric.removesuffix("_stderr")) if metric.endswith("_stderr") else (scores, metric)
            table.setdefault(task, {})[name if chosen == "none" else f"{name},{chosen}"] = float(value)
    return TaskScores(
        asked,
        scores,
        errors,
        {task: found["versions"].get(task) for task in scores},
        {task: int(found.get("n-shot", {}).get(task, 0)) for task in scores},
        {task: _data(found.get("configs", {}).get(task, {})) for task in scores},
        bos,
        added,
        limit,
        seed,
        {"lm-eval": version("lm-eval"), "transformers": version("transformers")},
    )


def _data(config: Mapping[str, Any]) -> dict[str, str]:
    """Where a task's documents come from, without paths of this machine."""
    splits = (config.get(f"{name}_split") for name in ("test", "validation", "training"))
    found = {"split": next((split for split in splits if split), None)}
    if not (config.get("dataset_kwargs") or {}).get("data_files"):
        found |= {"path": config.get("dataset_path"), "config": config.get("dataset_name")}
    path = found.get("path")
    if path is not None and (not is_hub_id(path) or Path(path).exists()):
        found = {"split": found["split"]}
    return {key: value for key, value in found.items() if isinstance(value, str)}
