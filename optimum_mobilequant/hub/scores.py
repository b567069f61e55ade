"""Scores that ``mobilequant eval`` recorded in a checkpoint: rows of a table, and the metadata the Hub reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult

_TASK = "text-generation"


@dataclass(frozen=True)
class Score:
    """One number.

    Args:
        what: a task, or the name of a text file. metric: as lm-eval names it; filters stand behind a comma.
        value: of the checkpoint. error: its standard error. other: of the model it was measured against.
        data: ``path``, ``config`` and ``split`` of the data on the Hub, as far as there are any.
        shots: examples in the prompt; None for a text.
        conditions: of this number: ``version`` of the task, ``bos``, ``seed``, and others.
    """

    what: str
    metric: str
    value: float
    error: float | None = None
    other: float | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    shots: int | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def result(self) -> EvalResult:
        """The entry of ``model-index``."""
        path = self.data.get("path")
        return EvalResult(
            task_type=_TASK,
            dataset_type=path or ("text" if self.shots is None else self.what),
            dataset_name=self.what,
            dataset_config=self.data.get("config") if path or self.shots is not None else self.what,
            dataset_split=self.data.get("split"),
            dataset_args=None if self.shots is None else {"num_few_shot": self.shots},
            metric_type=self.metric.partition(",")[0],
            metric_name=self.metric,
            metric_value=float(f"{self.value:.6g}"),
            metric_args=dict(self.conditions),
            verified=False,
        )


@dataclass(frozen=True)
class Evaluation:
    """What one call of ``mobilequant eval`` measured.

    Args:
        name: of the record. scores: its numbers. protocol: how they were measured, one sentence without a full stop.
        against: the model beside it, or None.
    """

    name: str
    scores: Sequence[Score]
    protocol: str
    against: str | None


def read_evaluations(recorded: Mapping[str, Any]) -> list[Evaluation]:
    """Every evaluation in ``quantization_config.recorded``; what is not a finite number is left out."""
    found = recorded.get("evaluations")
    evaluations = []
    for name, values in (found if isinstance(found, Mapping) else {}).items():
        if isinstance(values, Mapping):
            read = _of_tasks if "scores" in values else _of_text
            if scores := list(read(values)):
                against = _mapping(values, "against").get("model")
                evaluations.append(Evaluation(str(name), scores, _protocol(values), against))
    return evaluations


def same_metric(a: EvalResult, b: EvalResult) -> bool:
    """Whether two entries state the same metric of the same data, however it was measured."""
    return (a.unique_identifier, a.metric_type, a.metric_name) == (b.unique_identifier, b.metric_type, b.metric_name)


def _of_text(values: Mapping[str, Any]) -> Iterator[Score]:
    against = _mapping(values, "against")
    conditions = {key: values[key] for key in ("tokens", "seq_len", "bos") if key in values}
    for metric in ("perplexity", "word_perplexity"):
        if (value := _number(values.get(metric))) is not None:
            what = str(values.get("text", "text"))
            yield Score(what, metric, value, None, _number(against.get(metric)), conditions=conditions)


def _of_tasks(values: Mapping[str, Any]) -> Iterator[Score]:
    scores, errors = _mapping(values, "scores"), _mapping(values, "errors")
    other = _mapping(_mapping(values, "against"), "scores")
    # A group, such as mmlu, stands for its tasks; a tag has no scores of its own.
    asked = [name for name in values.get("asked") or scores if name in scores]
    names = asked if len(asked) == len(values.get("asked") or scores) else list(scores)
    packages = dict(_mapping(values, "packages"))
    shared = {key: values[key] for key in ("limit", "seed", "bos") if values.get(key) is not None}
    for task in names:
        version = _mapping(values, "versions").get(task)
        conditions = ({} if version is None else {"version": version}) | shared | packages
        for metric, given in scores[task].items():
            if (value := _number(given)) is not None:
                yield Score(
                    task, metric, value, _number(_mapping(errors, task).get(metric)),
                    _number(_mapping(other, task).get(metric)), _mapping(_mapping(values, "data"), task),
                    int(_mapping(values, "shots").get(task) or 0), conditions,
                )  # fmt: skip


def _protocol(values: Mapping[str, Any]) -> str:
    """Limit, shots, seed, BOS policy and versions in words."""
    if "scores" not in values:
        bos = "each behind the BOS token" if values.get("bos") else "without a BOS token"
        return f"{values.get('tokens')} predictions in windows of {values.get('seq_len')} tokens, {bos}"
    bos = {True: "BOS token added", False: "no BOS token"}.get(values.get("bos_added"), "BOS token not recorded")  # type: ignore[arg-type]
    if values.get("bos") == "auto":
        bos += " (as the tokenizer has it)"
    limit = "all documents" if values.get("limit") is None else f"the first {values['limit']} documents of each task"
    shots = sorted({int(n) for n in _mapping(values, "shots").values()})
    parts = [limit, f"{' or '.join(map(str, shots)) or 0} examples in the prompt", bos, f"seed {values.get('seed')}"]
    versions = [f"{task} {version}" for task, version in _mapping(values, "versions").items() if version is not None]
    if len(versions) > 8:  # of a group
        versions = [*versions[:8], "..."]
    packages = [f"{name} {number}" for name, number in _mapping(values, "packages").items()]
    return ", ".join(parts) + f"; versions: {', '.join([*packages, *versions])}"


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
