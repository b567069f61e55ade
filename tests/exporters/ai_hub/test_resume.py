"""Interruptions: whatever breaks, and whenever, the next call continues and no job is sent twice."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("qai_hub", reason='no client of AI Hub: pip install "optimum-mobilequant[ai-hub]"')

from optimum_mobilequant.exporters.ai_hub import access, read_folders, run_jobs
from optimum_mobilequant.exporters.ai_hub.records import only_one
from tests import tiny
from tests.exporters.ai_hub.service import PHONE, Service

KINDS = {"compile_job": 2, "link_job": 1, "inference_job": 2}


@pytest.fixture
def call(aimet, out, hub, phone):
    def run(**options):
        return run_jobs(read_folders(aimet), out, hub, phone, **{"wait": True, "poll_seconds": 0.01} | options)

    return run


def stop_at(monkeypatch, service, method, after):
    """The service goes away at the request number ``after`` that ``method`` answers, before it is answered."""
    original, seen = getattr(Service, method), []

    def answer(self, *arguments):
        seen.append(1)
        if len(seen) == after and not self.down:
            self.down = True
            return None
        return original(self, *arguments)

    from tests.exporters.ai_hub import server

    (route,) = [key for key, value in server.ROUTES.items() if value is original]
    monkeypatch.setitem(server.ROUTES, route, answer)


@pytest.mark.parametrize(
    ("method", "after"),
    [("uploaded", 1), ("uploaded", 2), ("new_job", 1), ("new_job", 3), ("new_job", 5), ("job", 2), ("job", 14),
     ("result", 1), ("download", 1), ("dataset_download", 2)],
)  # fmt: skip
def test_the_service_goes_away_and_comes_back(call, service, monkeypatch, short_retries, method, after):
    stop_at(monkeypatch, service, method, after)
    with pytest.raises(ConnectionError, match="the same call continues"):
        call()
    assert service.down  # else this test interrupts nothing
    service.down = False
    assert call().finished
    assert {kind: service.counts[kind] for kind in KINDS} == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_whose_answer_was_lost_is_found_by_its_name(call, service, monkeypatch, kind):
    import qai_hub.util.session as session

    monkeypatch.setattr(session, "MAX_RETRIES", 0)  # else the client itself sends the job again
    service.drop.add(kind)
    with pytest.raises(ConnectionError):
        call()
    assert service.counts[kind] == 1
    assert call().finished
    assert {k: service.counts[k] for k in KINDS} == KINDS


def test_too_many_jobs_at_once(call, service, short_retries):
    service.status["jobs"] = 429
    with pytest.raises(ConnectionError, match="Too Many Requests.*the same call continues"):
        call()
    service.status.clear()
    assert call().finished
    assert {kind: service.counts[kind] for kind in KINDS} == KINDS


def test_a_lost_job_is_found_behind_many_newer_ones(call, service, monkeypatch, short_retries):
    import qai_hub.public_api_pb2 as pb

    service.drop.add("link_job")
    monkeypatch.setattr("qai_hub.util.session.MAX_RETRIES", 0)
    with pytest.raises(ConnectionError):
        call()
    for index in range(120):
        other = pb.LinkJob(link_job_id=f"x{index}", name="someone else's", job_state=pb.JOB_STATE_DONE)
        other.creation_time.seconds = 2**31
        service.jobs[f"x{index}"] = pb.Job(link_job=other)
    assert call().finished
    assert service.counts["link_job"] == 1


def test_a_killed_process_leaves_records_that_continue(aimet, out, service, configure, call):
    configure(service.url)
    program = textwrap.dedent(f"""
        import os
        from pathlib import Path
        from optimum_mobilequant.exporters.ai_hub import access, read_folders, run_jobs
        from optimum_mobilequant.exporters.ai_hub.records import Records

        save, seen = Records.save, []
        def killed(self):
            save(self)
            if sum(job.job_id is not None for job in self.jobs.values()) == 3:
                os._exit(9)
        Records.save = killed
        hub = access.connect(access.read_config())
        run_jobs(read_folders(Path({str(aimet)!r})), Path({str(out)!r}), hub, hub.find_device({PHONE!r}))
    """)
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert service.counts["POST jobs"] == 3
    assert call().finished
    assert not service.counts["GET job_summaries"]  # each id was on disk before the next job was begun
    assert {kind: service.counts[kind] for kind in KINDS} == KINDS


def test_interrupted_waiting_is_no_fault(call, service, monkeypatch):
    import optimum_mobilequant.exporters.ai_hub.run as run

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
    assert call().finished
    assert {kind: service.counts[kind] for kind in KINDS} == KINDS


def test_other_inputs_are_refused_and_restart_is_explicit(call, service, aimet, hub, out):
    call(wait=False)
    (aimet / "token_ar1_cl8.aimet" / "model.encodings").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"other inputs \(changed: graphs.token_ar1_cl8.folder\).*start anew"):
        call()
    assert service.counts["POST jobs"] == 5
    assert call(restart=True).finished
    assert service.counts["POST jobs"] == 10


def test_another_device_or_service_is_refused(call, aimet, out, hub, configure):
    call(wait=False)
    other = hub.find_device("Samsung Galaxy S25 (Family)")
    with pytest.raises(ValueError, match=r"changed: device"):
        run_jobs(read_folders(aimet), out, hub, other)
    records = out / "ai_hub_jobs.json"
    records.write_text(records.read_text().replace("http://127.0.0.1", "https://elsewhere"))
    with pytest.raises(ValueError, match=r"changed: service"):
        call()


def test_a_second_process_is_kept_out(call, out, service):
    pytest.importorskip("fcntl", reason="Windows has no such lock")
    with only_one(out), pytest.raises(BlockingIOError, match="another process is at work"):
        call()
    assert service.counts["POST jobs"] == 0
    assert call().finished


def test_damaged_records_are_refused(call, service, out):
    call(wait=False)
    (out / "ai_hub_jobs.json").write_text('{"format_version": 1, "jobs": {"link"')
    with pytest.raises(ValueError, match=r"ai_hub_jobs\.json is damaged"):
        call()
    assert service.counts["POST jobs"] == 5


def test_jobs_of_another_account_are_named(call, service, out):
    call(wait=False)
    stored = json.loads((out / "ai_hub_jobs.json").read_text())
    stored["jobs"]["link"]["job_id"] = "jgone"
    (out / "ai_hub_jobs.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="jgone.*could not be found"):
        call()


def test_a_new_connection_continues_too(call, aimet, out, service):
    call(wait=False)
    hub = access.connect(access.read_config())
    result = run_jobs(read_folders(aimet), out, hub, hub.find_device(PHONE), wait=True, poll_seconds=0.01)
    assert result.finished and service.counts["POST jobs"] == 5
