"""A small Hugging Face Hub on the loopback interface, for models: repositories, commits, branches, large files, tokens.

    with Hub(tokens={"hf_secret": "me"}) as hub:
        script.run(..., env=hub.environment(token="hf_secret"))
        hub.files("me/model")

Clients are processes of their own, because huggingface_hub reads its endpoint when it is imported.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import Commit, File, Refused, Repo

LARGE = 1 << 20


class Hub:
    """The server and what it stores.

    Attributes:
        tokens: token to user name.
        requests: (method, name of the route) of every request so far.
        hold_large: a large file whose upload begins while this is set waits until it is cleared; tests interrupt there.
        held: set when an upload waits.
        together: commits wait here for one another, once.
        drops: so many more downloads of safetensors files break off half way.
    """

    def __init__(self, tokens: dict[str, str] | None = None) -> None:
        self.tokens = tokens or {}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.hold_large: Callable[[bytes], bool] | None = None
        self.held, self.release = threading.Event(), threading.Event()
        self.together: threading.Barrier | None = None
        self.drops = 0
        self.lock = threading.RLock()
        self.changed = threading.Condition()
        self._port = 0

    def __enter__(self) -> "Hub":
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._port = self._server.server_port
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens at the hub's address inside the context."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def environment(self, cache: object, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Environment of a client process; `cache` is its Hub home."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repo: str, revision: str | None = None) -> dict[str, bytes]:
        """Files of a repository's branch."""
        commit = self.repos[repo].at(revision)
        assert commit is not None
        return {path: file.data for path, file in commit.files.items()}

    def count(self, route: str) -> int:
        """How often a route was asked for."""
        return sum(name == route for _, name in self.requests)

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; False where it does not within half a minute."""
        with self.changed:
            return self.changed.wait_for(condition, 30)

    def commit(self, name: str, branch: str, files: dict[str, File], message: str) -> Commit:
        """Add a commit to a branch."""
        repo = self.repos[name]
        number = sum(map(len, repo.branches.values()))
        made = Commit(hashlib.sha1(f"{name}{branch}{number}".encode()).hexdigest(), files, message)
        repo.branches.setdefault(branch, []).append(made)
        return made


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def answer(self) -> None:
        """Find the route of a request and answer it."""
        self.body = self._read_body()
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        try:
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in method:
                    self.hub.requests.append((self.command, function.__name__))
                    self.user = self._user()
                    function(
                        self, **{key: unquote(value) if value else value for key, value in match.groupdict().items()}
                    )
                    return
            self.hub.requests.append((self.command, f"unknown {self.path}"))
            raise Refused(404, "EntryNotFound")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
            self.reply({"error": str(refused)}, status=refused.status, headers=headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def reply(self, value: Any = None, *, status: int = 200, data: bytes | None = None, headers: Any = None) -> None:
        """Send JSON or bytes."""
        body = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        kind = {"Content-Type": "application/json" if data is None else "application/octet-stream"}
        for name, text in {**kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def break_off(self, data: bytes, file: str) -> bytes:
        """What of a file's bytes is sent before the connection breaks; all of them if none is to break."""
        if self.command == "HEAD" or not file.endswith(".safetensors") or self.hub.drops <= 0:
            return data
        self.hub.drops -= 1
        self.hub.requests.append((self.command, f"broken {file}"))
        self.close_connection = True
        return data[: len(data) // 2]

    def repo(self, name: str, *, write: bool = False) -> Repo:
        """A repository that the asking user may see, and write to."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.user != found.owner):
            # Like the real Hub, which does not tell strangers what exists.
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != found.owner:
            raise Refused(403 if self.user else 401, "Forbidden", "no right to write here")
        return found

    def commit(self, name: str, revision: str | None) -> Commit:
        """A commit of a visible repository."""
        found = self.repo(name).at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.tokens:
            raise Refused(401, "", "Invalid username or password.")
        return self.hub.tokens.get(token)

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()


# --- routes ----------------------------------------------------------------------------------------------------------


def whoami(h: _Handler) -> None:
    if h.user is None:
        raise Refused(401, "", "Invalid username or password.")
    h.reply({"type": "user", "name": h.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def create(h: _Handler) -> None:
    wanted = json.loads(h.body)
    if h.user is None:
        raise Refused(401, "", "Invalid username or password.")
    owner = wanted.get("organization") or h.user
    if owner != h.user:
        raise Refused(403, "Forbidden", f"You don't have the rights to create a model under the namespace {owner!r}")
    name = f"{owner}/{wanted['name']}"
    with h.hub.lock:
        exists = name in h.hub.repos
        if not exists:
            h.hub.repos[name] = Repo(owner, wanted.get("visibility") == "private" or bool(wanted.get("private")))
            h.hub.commit(name, "main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
    h.reply({"url": f"{h.hub.url}/{name}", "name": name, "id": name}, status=409 if exists else 200)


def validate_yaml(h: _Handler) -> None:
    asked = json.loads(h.body)
    errors = []
    try:
        block = re.match(r"---\n(.*?)\n---", asked["content"], re.DOTALL)
        card = yaml.safe_load(block[1]) if block else {}
        relation = card.get("base_model_relation")
        if relation not in (None, "quantized", "finetune", "adapter", "merge"):
            errors.append({"message": f'"base_model_relation" is {relation!r}'})
        if card.get("base_model") is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", card["base_model"]):
            errors.append({"message": '"base_model" is not a repository id'})
        if card.get("license") == "other" and not re.fullmatch(r"[a-z0-9.-]+", str(card.get("license_name"))):
            errors.append({"message": '"license_name" must name the other licence'})
        wrong = [key for key in ("tags", "datasets") if not isinstance(card.get(key, []), list)]
        errors += [{"message": f'"{key}" must be an array'} for key in wrong]
    except yaml.YAMLError as error:
        errors.append({"message": str(error)})
    h.reply({"errors": errors, "warnings": []}, status=400 if errors else 200)


def preupload(h: _Handler, repo: str, revision: str) -> None:
    found = h.repo(repo, write=True).at(revision)
    if found is None and not revision.startswith("refs/pr/"):
        raise Refused(404, "RevisionNotFound")
    here = found.files if found else {}

    def mode(asked: dict[str, Any]) -> str:
        return "lfs" if asked["path"].endswith((".safetensors", ".png")) or asked["size"] > LARGE else "regular"

    files = [
        {
            "path": f["path"],
            "uploadMode": mode(f),
            "shouldIgnore": False,
            "oid": here[f["path"]].oid if f["path"] in here else None,
        }
        for f in json.loads(h.body)["files"]
    ]
    h.reply({"files": files})


def large_batch(h: _Handler, repo: str) -> None:
    h.repo(repo, write=True)
    objects = []
    for wanted in json.loads(h.body)["objects"]:
        link = {"upload": {"href": f"{h.hub.url}/large/{wanted['oid']}"}}
        actions = {} if wanted["oid"] in h.hub.large else {"actions": link}
        objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
    h.reply({"transfer": "basic", "objects": objects})


def large_put(h: _Handler, oid: str) -> None:
    if h.hub.hold_large is not None and h.hub.hold_large(h.body):
        h.hub.held.set()
        h.hub.release.wait(60)
        h.close_connection = True
        raise ConnectionResetError
    if hashlib.sha256(h.body).hexdigest() != oid:
        raise Refused(400, "BadHash")
    with h.hub.changed:
        h.hub.large[oid] = h.body
        h.hub.changed.notify_all()
    h.reply({})


def commit(h: _Handler, repo: str, revision: str) -> None:
    if h.hub.together is not None:
        h.hub.together.wait()
        h.hub.together = None
    with h.hub.lock:
        found = h.repo(repo, write=True)
        start = h.commit(repo, revision)
        files, message = dict(start.files), ""
        for line in h.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, start.sha):
                    raise Refused(412, "PreconditionFailed", "A commit has happened since.")
            elif kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if value["oid"] not in h.hub.large:
                    raise Refused(400, "LfsObjectNotFound", f"{value['path']} was not uploaded")
                files[value["path"]] = File(h.hub.large[value["oid"]], True)
            elif kind == "deletedFile":
                files.pop(value["path"], None)
        request = h.query.get("create_pr") == "1"
        number = sum(name.startswith("refs/pr/") for name in found.branches) + 1
        made = h.hub.commit(repo, f"refs/pr/{number}" if request else revision, files, message)
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{h.hub.url}/{repo}/commit/{made.sha}"}
    h.reply(answer | ({"pullRequestUrl": f"{h.hub.url}/{repo}/discussions/{number}"} if request else {}))


def branch(h: _Handler, repo: str, revision: str) -> None:
    found = h.repo(repo, write=True)
    if revision in found.branches:
        raise Refused(409, "", "Reference already exists")
    found.branches[revision] = list(found.branches["main"])
    h.reply({})


def info(h: _Handler, repo: str, revision: str | None = None) -> None:
    found = h.commit(repo, revision)
    h.reply(_describe(h.hub, repo, found))


def _describe(hub: Hub, name: str, found: Commit) -> dict[str, Any]:
    text = found.files["README.md"].data.decode() if "README.md" in found.files else ""
    block = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    card = yaml.safe_load(block[1]) if block else {}
    date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    return {
        "_id": name,
        "id": name,
        "modelId": name,
        "sha": found.sha,
        "private": hub.repos[name].private,
        "tags": card.get("tags", []),
        "cardData": card,
        "downloads": 7,
        "likes": 0,
        "siblings": [{"rfilename": path} for path in found.files],
        "createdAt": date,
        "lastModified": date,
    }


def models(h: _Handler) -> None:
    with h.hub.lock:
        seen = [
            _describe(h.hub, name, repo.branches["main"][-1])
            for name, repo in h.hub.repos.items()
            if not repo.private or repo.owner == h.user
        ]
    author, tag, limit = h.query.get("author"), h.query.get("filter"), int(h.query.get("limit", 1000))
    found = [m for m in seen if author in (None, m["id"].split("/")[0]) and (tag is None or tag in m["tags"])]
    h.reply(found[:limit])


def tree(h: _Handler, repo: str, revision: str, under: str | None = None) -> None:
    files = h.commit(repo, revision).files
    rows = []
    for path, file in files.items():
        if under and not path.startswith(f"{under}/"):
            continue
        size = {"size": len(file.data)}
        large = {"lfs": {"oid": file.sha256, "pointerSize": 130, **size}} if file.large else {}
        rows.append({"type": "file", "path": path, "oid": file.git_oid, **size, **large})
    h.reply(rows)


def resolve(h: _Handler, repo: str, revision: str, file: str) -> None:
    found = h.commit(repo, revision)
    if file not in found.files:
        raise Refused(404, "EntryNotFound")
    stored = found.files[file]
    headers = {"ETag": f'"{stored.oid}"', "X-Repo-Commit": found.sha, "Accept-Ranges": "bytes"}
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range") or "")
    if part is None:
        h.hub.requests.append((h.command, f"bytes {file} {len(stored.data)}"))
        size = str(len(stored.data))
        h.reply(data=h.break_off(stored.data, file), headers=headers | {"X-Linked-Size": size, "Content-Length": size})
        return
    first, last = int(part[1]), min(int(part[2] or len(stored.data)), len(stored.data) - 1)
    piece = stored.data[first : last + 1]
    h.hub.requests.append((h.command, f"bytes {file} {len(piece)}"))
    place = {"Content-Range": f"bytes {first}-{last}/{len(stored.data)}", "Content-Length": str(len(piece))}
    h.reply(data=h.break_off(piece, file), status=206, headers=headers | place)


REPO, REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), r"/api/whoami-v2", whoami),
    (("POST",), r"/api/repos/create", create),
    (("POST",), r"/api/validate-yaml", validate_yaml),
    (("GET",), r"/api/models", models),
    (("POST",), rf"/api/models/{REPO}/preupload/{REV}", preupload),
    (("POST",), rf"/api/models/{REPO}/commit/{REV}", commit),
    (("POST",), rf"/api/models/{REPO}/branch/{REV}", branch),
    (("GET",), rf"/api/models/{REPO}/tree/{REV}(?:/(?P<under>.+))?", tree),
    (("GET", "HEAD"), rf"/api/models/{REPO}(?:/revision/{REV})?", info),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", large_batch),
    (("PUT",), r"/large/(?P<oid>[0-9a-f]{64})", large_put),
    (("GET", "HEAD"), rf"/{REPO}/resolve/{REV}/(?P<file>.+)", resolve),
]
