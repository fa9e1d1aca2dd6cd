"""Packs a bundle: artifact, wheels, bill of materials, installer, list of sums and signature, in one file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import normistral
from normistral.artifact.artifact import Artifact
from normistral.artifact.extra_files import CARD_NAME, read_card
from normistral.artifact.manifest import MANIFEST_NAME, FileRecord, Manifest
from normistral.bundle import archive, check, install
from normistral.bundle.archive import ArchiveEntry, archive_bytes, with_sums, write_archive
from normistral.bundle.sbom import write_sbom
from normistral.bundle.wheels import (
    Closure,
    TargetPlatform,
    collect_wheels,
    find_own_wheel,
    needed_glibc_minor,
    pack_own_wheel,
)
from normistral.errors import EngineError, ResourceError, UsageError
from normistral.export.staging import translate_full_disk
from normistral.files import atomic_write, require_place
from normistral.hardware import free_disk_bytes
from normistral.progress import NoProgress, Progress
from normistral.runtime.kernels.library import collect_for_others


@dataclass(frozen=True, slots=True)
class BundleOptions:
    """Options of a bundle.

    Attributes:
        with_server: bring what `normistral serve` needs.
        key: private key of ssh-keygen, or a public one whose private one an agent holds; None leaves it unsigned.
        wheels: a folder to take all wheels from, without a network; None has pip ask its index.
        force: replace a file that is there.
    """

    target: TargetPlatform
    with_server: bool = False
    key: Path | None = None
    wheels: Path | None = None
    force: bool = False


def make_bundle(artifact: Path, file: Path, options: BundleOptions, progress: Progress | None = None) -> str:
    """Write a bundle, and its signature beside it.

    What fails or is interrupted leaves `file` as it was. The same artifact and wheels give the same bytes.

    Returns:
        SHA-256 of the file.

    Raises:
        ArtifactError: the artifact is not whole, or a wheel is not.
        UsageError: `file` is there already and `force` is off; no such key or folder.
        DownloadError, MissingExtraError: the wheels could not be had.
        ResourceError: the disk is too full.
        NormistralError: the key could not sign.
    """
    progress = progress or NoProgress()
    _check_arguments(artifact, file, options)
    manifest = Artifact.open(artifact).manifest  # what is changed in large files is found while they are copied
    _require_disk(file, manifest.total_bytes)
    extras = [*(["onnx"] if manifest.format == "onnx" else []), *(["serve"] if options.with_server else [])]
    with tempfile.TemporaryDirectory(prefix="normistral-wheels-") as folder, translate_full_disk(file):
        with progress.stage("collecting the runtime"):
            closure = _collect(extras, options, Path(folder))
        kernels = _compile_kernels(manifest, closure, options.target, Path(folder), progress)
        entries = with_sums(_entries(artifact, manifest, extras, closure, options.target, kernels))
        _require_disk(file, archive_bytes(entries))
        progress.note(f"{len(closure.wheels)} wheels for Python {options.target.python}, {options.target.machine}")
        signature_file = file.with_name(file.name + archive.SUFFIX)
        with atomic_write(file, private=False) as stream:
            size = sum(entry.size for entry in entries)
            with progress.stage(f"writing {file.name}", size, "bytes") as writing:
                sha256 = write_archive(stream, entries, writing.advance)
            signed = None if options.key is None else archive.sign(stream, options.key)
            # An old signature is none of the new file: it goes first, so that no moment has the wrong pair.
            signature_file.unlink(missing_ok=True)
        if signed is not None:
            with atomic_write(signature_file, private=False) as stream:
                stream.write(signed)
    return sha256


def installer_source() -> bytes:
    """install.py of a bundle: `check` and `install` as one script that imports the standard library alone."""
    checking, installing = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in (check, install))
    docstring, end, commands = installing.partition('"""\n\n')
    commands, joined = re.subn(
        r"^from normistral\.bundle\.check import \([^)]*\)\n\n", "", commands, flags=re.MULTILINE
    )
    assert joined == 1
    return f"{docstring}{end}{checking.partition(end)[2]}\n\n{commands}".encode()


def _check_arguments(artifact: Path, file: Path, options: BundleOptions) -> None:
    name = artifact.resolve().name
    if name.startswith(".") or not check.is_member_name(check.ARTIFACT + name):
        raise UsageError(f"an artifact of the name {name!r} could not be installed", "rename its folder")
    signature_file = file.with_name(file.name + archive.SUFFIX)
    for place in (file, signature_file):  # an old signature is removed even where no new one is written
        require_place(place)
    if os.path.lexists(file) and not options.force:
        raise UsageError(f"{file} exists already", "choose another FILE, or replace it with --force")
    if options.wheels is not None and not options.wheels.is_dir():
        raise UsageError(f"there is no folder {options.wheels}", "give the folder that holds the wheels")
    if options.key is not None:
        archive.require_key(options.key)


def _collect(extras: list[str], options: BundleOptions, folder: Path) -> Closure:
    version, packed, collected = normistral.__version__, folder / "own", folder / "wheels"
    packed.mkdir()
    collected.mkdir()
    given = options.wheels is not None and find_own_wheel(options.wheels, version) is not None
    own = None if given else pack_own_wheel(packed)
    return collect_wheels(own, extras, version, options.target, options.wheels, collected)


def _compile_kernels(
    manifest: Manifest, closure: Closure, target: TargetPlatform, folder: Path, progress: Progress
) -> list[ArchiveEntry]:
    """Our int4 products, where they are of use on the target and can be compiled here against its OpenVINO."""
    wheel = closure.wheels.get("openvino")
    if manifest.format != "openvino" or manifest.recipe.weights != "int4" or wheel is None:
        return []
    here = f"{platform.system()} {platform.machine()}"
    if here != f"Linux {target.machine}" or target.machine != "x86_64" or wheel.version != version("openvino"):
        progress.note(
            f"no int4 kernel in it: OpenVINO {wheel.version} for {target.machine} is not what is installed here"
        )
        return []
    compiled = folder / "kernels"
    compiled.mkdir()
    try:
        with progress.stage("collecting the int4 kernel"):
            libraries = collect_for_others(compiled)
    except EngineError as exc:
        progress.note(f"no int4 kernel in it: {exc}")
        return []
    return [ArchiveEntry.of_bytes(check.KERNELS + path.name, path.read_bytes()) for path in libraries]


def _entries(
    artifact: Path,
    manifest: Manifest,
    extras: list[str],
    closure: Closure,
    target: TargetPlatform,
    kernels: list[ArchiveEntry],
) -> list[ArchiveEntry]:
    """Everything but the list of sums: the small files first, so that they are found at once."""
    raw = (artifact / MANIFEST_NAME).read_bytes()
    files = {
        MANIFEST_NAME: FileRecord(len(raw), hashlib.sha256(raw).hexdigest()),
        **dict(sorted(manifest.files.items())),
    }
    if (card := read_card(artifact)) is not None:
        files[CARD_NAME] = FileRecord(len(card), hashlib.sha256(card).hexdigest())
    wheels = closure.wheels.values()
    size = sum(record.size for record in files.values())
    description = {
        "schema": check.SCHEMA,
        "artifact": artifact.resolve().name,
        "requirement": f"normistral[{','.join(extras)}]=={normistral.__version__}".replace("[]", ""),
        "python": target.python,
        "machine": target.machine,
        "glibc": f"2.{max(_glibc_minor(wheel.path) for wheel in wheels)}",
        "bytes": size
        + sum(kernel.size for kernel in kernels)
        + sum(wheel.path.stat().st_size + wheel.unpacked_bytes for wheel in wheels),
    }
    return [
        ArchiveEntry.of_bytes(check.INSTALLER, installer_source()),
        ArchiveEntry.of_bytes(
            check.DESCRIPTION, (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode()
        ),
        ArchiveEntry.of_bytes(check.SBOM, write_sbom(artifact.resolve().name, manifest, files, closure, kernels)),
        *kernels,
        *(ArchiveEntry(check.ARTIFACT + name, r.size, r.sha256, artifact / name) for name, r in files.items()),
        *(ArchiveEntry(check.WHEELS + w.path.name, w.path.stat().st_size, w.sha256, w.path) for w in wheels),
    ]


def _glibc_minor(wheel: Path) -> int:
    from packaging.utils import parse_wheel_filename

    return needed_glibc_minor(tag.platform for tag in parse_wheel_filename(wheel.name)[3])


def _require_disk(file: Path, size: int) -> None:
    free = free_disk_bytes(file)
    if free < size:
        raise ResourceError(
            f"{file} will take {size / 1e9:.2f} GB; {free / 1e9:.2f} GB are free",
            "free some space, or choose a FILE on another disk",
        )
