"""The bill of materials: what is in a bundle, in CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/).

It carries no time and no random number, so that the same contents give the same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from email.message import Message
from typing import Any
from urllib.parse import quote

import normistral
from normistral.artifact.manifest import MANIFEST_NAME, FileRecord, Manifest
from normistral.artifact.presets import PRESETS
from normistral.bundle.archive import ArchiveEntry
from normistral.bundle.wheels import Closure, Wheel

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
    preset = next((p for p in PRESETS if source.id in (p.repository, p.package)), None)
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
