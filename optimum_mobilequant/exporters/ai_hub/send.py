"""Jobs on their way to AI Hub, each sent once however often a run is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...log import get_logger
from .access import Hub
from .folders import GraphFolder, scratch
from .job_options import compile_options, inference_options, link_options
from .records import JobRecord, Records

logger = get_logger(__name__)

_PAGE = 50
# The clocks of this machine and of the service may differ by this much.
_CLOCKS = timedelta(days=1)


class Sender:
    """Sends the jobs of one run.

    Args:
        hub: a checked connection.
        records: where each job is noted.
        device: name on AI Hub.
    """

    def __init__(self, hub: Hub, records: Records, device: str) -> None:
        import qai_hub

        self._hub, self._records = hub, records
        self._device = qai_hub.Device(device)
        self._types = qai_hub.JobType

    def compile(self, graph: GraphFolder) -> JobRecord:
        """Upload a graph's folder and send its compile job, as far as not done before."""
        options = compile_options(graph.name, [tensor.name for tensor in graph.outputs])

        def submit(client: Any, name: str) -> Any:
            model = client.get_model(self._records.models[graph.name])
            return client.submit_compile_job(model, device=self._device, name=name, options=options)

        return self._once("compile", graph.name, options, submit, before=lambda: self._upload(graph))

    def link(self, compiled: Sequence[JobRecord]) -> JobRecord:
        """Send the job that links the graphs of ``compiled`` into one context binary."""

        def submit(client: Any, name: str) -> Any:
            models = [self._target(client, record) for record in compiled]
            return client.submit_link_job(models, device=self._device, name=name, options=link_options())

        return self._once("link", "", link_options(), submit)

    def infer(self, graph: GraphFolder, linked: JobRecord, feeds: dict[str, NDArray[np.generic]]) -> JobRecord:
        """Send the job that profiles a graph of the linked binary on the device and runs it on ``feeds``."""
        options = inference_options(graph.name)

        def submit(client: Any, name: str) -> Any:
            return client.submit_inference_job(
                self._target(client, linked),
                device=self._device,
                inputs={key: [array] for key, array in feeds.items()},
                name=name,
                options=options,
                retry=False,  # it would wait for minutes and say so on stdout only
                profile=True,
            )

        return self._once("inference", graph.name, options, submit)

    def _once(
        self,
        kind: str,
        graph: str,
        options: str,
        submit: Callable[[Any, str], Any],
        before: Callable[[], None] | None = None,
    ) -> JobRecord:
        begun = f"{kind} {graph}".strip() in self._records.jobs
        record = self._records.job(kind, graph, options)
        if record.job_id is not None:
            return record
        # A run that ended between sending and the answer left a record without an id, and maybe a job.
        job = self._find(record) if begun else None
        if job is None:
            if before is not None:
                before()
            with self._hub.calling(f"sending the {record.title} job"):
                job = submit(self._hub.client, record.name)
        record.job_id, record.url, record.state = job.job_id, job.url, "CREATED"
        self._records.save()
        logger.info("%s: %s", record.title, record.url)
        return record

    def _upload(self, graph: GraphFolder) -> None:
        """Upload a folder, unless its id is recorded.

        As a zip of our own: of a folder, the client leaves its own zip behind in the system's temporary folder.
        """
        if graph.name in self._records.models:
            return
        with scratch(self._records.path.parent) as folder:
            archive = graph.archive(folder)
            with self._hub.calling(f"uploading {graph.path.name}"):
                model = self._hub.client.upload_model(str(archive), name=f"{graph.name} {self._records.run}.aimet")
        self._records.models[graph.name] = model.model_id
        self._records.save()

    def _target(self, client: Any, record: JobRecord) -> Any:
        """The model that a job makes or will make. A service that names it only at the end is waited for."""
        model = client.get_job(record.sent_id).get_target_model()
        if model is None:
            raise RuntimeError(f"{record.url} has no target model")
        return model

    def _find(self, record: JobRecord) -> Any | None:
        """The job of this name, from the newest back to the start of the run."""
        oldest = datetime.fromtimestamp(self._records.started) - _CLOCKS
        offset = 0
        while True:
            with self._hub.calling(f"looking for the {record.title} job"):
                page = self._hub.client.get_job_summaries(
                    offset=offset, limit=_PAGE, type=self._types[record.kind.upper()]
                )
            for summary in page:
                if summary.name == record.name:
                    logger.info("%s was sent before: %s", record.title, summary.url)
                    return summary
            if len(page) < _PAGE or page[-1].date < oldest:
                return None
            offset += _PAGE
