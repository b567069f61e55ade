"""The state of a stand-in for AI Hub: models, data sets, jobs, and what jobs make.

It checks what it is sent as strictly as the protocol allows: archives, option strings, schemas of inputs. "Compiling"
and "linking" make files that name what they were made from, and a "device run" returns codes that depend on the
inputs. Jobs advance one state each time they are asked for.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections import Counter

import numpy as np
import qai_hub.public_api_pb2 as pb

from tests.exporters.ai_hub.wire import checksum, parsed, read_h5, write_h5

TOKEN = "a-secret-token-of-the-tests"
PHONE, TABLET, PROXY = "Samsung Galaxy S24 (Family)", "Old Tablet", "QCS8550 (Proxy)"
_HTP = ["framework:qnn", "os:android"]
DEVICES = {
    PHONE: [*_HTP, "hexagon:v75", "soc-model:57", "chipset:sm8650", "htp-supports-weight-sharing:true"],
    "Samsung Galaxy S25 (Family)": [*_HTP, "hexagon:v79", "soc-model:69", "htp-supports-weight-sharing:true"],
    TABLET: ["framework:tflite", "os:android"],
    PROXY: [*_HTP, "hexagon:v73", "soc-model:66", "htp-supports-weight-sharing:true"],
}
RUNNING = {
    "compile_job": [pb.JOB_STATE_CREATED, pb.JOB_STATE_OPTIMIZING_MODEL],
    "link_job": [pb.JOB_STATE_CREATED, pb.JOB_STATE_LINKING_MODELS],
    "inference_job": [pb.JOB_STATE_CREATED, pb.JOB_STATE_PROVISIONING_DEVICE, pb.JOB_STATE_MEASURING_PERFORMANCE],
}
ENDED = (pb.JOB_STATE_DONE, pb.JOB_STATE_FAILED)
PART = 1000  # bytes of a part of an upload; small, so that every upload has several
LOG = "line 1: no kernel for that op\n"


class Service:
    """State of the service, and the faults a test asks for.

    Attributes:
        counts: requests by "METHOD kind", e.g. "POST jobs", and jobs by kind.
        fail: kind of job -> reason with which it fails.
        drop: kind of job -> the connection is cut after the job was made, before the answer.
        looks: how often a job must be asked for, its inputs being ready, before it is done.
        down: all connections are cut.
        device: what a graph computes: (its name, codes of its inputs) -> codes of its outputs.
        status: start of a path -> status code to answer with.
    """

    def __init__(self):
        self.counts, self.fail, self.drop, self.looks = Counter(), {}, set(), 2
        self.down = False
        self.models, self.blobs, self.jobs, self.datasets, self.asked = {}, {}, {}, {}, Counter()
        self.status = {}
        self.device = lambda graph, fed: {
            "logits": np.full((1, fed["input_ids"].shape[1], 8), checksum(fed), "uint16")
        }
        self.url = ""  # set by the server

    def jobs_of(self, kind):
        return [job for job in self.jobs.values() if job.WhichOneof("job") == kind]

    # Requests: (method, pattern of the path below /api/v1/) -> method of this class.

    def user(self, query, body):
        return pb.User(email="tester@example.com")

    def devices(self, query, body):
        name = query.get("name", "")
        found = [pb.Device(name=n, os="14", attributes=a) for n, a in DEVICES.items() if name in ("", n)]
        return pb.DeviceList(devices=found)

    def new_model(self, query, body):
        model = pb.Model.FromString(body)
        assert model.is_directory and model.model_type == pb.MODEL_TYPE_AIMET_ONNX, model
        return self._created(self._add_model(model))

    def model(self, query, body, key):
        return self.models[key]

    def upload_urls(self, query, body, key):
        count = -(-int(query["file_size"]) // PART)
        urls = [f"{self.url}/blob/{key}/{index}" for index in range(count)]
        return pb.FileUploadResponse(
            multipart_url=pb.FileMultipartUploadURL(urls=urls, upload_id=f"u{key}", max_part_size=PART)
        )

    def uploaded(self, query, body, key):
        done = pb.FileMultipartUploadComplete.FromString(body)
        assert done.upload_id == f"u{key}"
        parts = [self.blobs[f"{key}/{index}"] for index in range(len(done.etags))]
        assert list(done.etags) == [f'"{len(part)}"' for part in parts]
        self.blobs[key] = b"".join(parts)
        with zipfile.ZipFile(io.BytesIO(self.blobs[key])) as archive:
            assert archive.testzip() is None
            tops = {name.split("/")[0] for name in archive.namelist()}
            kinds = sorted(name.rsplit(".", 1)[1] for name in archive.namelist() if not name.endswith("/"))
        assert len(tops) == 1 and tops.pop().endswith(".aimet"), archive.namelist()
        assert kinds in (["data", "encodings", "onnx"], ["encodings", "onnx"]), kinds
        return self._created(key)

    def download(self, query, body, key):
        return pb.FileDownloadResponse(url=pb.FileDownloadURL(url=f"{self.url}/blob/{key}", filename=f"job_{key}.bin"))

    def new_dataset(self, query, body):
        key = f"d{len(self.datasets)}"
        self.datasets[key] = pb.Dataset.FromString(body)
        self.datasets[key].dataset_id = key
        return self._created(key)

    def dataset_url(self, query, body, key):
        url = pb.FileUploadURL(url=f"{self.url}/blob/{key}", file_field_name="file")
        return pb.FileUploadResponse(url=url)

    def dataset_done(self, query, body, key):
        assert pb.Dataset.FromString(body).file_upload_complete
        return self._created(key)

    def dataset(self, query, body, key):
        return self.datasets[key]

    def dataset_download(self, query, body, key):
        url = pb.FileDownloadURL(url=f"{self.url}/blob/{key}", filename="dataset.h5")
        return pb.FileDownloadResponse(url=url)

    def new_job(self, query, body):
        job = pb.Job.FromString(body)
        kind = job.WhichOneof("job")
        self.counts[kind] += 1
        key = f"j{len(self.jobs)}"
        inner = getattr(job, kind)
        setattr(inner, f"{kind}_id", key)
        inner.job_state = RUNNING[kind][0]
        inner.creation_time.seconds = int(time.time())
        if kind == "compile_job":
            assert not inner.device.name and [device.name for device in inner.devices.devices]
            inner.device.CopyFrom(inner.devices.devices[0])
            options = parsed(inner.options)
            assert options["target_runtime"] == "qnn_dlc" and "quantize_io" in options, inner.options
            target = pb.MODEL_TYPE_QNN_DLC
        elif kind == "link_job":
            target = pb.MODEL_TYPE_QNN_CONTEXT_BINARY
        if kind != "inference_job":
            made = self._add_model(pb.Model(name=f"made by {key}", model_type=target, producer_id=key))
            inner.target_model.CopyFrom(self.models[made])
        self.jobs[key] = job
        if kind in self.drop:
            self.drop.remove(kind)
            return None
        return self._created(key)

    def job(self, query, body, key):
        job = self.jobs[key]
        kind = job.WhichOneof("job")
        inner = getattr(job, kind)
        if inner.job_state in ENDED or not all(state in ENDED for state in self._before(kind, inner)):
            return job
        self.asked[key] += 1
        if self.asked[key] <= self.looks:
            inner.job_state = RUNNING[kind][min(self.asked[key], len(RUNNING[kind])) - 1]
        elif reason := self._fault(kind, inner):
            inner.job_state, inner.failure_reason = pb.JOB_STATE_FAILED, reason
            job.available_artifacts.append(pb.JOB_ARTIFACT_TYPE_HUB_LOG)
        else:
            self._finish(kind, inner, key)
            inner.job_state = pb.JOB_STATE_DONE
        return job

    def result(self, query, body, key):
        profile = pb.ProfileDetail(major_version=1, minor_version=2, execution_time=1234, warm_load_time=99,
                                   after_execution_peak_memory=4096)  # fmt: skip
        for name, unit in (("MatMul_1", pb.COMPUTE_UNIT_NPU), ("Gather_1", pb.COMPUTE_UNIT_CPU)):
            profile.layer_details.add(name=name, compute_unit=unit, layer_type_name=name[:-2], execution_time=5)
        made = pb.InferenceJobResult(inference_job_id=key, output_dataset_id=f"out{key}", detail=profile)
        return pb.JobResult(inference_job_result=made)

    def summaries(self, query, body):
        newest = list(self.jobs.values())[::-1]
        found = pb.JobSummaryList()
        for job in newest:
            kind = job.WhichOneof("job")
            if kind == f"{query['type']}_job":
                inner, row = getattr(job, kind), getattr(found.job_summaries.add(), f"{kind}_summary")
                row.job_id, row.name, row.job_state = getattr(inner, f"{kind}_id"), inner.name, inner.job_state
                row.creation_time.CopyFrom(inner.creation_time)
        offset, limit = int(query.get("offset", 0)), int(query["limit"])
        page = list(found.job_summaries)[offset : offset + limit]
        return pb.JobSummaryList(job_summaries=page)

    def artifacts(self, query, body, key, kind):
        self.blobs[f"log{key}"] = LOG.encode()
        return pb.NamedArtifactDownloadURLList(
            artifacts=[pb.NamedArtifactDownloadURL(url=f"{self.url}/blob/log{key}", filename=f"{key}.log")]
        )

    # What jobs do.

    def _before(self, kind, inner):
        """States of the jobs whose results this one needs."""
        models = {"link_job": lambda: inner.models.models, "inference_job": lambda: [inner.model]}.get(kind, list)()
        makers = [self.jobs[self.models[model.model_id].producer_id] for model in models]
        return [getattr(job, job.WhichOneof("job")).job_state for job in makers]

    def _fault(self, kind, inner):
        return self.fail.get(kind) or ("an input failed" if pb.JOB_STATE_FAILED in self._before(kind, inner) else "")

    def _finish(self, kind, inner, key):
        if kind == "compile_job":
            with zipfile.ZipFile(io.BytesIO(self.blobs[inner.model.model_id])) as archive:
                names = sorted(archive.namelist())
            options = parsed(inner.options)
            graph = options["qnn_options"].removeprefix("context_enable_graphs=")
            self.blobs[inner.target_model.model_id] = f"DLC {graph} {names}".encode()
            self.blobs[f"graph {inner.target_model.model_id}"] = graph.encode()
        elif kind == "link_job":
            inputs = [model.model_id for model in inner.models.models]
            made = inner.target_model.model_id
            self.blobs[made] = b"CONTEXT " + b" | ".join(self.blobs[model] for model in inputs)
            graphs = ",".join(self.blobs[f"graph {model}"].decode() for model in inputs)
            entries = self.models[made].metadata.entries
            entries[pb.MODEL_METADATA_KEY_QNN_MODEL_GRAPH_NAMES] = graphs
            entries[pb.MODEL_METADATA_KEY_QNN_CONTEXT_BIN_HEXAGON_VERSION] = "v75"
        else:
            fed = read_h5(self.blobs[inner.dataset.dataset_id])
            graph = parsed(inner.options)["qnn_options"].removeprefix("context_enable_graphs=")
            made = self.device(graph, fed)
            self.datasets[f"out{key}"] = pb.Dataset(dataset_id=f"out{key}", name="outputs", permanent=True)
            self.blobs[f"out{key}"] = write_h5(made)

    def _add_model(self, model):
        model.model_id = f"m{len(self.models)}"
        model.creation_time.seconds = int(time.time())
        self.models[model.model_id] = model
        return model.model_id

    def _created(self, key):
        made = pb.CreateUpdateResponse(id=key)
        made.creation_time.seconds = int(time.time())
        return made
