"""Upload of an artifact to a hub, in one commit: a repository never holds half of one.

`plan_publication` checks the artifact and looks at what the hub has; `publish` sends what is missing. Large files go
first, each known by its SHA-256: what a broken run has sent is not sent again. The token is the one of the environment
or of `huggingface-cli login`; it is never shown, and goes to the hub over HTTPS only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from normistral.artifact.card import CardOptions, card_licence, find_licence, render_card
from normistral.artifact.extra_files import CARD_NAME, is_sealed, parse_published, read_card
from normistral.artifact.hub import (
    LOG_IN,
    ConnectionBrokenError,
    RemoteFile,
    Repository,
    endpoint,
    find_token,
    git_blob_id,
    host_of,
    is_offline,
    may_carry_token,
)
from normistral.artifact.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileRecord,
    Manifest,
    find_problems,
    parse_manifest,
    read_manifest,
)
from normistral.errors import (
    EXPORT_AGAIN,
    ArtifactError,
    MissingExtraError,
    NormistralError,
    PublishError,
    UsageError,
    install_extra,
)
from normistral.files import explain
from normistral.progress import Progress
from normistral.telemetry import silence_telemetry

_OF_THE_HUB = {".gitattributes", CARD_NAME}  # files that every repository may have
_AGAIN = "run the same command again: what was sent is not sent again"


@dataclass(frozen=True, slots=True)
class Publication:
    """What an upload will do.

    Attributes:
        folder: of the artifact.
        repository: "owner/name".
        address: of the hub.
        commit: that the repository is at now; None where there is no repository yet.
        private: whether others see it; for one that is there, as it is.
        licence: that the card names.
        files: everything that the repository will have of ours, by name.
        missing: names of those that are sent.
        superfluous: files of the artifact that is there now which the new one has not; they are deleted.
        card, manifest: content of README.md and normistral.json.
    """

    folder: Path
    repository: str
    address: str
    commit: str | None
    private: bool
    licence: str
    files: dict[str, FileRecord]
    missing: tuple[str, ...]
    superfluous: tuple[str, ...]
    card: bytes
    manifest: bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes that are sent."""
        return sum(self.files[name].size for name in self.missing)

    @property
    def is_done(self) -> bool:
        """Whether the hub has all of it already."""
        return not self.missing and not self.superfluous


def plan_publication(
    folder: Path, repository: str, options: CardOptions, *, private: bool, progress: Progress
) -> Publication:
    """Check every byte of an artifact, and compare it with what a hub has.

    Args:
        repository: "owner/name".
        options: of the card; `published_as` is filled in.
        private: a new repository is seen by its owner alone.

    Raises:
        UsageError: no such name; the licence is not known; or an option that a rewritten card takes no notice of.
        ArtifactError: the artifact is not whole.
        MissingExtraError: huggingface_hub is not installed.
        PublishError: no token, no rights, no connection; or the name is taken by something else.
    """
    named = parse_published(repository)
    if named is None or named.revision is not None:
        raise UsageError(f"{repository!r} is no name on a hub", "give OWNER/NAME, such as your-name/norsk-int4")
    manifest = read_manifest(folder)
    card, licence = _make_card(folder, manifest, repository, options)
    address = endpoint()
    with _translate(repository, address):
        api = _open_api(address)
        with progress.stage("checking the artifact", manifest.total_bytes, "bytes") as stage:
            problem = next(find_problems(folder, manifest, thorough=True, on_bytes=stage.advance), None)
        if problem is not None:
            raise ArtifactError(problem, EXPORT_AGAIN)
        raw = (folder / MANIFEST_NAME).read_bytes()
        files = {
            **manifest.files,
            MANIFEST_NAME: FileRecord(len(raw), hashlib.sha256(raw).hexdigest()),
            CARD_NAME: FileRecord(len(card), hashlib.sha256(card).hexdigest()),
        }
        with progress.stage(f"asking {host_of(address)}"):
            api.whoami()
            commit, is_private, listed = _find_repository(api, repository) or (None, private, {})
        if private and not is_private:
            raise UsageError(f"{repository} is there and public", "leave --private out, or choose another name")
        old = set() if commit is None else _require_artifact(repository, address, commit, listed)
        if commit is not None and is_sealed(card) and old and CARD_NAME in listed:
            there = _read_there(repository, address, CARD_NAME, commit)
            if not is_sealed(there):
                progress.note(f"{CARD_NAME} of {repository} was rewritten there, and stays as it is")
                card, licence = there, card_licence(there) or licence
                files[CARD_NAME] = FileRecord(len(card), hashlib.sha256(card).hexdigest())
        texts = {CARD_NAME: card, MANIFEST_NAME: raw}
        missing = [
            name
            for name, record in files.items()
            if not _is_there(listed.get(name), record, folder / name, texts.get(name))
        ]
    superfluous = sorted((old & listed.keys()) - files.keys())
    return Publication(
        folder, repository, address, commit, is_private, licence, files, tuple(missing), tuple(superfluous), card, raw
    )


def publish(plan: Publication, progress: Progress) -> str:
    """Send what is missing, in one commit, and look whether the hub then has it; returns the commit.

    Raises:
        PublishError: the hub refuses, or the connection broke.
    """
    assert not plan.is_done
    with _translate(plan.repository, plan.address):
        api = _open_api(plan.address)
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if plan.commit is None:
            api.create_repo(plan.repository, private=plan.private, exist_ok=False)
        texts = {CARD_NAME: plan.card, MANIFEST_NAME: plan.manifest}
        additions = [
            CommitOperationAdd(name, texts[name] if name in texts else str(plan.folder / name)) for name in plan.missing
        ]
        for addition in additions:  # what is sent is what was checked, even if somebody changed it meanwhile
            if addition.upload_info.sha256.hex() != plan.files[addition.path_in_repo].sha256:
                raise ArtifactError(f"{addition.path_in_repo} was changed while it was published", EXPORT_AGAIN)
        with progress.stage("sending", plan.missing_bytes, "bytes") as stage:
            for addition in sorted(additions, key=lambda one: -one.upload_info.size):
                api.preupload_lfs_files(plan.repository, [addition], free_memory=False, num_threads=1)
                stage.advance(addition.upload_info.size)
        deletions = [CommitOperationDelete(name, is_folder=False) for name in plan.superfluous]
        done = api.create_commit(
            plan.repository,
            [*additions, *deletions],
            commit_message="Publish an artifact of normistral",
            parent_commit=plan.commit,
        )
        listed = Repository(plan.repository, plan.address).list_files(done.oid).files
        lacking = [
            name for name, record in plan.files.items() if (one := listed.get(name)) is None or one.size != record.size
        ]
    if lacking:
        raise PublishError(
            f"{plan.repository} lacks {lacking[0]} after the upload", "see that its .gitignore leaves no file out"
        )
    return str(done.oid)


def _make_card(folder: Path, manifest: Manifest, repository: str, options: CardOptions) -> tuple[bytes, str]:
    """The card and the licence that it names: the owner's card if the export's was rewritten."""
    options = CardOptions(repository, options.licence, options.base_model)
    try:
        own = read_card(folder)
    except OSError as exc:
        reason, hint = explain(exc)
        raise ArtifactError(f"cannot read {folder / CARD_NAME}: {reason}", hint) from exc
    if own is None or is_sealed(own):
        licence = find_licence(manifest, options)
        if licence is None:
            raise UsageError(
                f"nobody says under which licence {manifest.source.id} may be passed on",
                "name its licence: --license ID; or where it is from: --base-model OWNER/NAME",
            )
        return render_card(manifest, folder.resolve().name, options), licence
    if options.licence is not None or options.base_model is not None:
        raise UsageError(f"{folder / CARD_NAME} was rewritten, and is published as it is", "write it there")
    licence = card_licence(own)
    if licence is None:
        raise UsageError(f"{folder / CARD_NAME} names no licence", "add a line to its metadata, such as license: mit")
    return own, licence


def _open_api(address: str) -> Any:
    silence_telemetry()
    if is_offline():
        raise PublishError("HF_HUB_OFFLINE is set", "unset it to publish")
    token = find_token()
    if token is None:
        raise PublishError(f"there is no token for {host_of(address)}", f"{LOG_IN}; it has to allow writing")
    if not may_carry_token(address):
        raise PublishError(f"{address} is not HTTPS: others could read the token", "give HF_ENDPOINT an https address")
    try:
        import requests  # noqa: F401
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as exc:
        raise MissingExtraError(f"{exc.name} is not installed", install_extra("export")) from exc
    disable_progress_bars()  # of its own, between ours
    constants.HF_HUB_DISABLE_XET = True  # it keeps logs and a cache of its own in the home folder
    return HfApi(endpoint=address, token=token)


def _find_repository(api: Any, repository: str) -> tuple[str, bool, dict[str, RemoteFile]] | None:
    """Commit, whether it is private, and files; None where there is no repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository, files_metadata=True, timeout=30)
    except RepositoryNotFoundError:
        return None
    files = {
        one.rfilename: RemoteFile(one.size or 0, one.lfs.sha256 if one.lfs is not None else one.blob_id or "")
        for one in info.siblings or []
    }
    return str(info.sha), bool(info.private), files


def _require_artifact(repository: str, address: str, commit: str, listed: dict[str, RemoteFile]) -> set[str]:
    """Names of the artifact's files that is there now; refuses a repository of something else."""
    others = sorted(listed.keys() - _OF_THE_HUB)
    if not others:
        return set()
    if MANIFEST_NAME not in listed:
        raise PublishError(
            f"{repository} is taken: it holds {others[0]}, and is no artifact of normistral", "choose another name"
        )
    try:
        return set(parse_manifest(_read_there(repository, address, MANIFEST_NAME, commit)).files)
    except ArtifactError as exc:
        raise PublishError(f"the {MANIFEST_NAME} of {repository} cannot be read: {exc}", "choose another name") from exc


def _read_there(repository: str, address: str, name: str, commit: str) -> bytes:
    """A small file that the repository has."""
    raw = b""
    try:
        for block in Repository(repository, address).read(name, commit, 0):
            raw += block
            if len(raw) > MAX_MANIFEST_BYTES:
                raise PublishError(
                    f"the {name} of {repository} is larger than {MAX_MANIFEST_BYTES} bytes", "shorten it"
                )
        return raw
    except ConnectionBrokenError as exc:
        raise PublishError(f"the {name} of {repository} cannot be read: {exc}", _AGAIN) from exc


def _is_there(listed: RemoteFile | None, record: FileRecord, path: Path, text: bytes | None) -> bool:
    if listed is None or listed.size != record.size:
        return False
    if len(listed.digest) == 64:
        return listed.digest == record.sha256
    with path.open("rb") if text is None else BytesIO(text) as stream:
        return listed.digest == git_blob_id(record.size, stream)


@contextmanager
def _translate(repository: str, address: str) -> Iterator[None]:
    """Errors of huggingface_hub and of the connection as ours; none of their texts is shown."""
    try:
        yield
    except NormistralError:
        raise
    except OSError as exc:  # requests' errors too
        status = getattr(getattr(exc, "response", None), "status_code", None)
        host = host_of(address)
        if status == 401:
            raise PublishError(f"{host} does not know the token", f"{LOG_IN}; it has to allow writing") from exc
        if status == 403:
            raise PublishError(
                f"the token may not write to {repository} at {host}",
                f"publish under a name of your own, or take a token that may write there: {LOG_IN}",
            ) from exc
        if status in (409, 412):
            raise PublishError(f"{repository} was changed by somebody else meanwhile", _AGAIN) from exc
        if status is not None:
            raise PublishError(f"{host} answered HTTP {status} for {repository}", f"try again later; {_AGAIN}") from exc
        if exc.filename is not None and exc.errno:
            reason, hint = explain(exc)
            raise ArtifactError(f"{exc.filename}: {reason}", hint) from exc
        raise PublishError(
            f"the connection to {host} broke off, or there is none ({type(exc).__name__})",
            f"check the connection; {_AGAIN}",
        ) from exc
    except ValueError as exc:  # what huggingface_hub says of an answer that makes no sense, or of a card
        raise PublishError(
            f"{host_of(address)} did not take it ({type(exc).__name__})", "check HF_ENDPOINT, and README.md's metadata"
        ) from exc
