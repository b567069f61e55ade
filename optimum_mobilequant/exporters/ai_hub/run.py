"""From ``.aimet`` folders to results: upload, compile, link, run on the device, fetch.

All jobs are sent at once: the service gives the model that a job will make an id when the job is made, and lets later
jobs wait for it. So one call sends everything, and any later one fetches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...log import get_logger, progress_bar
from .access import Hub
from .devices import Target
from .folders import GraphFolder
from .job_options import compile_options, inference_options, link_options
from .records import JobRecord, Records, only_one
from .results import fetch_binary, fetch_outputs, fetch_profile
from .samples import digest_of, sample_inputs
from .send import Sender

logger = get_logger(__name__)

POLL_SECONDS = 10.0
_DONE, _FAILED = "SUCCESS", "FAILED"


@dataclass(frozen=True)
class HubRun:
    """Where a run stands.

    Args:
        finished: every job succeeded and every result is in the folder.
        jobs: title -> record, in the order of sending.
        files: fetched results, relative to the folder, with sizes in bytes.
        summary: JSON: ``device``, and when finished ``binary`` (what the service says of it) and ``graphs`` (figures
            of each graph's profile, and differences between its outputs and what was expected).
    """

    finished: bool
    jobs: Mapping[str, JobRecord]
    files: Mapping[str, int]
    summary: Mapping[str, Any]

    @classmethod
    def of(cls, records: Records) -> HubRun:
        return cls(records.finished, records.jobs, records.files, records.summary)


def run_jobs(
    graphs: Sequence[GraphFolder],
    out: Path,
    hub: Hub,
    target: Target,
    *,
    wait: bool = False,
    restart: bool = False,
    samples: Mapping[str, Mapping[str, NDArray[np.generic]]] | None = None,
    check: Callable[[GraphFolder, Path], Mapping[str, Any]] | None = None,
    poll_seconds: float | None = None,
) -> HubRun:
    """Send what is not sent yet, look how far it is, and fetch the results once all jobs succeeded.

    Args:
        graphs: of one model; they are linked into one context binary that shares their weights.
        out: existing folder for ``ai_hub_jobs.json`` and the results. A second call with the same arguments continues.
        target: from :meth:`Hub.find_device`.
        wait: stay until all jobs have ended; otherwise return at once.
        restart: send everything anew.
        samples: graph -> input -> codes for the run on the device; by default :func:`sample_inputs`.
        check: called with a graph and the safetensors file of its outputs; what it returns (JSON) is kept with the
            graph's figures.
        poll_seconds: between two looks at the jobs; :data:`POLL_SECONDS` by default.

    Raises:
        ValueError: ``out`` holds jobs of other inputs; a request the service refused.
        RuntimeError: a job failed (the service's reason, the job's page).
        BlockingIOError: another process is at work in ``out``.
        ConnectionError, OSError: see :meth:`Hub.calling`.
    """
    with only_one(out):
        feeds = {g.name: dict(samples[g.name]) if samples else sample_inputs(g) for g in graphs}
        records = Records.open(out, restart=restart)
        records.bind(
            device=target.name,
            service=hub.config.api_url,
            graphs={g.name: {"folder": g.digest, "samples": digest_of(feeds[g.name])} for g in graphs},
            options={
                "compile": {g.name: compile_options(g.name, [t.name for t in g.outputs]) for g in graphs},
                "link": link_options(),
                "inference": {g.name: inference_options(g.name) for g in graphs},
            },
        )
        if not records.finished:
            records.summary["device"] = asdict(target)
            _send(Sender(hub, records, target.name), graphs, feeds, target)
            _follow(hub, records, out, wait, POLL_SECONDS if poll_seconds is None else poll_seconds)
            if all(job.state == _DONE for job in records.jobs.values()):
                _fetch(hub, records, graphs, out, check)
                records.finished = True
            records.save()
        return HubRun.of(records)


def _send(
    sender: Sender,
    graphs: Sequence[GraphFolder],
    feeds: Mapping[str, dict[str, NDArray[np.generic]]],
    target: Target,
) -> None:
    compiled = [sender.compile(graph) for graph in graphs]
    if not target.weight_sharing:
        logger.warning("%s does not share weights between graphs: the binary will hold them twice", target.name)
    linked = sender.link(compiled)
    if not target.physical:
        logger.warning("%s is a proxy that nothing can run on: the binary is made, but neither profile nor outputs",
                       target.name)  # fmt: skip
        return
    for graph in graphs:
        sender.infer(graph, linked, feeds[graph.name])


def _follow(hub: Hub, records: Records, out: Path, wait: bool, poll_seconds: float) -> None:
    """Look at all jobs once, or until they have ended; raise for the first that failed."""
    jobs: dict[str, Any] = {}
    with progress_bar(None, "AI Hub", total=len(records.jobs), unit="job", leave=True, show=wait) as bar:
        while True:
            open_jobs = {title: job for title, job in records.jobs.items() if job.state not in (_DONE, _FAILED)}
            for title, record in open_jobs.items():
                with hub.calling(f"asking for the {title} job {record.job_id}"):
                    if title not in jobs:
                        jobs[title] = hub.client.get_job(record.sent_id)
                    status = jobs[title].get_status()
                record.state, record.reason = status.code, hub.clean(status.message or "")
            records.save()
            if failed := next((job for job in records.jobs.values() if job.state == _FAILED), None):
                _fail(hub, failed, out)
            waiting = [title for title, job in open_jobs.items() if job.state != _DONE]
            bar.update(len(records.jobs) - len(waiting) - bar.n)
            if not waiting or not wait:
                return
            bar.set_postfix_str(f"{waiting[0]}: {records.jobs[waiting[0]].state.lower()}")
            time.sleep(poll_seconds)


def _fail(hub: Hub, record: JobRecord, out: Path) -> None:
    """Raise for a failed job, with the service's logs beside the records if it has any."""
    logs: list[str] = []
    try:
        with hub.calling(f"fetching the logs of {record.job_id}"):
            logs = hub.client.get_job(record.sent_id).download_job_logs(str(out / "logs"))
    except (OSError, ValueError, RuntimeError) as error:
        logger.warning("no logs: %s", error)
    raise RuntimeError(
        f"AI Hub's {record.title} job failed: {record.reason or 'no reason given'} ({record.url})"
        + (f"; its logs: {', '.join(logs)}" if logs else "")
        + ". The records keep it as failed: to send it again, start anew (overwrite) or export to another folder"
    )


def _fetch(
    hub: Hub,
    records: Records,
    graphs: Sequence[GraphFolder],
    out: Path,
    check: Callable[[GraphFolder, Path], Mapping[str, Any]] | None,
) -> None:
    """Fetch what is not here yet; after each file, record it."""

    def keep(path: Path) -> None:
        records.files[path.name] = path.stat().st_size
        records.save()

    def here(prefix: str) -> bool:
        names = [name for name in records.files if name.startswith(prefix)]
        return any((out / n).is_file() and (out / n).stat().st_size == records.files[n] for n in names)

    def job(kind: str, graph: str = "") -> Any:
        with hub.calling("fetching results"):
            return hub.client.get_job(records.jobs[f"{kind} {graph}".strip()].sent_id)

    if not here("model."):
        path, records.summary["binary"] = fetch_binary(hub, job("link"), out)
        keep(path)
    figures = records.summary.setdefault("graphs", {})
    for graph in graphs:
        if f"inference {graph.name}" not in records.jobs:
            continue  # a proxy
        about = figures.setdefault(graph.name, {})
        if not here(f"profile_{graph.name}."):
            path, found = fetch_profile(hub, job("inference", graph.name), graph, out)
            about.update(found)
            keep(path)
        if not here(f"outputs_{graph.name}."):
            path, about["output_differences"] = fetch_outputs(hub, job("inference", graph.name), graph, out)
            about.update(check(graph, path) if check is not None else {})
            keep(path)
