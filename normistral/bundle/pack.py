"""Packs a bundle: artifact, wheels, bill of materials, installer, list of sums and signature, in one file.

The bill of materials is CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/). It carries no time and no random number,
so that the same contents give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import normistral
from normistral.artifact.artifact import Artifact
from normistral.artifact.extra_files import CARD_NAME, read_card
from normistral.artifact.manifest import MANIFEST_NAME, FileRecord, Manifest
from normistral.artifact.presets import find_source_preset
from normistral.bundle import archive, check, install
from normistral.bundle.archive import ArchiveEntry, archive_bytes, with_sums, write_archive
from normistral.bundle.wheels import (
    Closure,
    TargetPlatform,
    Wheel,
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
    if file.absolute().parent.resolve() == artifact.resolve():  # perhaps one of its own files
        raise UsageError(f"{file} is in the artifact's folder", "name a FILE elsewhere")
    signature_file = file.with_name(file.name + archive.SUFFIX)
    for place in (file, signature_file):  # an old signature is removed even where no new one is written
        require_place(place)
        if os.path.lexists(place) and not options.force:
            raise UsageError(f"{place} exists already", "choose another FILE, or replace it with --force")
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


_BUNDLE, _MODEL = "bundle", "model"
_LONGEST_LICENCE_NAME = 200  # some packages put the whole text there
_OSI = "License :: OSI Approved :: "


def write_sbom(
    name: str, manifest: Manifest, files: dict[str, FileRecord], closure: Closure, kernels: Sequence[ArchiveEntry] = ()
) -> bytes:
    """The document as JSON.

    Args:
        name: of the artifact.
        files: every file of the artifact, its manifest included, by name.
        kernels: compiled from sources in normistral's wheel.
    """
    wheels = list(closure.wheels.values())
    identity = [*(r.sha256 for r in files.values()), *(w.sha256 for w in wheels), *(k.sha256 for k in kernels)]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, ' '.join(identity))}",
        "version": 1,
        "metadata": {
            "tools": {"components": [_tool()]},
            "component": _tool() | {"bom-ref": _BUNDLE, "name": f"normistral with {name}"},
        },
        "components": [
            _model(name, manifest, files),
            *map(_library, wheels),
            *(_file(k.name, k.sha256) for k in kernels),
        ],
        "dependencies": [
            {"ref": _BUNDLE, "dependsOn": [_MODEL, *(_purl(closure.wheels[n]) for n in ("normistral", "pip"))]},
            {"ref": _MODEL},
            *(
                {"ref": _purl(wheel), "dependsOn": [_purl(closure.wheels[n]) for n in closure.requires[wheel.name]]}
                for wheel in wheels
            ),
        ],
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _tool() -> dict[str, Any]:
    return {"type": "application", "name": "normistral", "version": normistral.__version__}


def _library(wheel: Wheel) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": _purl(wheel),
        "name": wheel.name,
        "version": wheel.version,
        "hashes": _hashes(wheel.sha256),
        "licenses": _licences(wheel.metadata),
        "purl": _purl(wheel),
        "properties": _properties(path=f"wheels/{wheel.path.name}"),
    }


def _model(name: str, manifest: Manifest, files: dict[str, FileRecord]) -> dict[str, Any]:
    """The artifact. Its own hash is that of its manifest, which holds the hashes of all other files."""
    source, recipe = manifest.source, manifest.recipe
    preset = find_source_preset(source.kind, source.id)
    licences = [{"license": {"id": preset.licence}}] if preset is not None and preset.licence is not None else []
    ancestor = {"type": "machine-learning-model", "name": source.id, "licenses": licences}
    if source.revision is not None:
        ancestor["version"] = source.revision
    if source.kind in ("hub", "package"):
        kind, version = ("huggingface" if source.kind == "hub" else "pypi"), quote(source.revision or "", safe="")
        ancestor["purl"] = f"pkg:{kind}/{quote(source.id)}" + (f"@{version}" if version else "")
    ancestor["components"] = [_file(file, sha256) for file, sha256 in sorted(source.files.items())]
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": name,
        "version": source.revision or manifest.created,
        "hashes": _hashes(files[MANIFEST_NAME].sha256),
        "licenses": licences,
        "pedigree": {"ancestors": [ancestor]},
        "components": [_file(f"artifact/{file}", record.sha256) for file, record in files.items()],
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": manifest.architecture.model_type,
                "modelArchitecture": manifest.architecture.name,
            }
        },
        "properties": _properties(
            format=manifest.format,
            weights=recipe.weights,
            created=manifest.created,
            source=source.kind,
            verified=manifest.verified or "unknown",
        ),
    }


def _file(name: str, sha256: str) -> dict[str, Any]:
    return {"type": "file", "name": name, "hashes": _hashes(sha256)}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _properties(**values: str) -> list[dict[str, str]]:
    return [{"name": f"normistral:{name}", "value": value} for name, value in values.items()]


def _purl(wheel: Wheel) -> str:
    return f"pkg:pypi/{quote(wheel.name)}@{quote(wheel.version, safe='')}"


def _licences(metadata: Message) -> list[dict[str, Any]]:
    """As the package states it: an SPDX expression, a name, or the classifiers of PyPI."""
    if expression := metadata.get("License-Expression"):
        return [{"expression": str(expression)}]
    name = " ".join(str(metadata.get("License") or "").split())
    if name and name != "UNKNOWN" and len(name) <= _LONGEST_LICENCE_NAME:
        return [{"license": {"name": name}}]
    classifiers = [str(line) for line in metadata.get_all("Classifier") or []]
    return [{"license": {"name": line.removeprefix(_OSI)}} for line in classifiers if line.startswith(_OSI)]
