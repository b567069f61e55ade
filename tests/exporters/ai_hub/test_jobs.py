"""The whole way through the real client and a loopback server: upload, compile, link, device run, results."""

import io
import json
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("qai_hub", reason='no client of AI Hub: pip install "optimum-mobilequant[ai-hub]"')

from optimum_mobilequant.exporters.ai_hub import access, read_folders, run_jobs
from optimum_mobilequant.exporters.ai_hub.samples import sample_inputs
from tests.exporters.ai_hub.service import DEVICES, LOG, PROXY, TOKEN
from tests.exporters.ai_hub.wire import checksum, parsed, read_h5

GRAPHS = ["prompt_ar4_cl8", "token_ar1_cl8"]
TITLES = [*(f"compile {g}" for g in GRAPHS), "link", *(f"inference {g}" for g in GRAPHS)]


@pytest.fixture
def run(aimet, out, hub, phone):
    def call(**options):
        options = {"wait": True, "poll_seconds": 0.01} | options
        return run_jobs(read_folders(aimet), out, hub, options.pop("target", phone), **options)

    return call


def test_everything_arrives(run, service, out, aimet):
    result = run()
    assert result.finished
    assert list(result.jobs) == TITLES
    assert {job.state for job in result.jobs.values()} == {"SUCCESS"}
    assert (service.counts["compile_job"], service.counts["link_job"], service.counts["inference_job"]) == (2, 1, 2)

    # The context binary is the service's, and was linked from both uploads.
    binary = (out / "model.bin").read_bytes()
    (link,) = service.jobs_of("link_job")
    assert binary == service.blobs[link.link_job.target_model.model_id]
    for graph in GRAPHS:
        assert f"DLC {graph} ['{graph}.aimet/model.data'".encode() in binary
    assert result.summary["binary"]["QNN_MODEL_GRAPH_NAMES"] == ",".join(GRAPHS)

    profile = json.loads((out / "profile_token_ar1_cl8.json").read_text())
    assert profile["execution_summary"]["estimated_inference_time"] == 1234
    about = result.summary["graphs"]["token_ar1_cl8"]
    assert (about["microseconds"], about["peak_bytes"], about["layers"]) == (1234, 4096, {"CPU": 1, "NPU": 1})
    assert about["output_differences"] == []

    # The outputs are computed from the very codes that were sent.
    for graph in read_folders(aimet):
        logits = load_file(out / f"outputs_{graph.name}.safetensors")["logits"]
        assert logits.dtype == np.uint16 and (logits == checksum(sample_inputs(graph))).all()
    listed = {path.name for path in out.iterdir()}
    assert listed == {"ai_hub_jobs.json", *result.files}  # nothing half-made is left
    assert TOKEN not in (out / "ai_hub_jobs.json").read_text()


def test_uploads_are_exact_and_in_parts(run, service, aimet):
    run()
    uploads = [key for key, model in service.models.items() if not model.producer_id]
    assert len(uploads) == 2
    for key, graph in zip(uploads, GRAPHS, strict=True):
        assert f"{key}/5" in service.blobs  # six parts or more
        with zipfile.ZipFile(io.BytesIO(service.blobs[key])) as archive:
            for file in (aimet / f"{graph}.aimet").iterdir():
                assert archive.read(f"{graph}.aimet/{file.name}") == file.read_bytes()


def test_options_and_inputs_as_sent(run, service, aimet):
    run()
    for job, graph in zip(service.jobs_of("compile_job"), GRAPHS, strict=True):
        options = parsed(job.compile_job.options)
        assert options["output_names"] == "logits"
        assert options["qnn_options"] == f"context_enable_graphs={graph}"
        assert options["quantize_full_type"] == "w8a16"
    for job, graph in zip(service.jobs_of("inference_job"), read_folders(aimet), strict=True):
        sent = read_h5(service.blobs[job.inference_job.dataset.dataset_id])
        assert list(sent) == [tensor.name for tensor in graph.inputs]  # the order is part of a data set's schema
        assert {n: (a.dtype.name, a.shape) for n, a in sent.items()} == {
            t.name: (t.dtype, t.shape) for t in graph.inputs
        }
        assert parsed(job.inference_job.options)["qnn_options"] == f"context_enable_graphs={graph.name}"
        assert job.inference_job.is_profiling_on


def test_without_waiting_all_is_sent_and_a_later_call_fetches(run, service, out):
    first = run(wait=False)
    assert not first.finished and list(first.jobs) == TITLES and not first.files
    assert sorted(path.name for path in out.iterdir()) == ["ai_hub_jobs.json"]
    for _ in range(5):
        last = run(wait=False)
    assert last.finished and "model.bin" in last.files
    assert (service.counts["POST jobs"], service.counts["compile_job"]) == (5, 2)  # nothing twice


def test_a_finished_folder_asks_for_nothing(run, service):
    run()
    before = service.counts.copy()
    assert run().finished
    assert service.counts == before


def test_bars_go_to_stderr_and_nothing_to_stdout(aimet, out, service, hub, phone, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    try:
        loud = access.connect(access.read_config())
        run_jobs(read_folders(aimet), out, loud, phone, wait=True, poll_seconds=0.01)
    finally:
        logging.disable_progress_bar()
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "AI Hub: 100%" in shown.err and "5/5" in shown.err
    assert TOKEN not in shown.err


def test_outputs_of_another_form_are_reported(run, aimet):
    spec = json.loads((aimet / "io_spec.json").read_text())
    spec["graphs"][GRAPHS[0]]["outputs"][0]["dtype"] = "uint8"
    (aimet / "io_spec.json").write_text(json.dumps(spec))
    (difference,) = run().summary["graphs"][GRAPHS[0]]["output_differences"]
    assert difference == "logits: uint16 [1, 4, 8], expected uint8 [1, 4, 8]"


def test_a_proxy_is_compiled_for_only(run, hub, service):
    result = run(target=hub.find_device(PROXY))
    assert result.finished and list(result.files) == ["model.bin"]
    assert service.counts["inference_job"] == 0
    assert len(DEVICES[PROXY])  # it has the attributes of a phone: the name decides


@pytest.mark.parametrize(
    ("kind", "title"),
    [("compile_job", "compile prompt_ar4_cl8"), ("link_job", "link"), ("inference_job", "inference prompt_ar4_cl8")],
)
def test_a_failed_job_tells_reason_page_and_logs(run, service, out, kind, title):
    service.fail[kind] = f"no kernel for Foo {TOKEN}"
    with pytest.raises(
        RuntimeError, match=rf"{title} job failed: no kernel for Foo .*/jobs/j\d/\).*logs/j\d\.log"
    ) as bad:
        run()
    assert next((out / "logs").iterdir()).read_text() == LOG
    assert TOKEN not in str(bad.value) + (out / "ai_hub_jobs.json").read_text()  # though the service quotes it
    sent = service.counts["POST jobs"]
    with pytest.raises(RuntimeError, match="no kernel for Foo"):  # and keeps to it
        run()
    assert service.counts["POST jobs"] == sent
    service.fail.clear()
    assert run(restart=True).finished
    assert service.counts["POST jobs"] == sent + 5
