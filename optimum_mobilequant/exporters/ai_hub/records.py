"""What was sent to AI Hub, on disk, so that the same call continues and sends nothing twice.

``ai_hub_jobs.json`` is written anew (temporary file, sync, rename) around every request: before one that makes a job,
so that a job whose answer was lost can be found again by its name, and after it with the job's id. It never holds the
token.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...log import get_logger

logger = get_logger(__name__)

RECORDS = "ai_hub_jobs.json"
_FORMAT_VERSION = 1
_ANEW = "export to another folder, or start anew in this one (overwrite)"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keeps a second process out of ``folder``: two would send every job twice.

    The lock is on the folder itself and goes with the process, however it ends.

    Raises:
        BlockingIOError: another process is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is at work in {folder}: wait for it, or stop it") from None
        except OSError as error:  # some network file systems have no locks
            logger.info("%s cannot be locked (%s): start no second export there", folder, error)
        yield
    finally:
        os.close(handle)


@dataclass
class JobRecord:
    """One job.

    Args:
        kind: ``"compile"``, ``"link"`` or ``"inference"``.
        graph: its graph; empty for the link job.
        name: unique on the service; how a job without an id is found.
        options: as sent.
        job_id: None while it is unknown whether the service took the job.
        url: of the job's page.
        state: the service's last word, e.g. ``"CREATED"``, ``"SUCCESS"``, ``"FAILED"``.
        reason: of a failure.
    """

    kind: str
    graph: str
    name: str
    options: str
    job_id: str | None = None
    url: str = ""
    state: str = "UNSENT"
    reason: str = ""

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.kind} {self.graph}".strip()

    @property
    def sent_id(self) -> str:
        """The id of a job that was sent."""
        assert self.job_id is not None, self.title
        return self.job_id


@dataclass
class Records:
    """The jobs of one folder. Use :meth:`open`.

    Args:
        path: the file.
        inputs: what the jobs are made from, as far as it is bound; JSON.
        run: part of all names.
        started: seconds since 1970.
        models: graph -> id of its uploaded folder.
        jobs: title -> record, in the order of sending.
        files: fetched results, relative to the folder, with sizes in bytes; complete once ``finished``.
        summary: of a finished run; JSON.
        finished: all jobs succeeded and all results are here.
    """

    path: Path
    inputs: dict[str, Any] = field(default_factory=dict)
    run: str = field(default_factory=lambda: secrets.token_hex(4))
    started: float = field(default_factory=time.time)
    models: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, JobRecord] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    @classmethod
    def open(cls, folder: Path, *, restart: bool = False) -> Records:
        """The records of ``folder``, or new ones.

        Args:
            restart: forget the jobs that are recorded; they stay on the service.

        Raises:
            ValueError: a damaged file.
            OSError: the folder cannot be written.
        """
        path = folder / RECORDS
        if restart or not path.exists():
            records = cls(path)
            records.save()  # before any request: shows that the folder can be written
            return records
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.pop("format_version") != _FORMAT_VERSION:
                raise ValueError("another format")
            stored["jobs"] = {title: JobRecord(**job) for title, job in stored["jobs"].items()}
            return cls(path, **stored)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): {_ANEW}") from error

    def bind(self, **parts: Any) -> None:
        """State what the jobs are made from; new parts are stored, known ones compared.

        Args:
            parts: JSON.

        Raises:
            ValueError: a part differs from the one the recorded jobs were made from; names the difference.
        """
        new = json.loads(json.dumps(parts))
        known = {name: self.inputs[name] for name in new if name in self.inputs}
        if changed := [found for name, old in known.items() for found in _changed(old, new[name], name)]:
            raise ValueError(f"{self.path} holds jobs made from other inputs (changed: {', '.join(changed)}): {_ANEW}")
        if new.keys() - known.keys():
            self.inputs.update(new)
            self.save()

    def save(self) -> None:
        """Write all of it.

        Raises:
            OSError: the folder cannot be written; the previous file is still there.
        """
        stored = {"format_version": _FORMAT_VERSION, **asdict(self)}
        del stored["path"]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(stored, file, indent=1, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def job(self, kind: str, graph: str, options: str) -> JobRecord:
        """The record of a job, made and saved if it is new."""
        record = JobRecord(kind, graph, f"{graph or 'mobilequant'} {kind} {self.run}", options)
        if record.title not in self.jobs:
            self.jobs[record.title] = record
            self.save()
        return self.jobs[record.title]


def _changed(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [_changed(old.get(k), new.get(k), f"{name}.{k}".lstrip(".")) for k in sorted({*old, *new})]
        return [found for part in parts for found in part]
    return [] if old == new else [name]
