"""A Hub inside the test, and Python processes that talk to it.

`FakeHub` answers what huggingface_hub asks of huggingface.co: looking at, downloading, creating and committing to
model repositories. It logs every request. `Worker` is a fresh Python process that runs the functions it is sent: which
Hub to use is fixed when huggingface_hub is imported, and a process without our package is the only proof of working
without it.
"""

import base64
import hashlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """Revision names to commits, commits to files. With a `token`, the repository is private; `gated`, closed."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files: Files, revision: str = "main") -> None:
        parts = [part for path in sorted(files) for part in (path.encode(), files[path])]
        sha = hashlib.sha1(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[revision] = sha


class FakeHub:
    """Use it as a context manager; `url` is its HF_ENDPOINT."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, token
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_folder(self, repo_id: str, folder: Path, *, revision: str = "main", token: str | None = None) -> None:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        repository = self.repositories.setdefault(repo_id, Repository(token=token))
        repository.commit(files, revision)

    def files(self, repo_id: str) -> Files:
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches["main"]]

    def requested_files(self, repo_id: str) -> set[str]:
        """The files of the repository that anybody downloaded or asked about."""
        prefix = f"/{repo_id}/resolve/"
        return {path[len(prefix) :].split("/", 1)[1] for _, path, _ in self.requests if path.startswith(prefix)}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._log()
        parts = self.path_parts
        if parts[:2] == ["api", "models"]:
            repo_id, action = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision"
            revision = parts[5] if len(parts) > 5 else "main"
        elif len(parts) > 4 and parts[2] == "resolve":
            repo_id, action, revision = "/".join(parts[:2]), "resolve", parts[3]
        else:
            return self._refuse(f"no such page: {self.path}")
        repository = self.hub.repositories.get(repo_id)
        if repository is None or repository.token not in (None, self.token):
            return self._refuse("Repository not found", "RepoNotFound")
        if repository.gated:
            return self._refuse("Access to this model is restricted", "GatedRepo")
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return self._refuse(f"Invalid rev id: {revision}", "RevisionNotFound")
        files = repository.commits[sha]
        if action == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self._answer({"id": repo_id, "sha": sha, "private": False, "tags": [], "siblings": siblings})
        if action == "tree":
            entries = [{"type": "file", "path": p, "size": len(f), "oid": _etag(f)} for p, f in files.items()]
            return self._answer(entries)
        path = "/".join(parts[4:])
        if path not in files:
            return self._refuse("Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        return self._send(200, files[path], {"ETag": f'"{_etag(files[path])}"', "X-Repo-Commit": sha})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._log()
        body = self._body()
        parts = self.path_parts
        if parts == ["api", "repos", "create"]:
            request = json.loads(body)
            repo_id = f"{request['organization']}/{request['name']}"
            if repo_id not in self.hub.repositories:
                self.hub.repositories[repo_id] = Repository()
                self.hub.repositories[repo_id].commit({})
            return self._answer({"url": f"{self.hub.url}/{repo_id}", "id": repo_id})
        if parts == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        repo_id, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            asked = json.loads(body)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self._answer({"files": files})
        if action == "commit":
            repository = self.hub.repositories[repo_id]
            files = dict(repository.commits.get(repository.branches["main"], {}))
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repository.commit(files)
            sha = repository.branches["main"]
            return self._answer({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})
        return self._refuse(f"no such page: {self.path}")

    def _log(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.path_parts = path.strip("/").split("/")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, path, self.token))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass  # the log is `FakeHub.requests`


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class WorkerError(Exception):
    """What a function raised in a worker: its type's name and message."""


def hub_environment(hub_url: str, folder: Path) -> dict[str, str]:
    """This process's environment, with another Hub and an empty Hugging Face home in `folder`."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.lower().endswith("_proxy") and not key.startswith(("HF_", "HUGGING_FACE"))
    }
    return environment | {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }


class Worker:
    """A Python process in `folder`, with an empty Hugging Face home there and `hub_url` as its Hub.

    With `without_package`, importing gap_diff_diffusers fails in it, as where it is not installed.
    """

    def __init__(self, folder: Path, hub_url: str, *, without_package: bool = False):
        folder.mkdir()
        environment = hub_environment(hub_url, folder)
        self._stderr = folder / "stderr.txt"
        with self._stderr.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, "without" if without_package else "with"],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def run(self, function: Callable, *args: Any) -> Any:
        """Run a function there: one that stands on its own, imports included, with arguments and result as in JSON.

        Raises:
            WorkerError: the function raised.
        """
        source = textwrap.dedent(inspect.getsource(function))
        request = {
            "source": source,
            "name": function.__name__,
            "args": [str(a) if isinstance(a, Path) else a for a in args],
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker died:\n{self._stderr.read_text()}")
        answer = json.loads(answer)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    @property
    def log(self) -> str:
        """What was written to standard error so far."""
        return self._stderr.read_text()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


_WORKER = """
import json, sys, traceback

answers, sys.stdout = sys.stdout, sys.stderr

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gap_diff_diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if sys.argv[1] == "without":
    sys.meta_path.insert(0, Blocker())
import diffusers.pipelines, torch  # while the other worker and the tests start
for line in sys.stdin:
    request = json.loads(line)
    namespace = {}
    try:
        exec(request["source"], namespace)
        answer = {"result": namespace[request["name"]](*request["args"])}
    except Exception as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
"""
