"""A Hub on this machine: what `huggingface_hub` asks of the real one to push and to fetch, kept in memory.

Accounts and tokens, model and data set repositories (private ones too), branches, pull requests, commits as ndjson,
files in the commit and files by LFS (batch, PUT, verify; no xet), listings, `resolve` with its headers and redirects,
and the Hub's ways to refuse: 401, 403, 404, 409, and whatever `refuse` is told. Every request is counted.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

#: Files of these endings go by LFS, as the Hub's .gitattributes has it; other files do from 10 MB on.
_LFS = (".safetensors", ".parquet", ".npy", ".bin", ".png")
_SPECIAL = {"tokenizer.json"}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclasses.dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return git_oid(pointer.encode() if self.lfs else self.data)


@dataclasses.dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, Blob]


@dataclasses.dataclass
class Repo:
    kind: str
    id: str
    private: bool
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    pulls: int = 0

    def commit(self, ref: str, message: str, files: dict[str, Blob]) -> Commit:
        told = json.dumps([ref, message, len(self.commits), sorted((p, b.oid) for p, b in files.items())])
        made = Commit(hashlib.sha1((self.id + told).encode()).hexdigest(), message, files)
        self.commits[made.sha] = made
        self.refs[ref] = made.sha
        return made

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


@dataclasses.dataclass
class LocalHub:
    """The Hub's state, for tests to look at and to change."""

    endpoint: str = ""
    #: Token -> (account, whether it may write).
    tokens: dict[str, tuple[str, bool]] = dataclasses.field(
        default_factory=lambda: {"hf_me": ("me", True), "hf_me_read": ("me", False), "hf_you": ("you", True)}
    )
    repos: dict[tuple[str, str], Repo] = dataclasses.field(default_factory=dict)
    stored: dict[str, bytes] = dataclasses.field(default_factory=dict)
    requests: list[str] = dataclasses.field(default_factory=list)
    refusals: list[list[Any]] = dataclasses.field(default_factory=list)
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    def refuse(self, request: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer the next requests whose "METHOD /path" matches with this status."""
        self.refusals.append([re.compile(request), status, times, headers])

    def asked(self, request: str) -> int:
        """How many requests so far match."""
        return sum(bool(re.search(request, line)) for line in self.requests)

    def repo(self, id: str, kind: str = "model") -> Repo:
        return self.repos[kind, id]

    def files(self, id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        commit = self.repo(id, kind).at(revision)
        assert commit is not None
        return {path: blob.data for path, blob in commit.files.items()}

    # ---- who asks ----

    def account(self, headers: Any) -> tuple[str | None, bool]:
        given = headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not given:
            return None, False
        if given not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens[given]

    def seen(self, kind: str, id: str, headers: Any) -> Repo:
        """The repository, if who asks may know of it."""
        account, _ = self.account(headers)
        repo = self.repos.get((kind, id))
        if repo is not None and (not repo.private or account == id.split("/")[0]):
            return repo
        if account is None:
            raise Refused(401, "Invalid username or password.")
        raise Refused(404, "Repository not found", "RepoNotFound")

    def writable(self, kind: str, id: str, headers: Any, create_pr: bool = False) -> Repo:
        repo = self.seen(kind, id, headers)
        account, writes = self.account(headers)
        if account is None:
            raise Refused(401, "Invalid username or password.")
        if not writes or (account != id.split("/")[0] and not create_pr):
            raise Refused(403, "You don't have the rights to write to this repository")
        return repo

    def revision(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---- what is asked ----

    def create_repo(self, body: dict[str, Any], headers: Any) -> dict[str, Any]:
        account, writes = self.account(headers)
        if account is None:
            raise Refused(401, "Invalid username or password.")
        owner, kind = body.get("organization") or account, body.get("type") or "model"
        if owner != account or not writes:
            raise Refused(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        id = f"{owner}/{body['name']}"
        url = {"url": f"{self.endpoint}/{'datasets/' if kind == 'dataset' else ''}{id}"}
        if (kind, id) in self.repos:
            raise Refused(409, "You already created this repo", **url)
        repo = self.repos[kind, id] = Repo(kind, id, private=body.get("visibility") == "private")
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return url

    def preupload(self, repo: Repo, revision: str, body: dict[str, Any]) -> dict[str, Any]:
        there = self.revision(repo, revision).files
        files = []
        for file in body["files"]:
            name = file["path"].rpartition("/")[2]
            by_lfs = name.endswith(_LFS) or name in _SPECIAL or file["size"] > 10_000_000
            old = there.get(file["path"])
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if by_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": None if old is None else old.sha256 if old.lfs else old.oid,
                }
            )
        return {"files": files}

    def batch(self, id: str, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        if "basic" not in body["transfers"] or body["hash_algo"] != "sha256":
            raise Refused(400, "This Hub takes basic uploads under sha256")
        prefix = "datasets/" if kind == "dataset" else ""
        objects = []
        for object in body["objects"]:
            found = {"oid": object["oid"], "size": object["size"]}
            if object["oid"] not in self.stored:
                verify = f"{self.endpoint}/{prefix}{id}.git/info/lfs/objects/verify"
                upload = f"{self.endpoint}/lfs-storage/{object['oid']}"
                found["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(found)
        return {"transfer": "basic", "objects": objects}

    def commit(self, repo: Repo, revision: str, lines: list[dict[str, Any]], create_pr: bool) -> dict[str, Any]:
        base = self.revision(repo, revision)
        if not create_pr and revision not in repo.refs:
            raise Refused(400, "A commit goes to a branch")
        files, message = dict(base.files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                data = self.stored.get(value["oid"])
                if data is None or len(data) != value["size"]:
                    raise Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(data, lfs=True)
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refused(400, f"unknown operation {line['key']}")
        prefix = f"{self.endpoint}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.id}"
        ref, pull = revision, None
        if create_pr:
            repo.pulls += 1
            ref, pull = f"refs/pr/{repo.pulls}", f"{prefix}/discussions/{repo.pulls}"
        made = repo.commit(ref, message, files)
        told = {"success": True, "commitOid": made.sha, "commitUrl": f"{prefix}/commit/{made.sha}"}
        return told | ({"pullRequestUrl": pull} if pull else {})

    def info(self, repo: Repo, revision: str) -> dict[str, Any]:
        commit = self.revision(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        told = {"_id": "0", "id": repo.id, "sha": commit.sha, "private": repo.private, "siblings": siblings}
        return told | {"tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False}

    def tree(self, repo: Repo, revision: str, folder: str) -> list[dict[str, Any]]:
        files = self.revision(repo, revision).files
        listed: list[dict[str, Any]] = []
        for path, blob in sorted(files.items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
            listed.append(entry)
        return listed

    def list_refs(self, repo: Repo) -> dict[str, Any]:
        def told(prefix: str, names: list[str]) -> list[dict[str, str]]:
            return [{"name": n.removeprefix("refs/"), "ref": prefix + n, "targetCommit": repo.refs[n]} for n in names]

        pulls = [name for name in repo.refs if name.startswith("refs/pr/")]
        branches = [name for name in repo.refs if name not in pulls]
        return {"branches": told("refs/heads/", branches), "converts": [], "tags": [], "pullRequests": told("", pulls)}


_REPO = r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+/[^/]+)"
_GIT = r"/(?P<data>datasets/)?(?P<id>[^/]+/[^/]+)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        line = f"{self.command} {parts.path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            try:
                for refusal in self.hub.refusals:
                    if refusal[2] > 0 and refusal[0].search(line):
                        refusal[2] -= 1
                        raise Refused(refusal[1], "refused", **{k.replace("_", "-"): v for k, v in refusal[3].items()})
                self._route(line, body)
            except Refused as refused:
                told = {"error": str(refused)}
                if refused.status == 409:
                    told |= refused.headers
                headers = {"X-Error-Message": str(refused)} | (refused.headers if refused.status != 409 else {})
                if refused.code:
                    headers["X-Error-Code"] = refused.code
                self._send(refused.status, json.dumps(told).encode(), headers)
        status, data, headers = self.reply
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.reply = status, data, headers or {}  # sent once the state is free for others

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _route(self, line: str, body: bytes) -> None:
        hub, pull = self.hub, self.query.get("create_pr") == "1"

        def match(pattern: str) -> re.Match[str] | None:
            return re.fullmatch(pattern, line)

        if match("GET /api/whoami-v2"):
            account, _ = hub.account(self.headers)
            if account is None:
                raise Refused(401, "Invalid username or password.")
            self._json({"type": "user", "name": account, "orgs": [], "auth": {"type": "access_token"}})
        elif match("POST /api/repos/create"):
            self._json(hub.create_repo(json.loads(body), self.headers))
        elif match("POST /api/validate-yaml"):
            self._json(_validated(json.loads(body)["content"]))
        elif m := match(f"POST {_REPO}/preupload/(?P<rev>[^/]+)"):
            repo = hub.writable(m["kind"], m["id"], self.headers, pull)
            self._json(hub.preupload(repo, unquote(m["rev"]), json.loads(body)))
        elif m := match(f"POST {_REPO}/commit/(?P<rev>[^/]+)"):
            if self.headers["Content-Type"] != "application/x-ndjson":
                raise Refused(400, "a commit is ndjson")
            repo = hub.writable(m["kind"], m["id"], self.headers, pull)
            lines = [json.loads(row) for row in body.splitlines() if row.strip()]
            self._json(hub.commit(repo, unquote(m["rev"]), lines, pull))
        elif m := match(f"POST {_REPO}/branch/(?P<rev>[^/]+)"):
            repo = hub.writable(m["kind"], m["id"], self.headers)
            if unquote(m["rev"]) in repo.refs:
                raise Refused(409, "Reference already exists")
            repo.refs[unquote(m["rev"])] = repo.refs["main"]
            self._json({})
        elif m := match(rf"POST {_GIT}\.git/info/lfs/objects/batch"):
            kind = "dataset" if m["data"] else "model"
            hub.writable(kind, m["id"], self.headers, create_pr=True)
            self._json(hub.batch(m["id"], kind, json.loads(body)))
        elif m := match(rf"POST {_GIT}\.git/info/lfs/objects/verify"):
            asked = json.loads(body)
            if len(hub.stored.get(asked["oid"], b"")) != asked["size"]:
                raise Refused(404, "no such object")
            self._json({})
        elif m := match(r"PUT /lfs-storage/(?P<oid>\w+)"):
            if hashlib.sha256(body).hexdigest() != m["oid"]:
                raise Refused(400, "the content has another hash")
            hub.stored[m["oid"]] = body
            self._send(200)
        elif m := match(r"(GET|HEAD) /lfs-storage/(?P<oid>\w+)"):
            self._file(hub.stored[m["oid"]], {"ETag": f'"{m["oid"]}"'})
        elif m := match(f"GET {_REPO}/refs"):
            self._json(hub.list_refs(hub.seen(m["kind"], m["id"], self.headers)))
        elif m := match(f"GET {_REPO}/tree/(?P<rev>[^/]+)(/(?P<path>.+))?"):
            repo = hub.seen(m["kind"], m["id"], self.headers)
            self._json(hub.tree(repo, unquote(m["rev"]), unquote(m["path"] or "")))
        elif m := match(f"GET {_REPO}(/revision/(?P<rev>[^/]+))?"):
            self._json(hub.info(hub.seen(m["kind"], m["id"], self.headers), unquote(m["rev"] or "main")))
        elif m := match(f"(GET|HEAD) {_GIT}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"):
            self._resolve("dataset" if m["data"] else "model", m["id"], unquote(m["rev"]), unquote(m["path"]))
        else:
            raise Refused(404, f"this Hub has no {line}")

    def _resolve(self, kind: str, id: str, revision: str, path: str) -> None:
        commit = self.hub.revision(self.hub.seen(kind, id, self.headers), revision)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        if not blob.lfs:
            self._file(blob.data, headers | {"ETag": f'"{blob.oid}"'})
            return
        headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        # On another host, as the Hub's is: the client takes the headers of this answer, and not of that one.
        storage = self.hub.endpoint.replace("127.0.0.1", "localhost")
        self._send(302, b"", headers | {"Location": f"{storage}/lfs-storage/{blob.sha256}"})

    def _file(self, data: bytes, headers: dict[str, str]) -> None:
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            begin, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers |= {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
            status, data = 206, data[begin : end + 1]
        self._send(status, data, headers)


def _validated(card: str) -> dict[str, Any]:
    """What the Hub says of a card's metadata: here, that the client's own parser reads it."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(card)
    except Exception as error:
        raise Refused(400, f"invalid metadata: {error}") from error
    return {"errors": [], "warnings": []}


@contextlib.contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    """The Hub, answering at `hub.endpoint`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def used_here(hub: LocalHub, cache: Any, *, offline: bool = False) -> Iterator[None]:
    """This process takes `hub` for the Hub, as HF_ENDPOINT would have it from the start."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session
    from transformers.utils import hub as of_transformers

    with pytest.MonkeyPatch.context() as patch:
        # its shared client keeps the endpoint of the day it was made
        patch.setattr(of_transformers, "_hf_api", None)
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache) + "-token")
        patch.delenv("HF_TOKEN", raising=False)
        close_session()
        try:
            yield
        finally:
            close_session()


@pytest.fixture(scope="session")
def served():
    with serving(LocalHub()) as hub:
        yield hub


@pytest.fixture
def hub(served, tmp_path):
    """An empty Hub, and an empty cache."""
    served.repos.clear()
    served.stored.clear()
    served.requests.clear()
    served.refusals.clear()
    with used_here(served, tmp_path / "cache"):
        yield served
