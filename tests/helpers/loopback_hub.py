"""A server on 127.0.0.1 that speaks the parts of the hub's HTTP interface that are used here, faults included."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 20_000  # files from this size on are kept as the hub keeps large ones: known by their SHA-256


def leave_own_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give hub and store homes of their own in a folder, and forget the user's endpoint, token and proxy."""
    for name in [*os.environ]:
        if name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NORMISTRAL_HOME", str(folder / "home"))
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@dataclass
class LoopbackHub:
    """What it serves, and how it misbehaves.

    Attributes:
        files: contents by name.
        status: HTTP status for every request to the repository, with the hub's error code; None is the normal answer.
        cut: close the connection after this many bytes of a body, this many times; by file name, "" for the listing.
        swapped: bytes that are sent instead of a file's own.
        headers: of every answer about a file, over the right ones; a lie.
        listed: fields of a file's entry in the listing, over the right ones, by file name; a lie.
        redirect: where every request for a file is sent instead.
        requests: "METHOD path range" of everything that was asked.
        headers_seen: of each request.
        exists: whether there is a repository; an upload makes one.
        private: whether others see it.
        token: that may write; None lets nobody.
        sent: SHA-256 and bytes of the large files that were uploaded.
        refused_uploads: how many uploads of large files break off.
        uploads: names of the files in each commit.
    """

    repository: str
    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", COMMIT)
    commit: str = COMMIT
    status: tuple[int, str] | None = None
    cut: dict[str, list[int]] = field(default_factory=dict)
    swapped: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    redirect: str | None = None
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""
    headers_seen: list[dict[str, str]] = field(default_factory=list)
    exists: bool = True
    private: bool = False
    token: str | None = None
    sent: dict[str, bytes] = field(default_factory=dict)
    refused_uploads: int = 0
    uploads: list[list[str]] = field(default_factory=list)

    def asked_for(self, name: str) -> list[str]:
        return [line for line in self.requests if line.startswith("GET ") and f"/{name} " in line]


@contextmanager
def serve(folder: Path | None, repository: str = "norallm/tiny") -> Iterator[LoopbackHub]:
    """Serve the files of a folder as one repository; None is a hub that has none yet."""
    files = [] if folder is None else [path for path in folder.iterdir() if path.is_file()]
    hub = LoopbackHub(repository, {path.name: path.read_bytes() for path in files}, exists=folder is not None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag_of(data: bytes) -> str:
    if len(data) >= LARGE_BYTES:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        self._take_in()

    def do_PUT(self) -> None:
        self._take_in()

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub = self.hub
        self._note()
        if self.path == "/api/whoami-v2":
            known = hub.token is not None and self._is_authorised()
            answer = {"name": hub.repository.partition("/")[0], "orgs": [], "type": "user"}
            return self._send(200 if known else 401, json.dumps(answer).encode(), {}, body)
        plain = re.fullmatch(r"(/api/models/[^/]+/[^/?]+)(\?.*)?", self.path)
        path = f"{plain[1]}/revision/main" if plain else self.path
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^?]+)(\?.*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path)
        match = api or file
        hidden = not hub.exists or (hub.private and not self._is_authorised())
        if match is None or match[1] != hub.repository or hidden:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if hub.status is not None:
            return self._send(hub.status[0], b"{}", {"X-Error-Code": hub.status[1]}, body)
        if match[2] not in hub.revisions:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if api:
            listing = json.dumps(self._listing()).encode()
            return self._send(200, listing, {"Content-Type": "application/json"}, body, hub.cut.get(""))
        assert file is not None
        if file[3] not in hub.files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        return self._send_file(file[3], body)

    def _listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.hub.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if len(data) >= LARGE_BYTES:
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry | self.hub.listed.get(name, {}))
        siblings += [
            {"rfilename": name} | entry for name, entry in self.hub.listed.items() if name not in self.hub.files
        ]
        names = {"id": self.hub.repository, "modelId": self.hub.repository}
        return {**names, "sha": self.hub.commit, "private": self.hub.private, "siblings": siblings}

    def _note(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        self.hub.headers_seen.append(dict(self.headers))

    def _is_authorised(self) -> bool:
        return self.hub.token is not None and self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    # Uploads

    def _take_in(self) -> None:
        hub = self.hub
        self._note()
        raw = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if hub.status is not None:
            return self._send(hub.status[0], b"{}", {"X-Error-Code": hub.status[1]}, True)
        if self.path.startswith("/upload/"):  # a signed address, without a token
            return self._take_in_large(self.path.rpartition("/")[2], raw)
        if self.path == "/api/validate-yaml":
            return self._answer_json({"errors": [], "warnings": []})
        if not self._is_authorised():
            return self._send(401 if "Authorization" not in self.headers else 403, b"{}", {}, True)
        model = f"/api/models/{hub.repository}"
        if self.path == "/api/repos/create":
            asked = json.loads(raw)
            if f"{asked['organization']}/{asked['name']}" != hub.repository:
                return self._send(403, b"{}", {}, True)
            if hub.exists:
                return self._send(409, b"{}", {}, True)
            hub.exists, hub.private = True, bool(asked.get("private"))
            return self._answer_json({"url": f"{hub.endpoint}/{hub.repository}", "name": hub.repository})
        if self.path == f"{model}/preupload/main":
            return self._answer_json({"files": [self._mode(file) for file in json.loads(raw)["files"]]})
        if self.path == f"/{hub.repository}.git/info/lfs/objects/batch":
            objects = [self._instruct(one) for one in json.loads(raw)["objects"]]
            return self._answer_json({"transfer": "basic", "objects": objects})
        if self.path == f"{model}/commit/main":
            return self._commit([json.loads(line) for line in raw.splitlines()])
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, True)

    def _answer_json(self, answer: dict[str, Any]) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, True)

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        data = self.hub.files.get(file["path"])
        mode = "lfs" if file["size"] >= LARGE_BYTES else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": data and etag_of(data)}

    def _instruct(self, one: dict[str, Any]) -> dict[str, Any]:
        known = {hashlib.sha256(data).hexdigest() for data in self.hub.files.values()} | self.hub.sent.keys()
        address = {"href": f"{self.hub.endpoint}/upload/{one['oid']}", "header": {}}
        return one if one["oid"] in known else one | {"actions": {"upload": address}}

    def _take_in_large(self, oid: str, raw: bytes) -> None:
        if self.hub.refused_uploads:
            self.hub.refused_uploads -= 1
            self.close_connection = True
            return
        assert hashlib.sha256(raw).hexdigest() == oid
        self.hub.sent[oid] = raw
        self._send(200, b"", {}, True)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.hub
        if lines[0]["value"].get("parentCommit", hub.commit) != hub.commit:
            return self._send(412, b"{}", {}, True)
        names = []
        for line in lines[1:]:
            value = line["value"]
            names.append(value["path"])
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.sent[value["oid"]]
            else:
                del hub.files[value["path"]]
        hub.uploads.append(names)
        hub.commit = hashlib.sha1(repr(sorted(hub.files.items())).encode()).hexdigest()
        hub.revisions = ("main", hub.commit)
        return self._answer_json(
            {"commitUrl": f"{hub.endpoint}/{hub.repository}/commit/{hub.commit}", "commitOid": hub.commit}
        )

    def _send_file(self, name: str, body: bool) -> None:
        data = self.hub.files[name]
        if self.hub.redirect is not None:
            self._send(302, b"", {"Location": self.hub.redirect, "ETag": f'"{etag_of(data)}"'}, body)
            return
        etag = f'"{etag_of(data)}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
        if len(data) >= LARGE_BYTES:  # the offer to use Xet instead, which leads nowhere here
            headers |= {"X-Xet-Hash": "0" * 64, "Link": f'<{self.hub.endpoint}/api/xet>; rel="xet-auth"'}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        sent = self.hub.swapped.get(name, data) if body else data
        status = 200
        if start is not None:
            status = 206
            headers["Content-Range"] = f"bytes {start[1]}-{len(sent) - 1}/{len(sent)}"
            sent = sent[int(start[1]) :]
        self._send(status, sent, headers | self.hub.headers, body, self.hub.cut.get(name) if body else None)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: list[int] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: cut.pop(0)] if cut else data)
            self.close_connection = self.close_connection or bool(cut is not None)


def use_hub(hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the hub that downloads ask, with a cache of its own."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
