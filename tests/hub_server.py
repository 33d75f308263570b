"""A Hub on this machine: as much of its HTTP interface as pushing and loading models takes, repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import card_rules

GATED = "tester/gated"


class Hub(ThreadingHTTPServer):
    """`commits[repo]` is the list of (commit id, {path: content}) of a repository, the newest last.

    `served`: the names of the files that were asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.served: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str) -> dict[str, bytes]:
        return self.commits[repo][-1][1]

    def commit(self, repo: str, changes: dict[str, bytes | None]) -> str:
        history = self.commits.setdefault(repo, [])
        files = dict(history[-1][1]) if history else {}
        files = {path: content for path, content in (files | changes).items() if content is not None}
        name = _digest(f"{repo}{len(history)}".encode())
        history.append((name, files))
        return name


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    # ---------------------------------------------------------------- routes

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return self._json(
                {"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            )
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", self._tree),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if found := re.fullmatch(pattern, path):
                return self._of_repository(answer, *found.groups())
        return self._error(HTTPStatus.NOT_FOUND, "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self.path.split("?")[0], self._body()
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            status = HTTPStatus.CONFLICT if repo in self.server.commits else HTTPStatus.OK
            if status == HTTPStatus.OK:
                self.server.commit(repo, {})
            return self._json({"url": f"{self.server.url}/{repo}", "id": repo, "name": repo}, status)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            return self._commit(found[1], body)
        return self._error(HTTPStatus.NOT_FOUND, "EntryNotFound")

    # ---------------------------------------------------------------- answers

    def _validate(self, card: dict) -> None:
        wrong, doubtful = card_rules.errors(card["content"]), card_rules.warnings(card["content"])
        found = {"errors": [{"message": m} for m in wrong], "warnings": [{"message": m} for m in doubtful]}
        self._json(found, HTTPStatus.BAD_REQUEST if wrong else HTTPStatus.OK)

    def _of_repository(self, answer, repo: str, revision: str | None, *rest: str) -> None:
        if repo == GATED:
            return self._error(HTTPStatus.FORBIDDEN, "GatedRepo")
        if repo not in self.server.commits:
            return self._error(HTTPStatus.NOT_FOUND, "RepoNotFound")
        history = dict(self.server.commits[repo])
        name = self.server.commits[repo][-1][0] if revision in ("main", None) else revision
        if name not in history:
            return self._error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return answer(repo, name, history[name], *rest)

    def _tree(self, repo: str, commit: str, files: dict[str, bytes]) -> None:
        entry = lambda p, c: {"type": "file", "path": p, "size": len(c), "oid": _digest(c)}  # noqa: E731
        self._json([entry(*file) for file in files.items()])

    def _info(self, repo: str, commit: str, files: dict[str, bytes]) -> None:
        flags = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        names = [{"rfilename": path} for path in files]
        self._json({"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": names} | flags)

    def _file(self, repo: str, commit: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._error(HTTPStatus.NOT_FOUND, "EntryNotFound", **{"X-Repo-Commit": commit})
        self.server.served.append(path)
        headers = {"ETag": f'"{_digest(files[path])}"', "X-Repo-Commit": commit}
        return self._send(files[path], HTTPStatus.OK, **headers)

    def _commit(self, repo: str, body: bytes) -> None:
        changes = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                changes[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                changes[line["value"]["path"]] = None
        name = self.server.commit(repo, changes)
        url = f"{self.server.url}/{repo}/commit/{name}"
        self._json({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None})

    # ---------------------------------------------------------------- HTTP

    def _body(self) -> bytes:
        if not self.headers.get("Transfer-Encoding"):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode(), status, **{"Content-Type": "application/json"})

    def _error(self, status: HTTPStatus, code: str, **headers: str) -> None:
        self._send(b"{}", status, **{"X-Error-Code": code, "X-Error-Message": code} | headers)

    def _send(self, body: bytes, status: HTTPStatus, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
