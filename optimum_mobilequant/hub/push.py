"""Upload a checkpoint, its card and its exports in one commit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token

from ..exporters.folder import RECORD
from ..hf_quantizer import METHOD
from ..log import get_logger
from .base import look_up
from .card import build_card, is_own, merge
from .errors import TRANSPORT_ERRORS, check_token, explain
from .facts import Export, read_exports, read_facts, visible_files
from .names import check_hub_id

logger = get_logger(__name__)

CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """What a push would send.

    Args:
        repo_id: ``owner/name``. files: path in the repository -> file here; without the card.
        card: the generated card. theirs: the card in the folder, if somebody wrote one. explicit: metadata keys that
            were given for this push.
        exports: folders of exports in the repository.
    """

    repo_id: str
    files: dict[str, Path]
    card: ModelCard
    theirs: ModelCard | None
    explicit: tuple[str, ...]
    exports: tuple[str, ...]

    def readme(self, remote: ModelCard | None = None) -> ModelCard:
        """The card to upload: somebody's own with our metadata, from the folder or else the repository, or ours."""
        own = self.theirs or remote
        return self.card if own is None else merge(own, self.card, explicit=self.explicit)

    def size(self) -> int:
        """Bytes of the files, without the card."""
        return sum(path.stat().st_size for path in self.files.values())


def prepare(
    checkpoint: str | PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
    exports: Sequence[str | PathLike[str]] = (),
) -> Upload:
    """Check everything on this side and write the card; sends nothing. Arguments and errors as of :func:`push`."""
    folder = Path(checkpoint).expanduser()
    check_hub_id(repo_id, "repository")
    if base_model is not None:
        check_hub_id(base_model, "base model")
    facts = read_facts(folder)
    found = read_exports(folder, [Path(path).expanduser() for path in exports])
    name = base_model or facts.base_model
    if name == repo_id:
        raise ValueError(f"{repo_id} is the base model itself: publish the checkpoint under another name")
    if name is None:
        logger.warning("the base model is not recorded, so the card names none: give --base-model (base_model=...)")
    base = look_up(name, HfApi(token=token)) if name else None
    if not facts.has_tokenizer:
        logger.warning(f"{folder} holds no tokenizer: save it there with tokenizer.save_pretrained")
    card = build_card(facts, repo_id, base=base, license=license, exports=found)
    explicit = [key for key, value in (("base_model", base_model), ("license", license)) if value is not None]
    names = tuple(export.name for export in found)
    return Upload(repo_id, _files(folder, found), card, _own_card(folder / CARD), tuple(explicit), names)


def push(
    checkpoint: str | PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    exports: Sequence[str | PathLike[str]] = (),
) -> str:
    """Publish a saved checkpoint on the Hugging Face Hub, with a full model card, in one commit.

    The repository is made if there is none. One that holds another kind of model is left alone. Of an earlier push,
    weight files and files of the same exports that are no longer there are deleted in the same commit. A card that
    somebody wrote, in the folder or on the Hub, keeps its text; only its metadata are completed. An interrupted push
    publishes nothing, and can be repeated.

    Args:
        checkpoint: folder that ``quantize`` saved; everything in it but hidden files is uploaded.
        repo_id: ``owner/name``.
        private: make a new repository private; refuse an existing public one.
        base_model: Hub id of the float model; None takes the recorded one.
        license: in the Hub's spelling, such as ``apache-2.0``; None takes the base model's.
        token: with write access; None takes HF_TOKEN or the one of ``hf auth login``. It is not written anywhere.
        commit_message: one line.
        exports: folders that ``export`` wrote; each is stored as a folder named after its target.

    Returns:
        URL of the repository.

    Raises:
        FileNotFoundError: no such checkpoint, or one with files missing.
        ValueError: a checkpoint of another method or a damaged one; a bad name; a repository that holds another model;
            metadata that the Hub refuses.
        PermissionError: no token, or one that may not write there.
        ConnectionError: the upload was interrupted, or HF_HUB_OFFLINE is set.
    """
    check_hub_id(repo_id, "repository")
    secret = check_token(token or get_token())
    upload = prepare(checkpoint, repo_id, base_model=base_model, license=license, token=secret, exports=exports)
    api = HfApi(token=secret)
    problem: Exception
    try:
        return _send(upload, api, private, commit_message or "Upload a MobileQuant checkpoint")
    except _Refused as error:
        problem = ValueError(str(error))
    except (*TRANSPORT_ERRORS, ValueError) as error:
        problem = explain(error, repo_id, secret)
    raise problem  # outside the handler: the client's error, which holds the request and its token, stays behind


class _Refused(Exception):
    """Found out on the Hub, before anything was sent."""


def _send(upload: Upload, api: HfApi, private: bool, message: str) -> str:
    url = api.create_repo(upload.repo_id, private=private, exist_ok=True)
    info = api.model_info(upload.repo_id)
    if private and not info.private:
        raise _Refused(f"{upload.repo_id} exists and is public: make it private in its settings, or push to another")
    there = {file.rfilename for file in info.siblings or ()}
    _refuse_other_model(api, upload.repo_id, there)
    card = upload.readme(_remote_card(api, upload.repo_id, there))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path) for path in sorted(there - upload.files.keys()) if _is_stale(path, upload)
    ]
    deleted = {operation.path_in_repo for operation in operations}
    if old := sorted(p for p in there - upload.files.keys() - deleted if p.endswith(f"/{RECORD}")):
        logger.warning(f"{upload.repo_id} keeps exports of an earlier push ({', '.join(old)}): push them again")
    operations += [CommitOperationAdd(path, file) for path, file in upload.files.items()]
    operations.append(CommitOperationAdd(CARD, str(card).encode()))
    api.create_commit(upload.repo_id, operations, commit_message=message)
    return str(url)


def _is_stale(path: str, upload: Upload) -> bool:
    """Weights of an earlier push that transformers might read instead, and left-overs of the same exports."""
    if "/" not in path:
        return path.endswith((".safetensors", ".safetensors.index.json"))
    return any(path.startswith(f"{name}/") for name in upload.exports)


def _refuse_other_model(api: HfApi, repo_id: str, there: set[str]) -> None:
    if "config.json" not in there:
        return
    config: Any = json.loads(_download(api, repo_id, "config.json"))
    if (config.get("quantization_config") or {}).get("quant_method") != METHOD:
        raise _Refused(f"{repo_id} holds another model, which a push would replace: give another name")


def _remote_card(api: HfApi, repo_id: str, there: set[str]) -> ModelCard | None:
    if CARD not in there:
        return None
    card = ModelCard(_download(api, repo_id, CARD))
    return None if is_own(card) else card


def _download(api: HfApi, repo_id: str, name: str) -> str:
    with TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repo_id, name, local_dir=folder)).read_text(encoding="utf-8-sig")


def _own_card(file: Path) -> ModelCard | None:
    if not file.is_file():
        return None
    try:
        card = ModelCard.load(file)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the metadata of {file} cannot be read ({error}): correct or remove them") from error
    return None if is_own(card) else card


def _files(folder: Path, exports: Sequence[Export]) -> dict[str, Path]:
    files = {path.relative_to(folder).as_posix(): path for path in visible_files(folder)}
    files.pop(CARD, None)
    for export in exports:
        if folder not in export.folder.parents:
            files |= {
                f"{export.name}/{p.relative_to(export.folder).as_posix()}": p for p in visible_files(export.folder)
            }
    return files
