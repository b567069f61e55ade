"""A Hub on 127.0.0.1 with what the real client asks of it: repositories, commits, uploads of large files, downloads.

Its state is in ``Store``, so that a server can stop in the middle of an upload and another one go on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_" + "W" * 34, "hf_" + "R" * 34


@dataclass
class Repo:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, str] = field(default_factory=dict)  # path -> sha256
    commits: list[dict] = field(default_factory=list)  # {"summary", "changed", "deleted"}

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Store:
    """``large_from``: bytes from which a file is uploaded as a large one. ``part``: bytes of a part, or None for one.

    ``xet``: address that the xet client is told to store at (``local://FOLDER`` is its own store on disk).
    ``known``: sha256 of a file -> (its xet hash, its bytes); real servers learn that from the xet store.
    ``fault`` is called with (method, path) of every request; what it returns is the answer: a status, or "die".
    """

    large_from: int = 10_000
    part: int | None = None
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens_seen: set[str] = field(default_factory=set)
    fault: object = None
    xet: str | None = None
    known: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def paths(self, method: str, pattern: str) -> list[str]:
        return [path for m, path in self.requests if m == method and re.search(pattern, path)]


class Hub:
    """The server as a context manager; ``port`` makes a second one take the place of a dead one."""

    def __init__(self, store: Store, port: int = 0):
        self.store = store
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"store": store}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _run(self):
        store, self.path = self.store, unquote(urlsplit(self.path).path)
        store.requests.append((self.command, self.path))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        store.tokens_seen.add(self.token)
        answer = store.fault(self.command, self.path) if store.fault else None
        if answer == "die":
            self.rfile.read(100)
            self.close_connection = True
            self.connection.close()
            threading.Thread(target=self.server.shutdown, daemon=True).start()
            self.server.socket.close()
            return
        self.body = self._read()
        if answer is not None:
            message = f"no ({self.token})"  # a server may well send the token back
            self._json({"error": message}, answer, {"X-Error-Message": message})
            return
        for method, pattern, action in ROUTES:
            if self.command in method and (found := re.fullmatch(pattern, self.path)):
                return action(self, *found.groups())
        self._json({"error": "no such page"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = _run

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _may(self, right: str, repo: Repo | None = None) -> bool:
        """Whether the token may "read" or "write"; answers the request if it may not."""
        if self.token and self.token not in (WRITER, READER):
            error = "Invalid credentials in Authorization header"
            self._json({"error": error}, 401, {"X-Error-Message": error})
        elif right == "read" and (repo is None or (repo.private and self.token != WRITER)):
            self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif right == "write" and self.token != WRITER:
            error = "You don't have the rights to create a model under this namespace"
            self._json({"error": error}, 403, {"X-Error-Message": error})
        else:
            return True
        return False

    @property
    def _endpoint(self) -> str:
        return f"http://{self.headers['Host']}"

    def create(self):
        if not self._may("write"):
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        exists = name in self.store.repos
        if not exists:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.store.repos[name] = Repo(bool(private), {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self._endpoint}/{name}", "name": name}, 409 if exists else 200)

    def info(self, name):
        if not self._may("read", repo := self.store.repos.get(name)):
            return
        siblings = [{"rfilename": path, "size": len(data)} for path, data in repo.files.items()]
        card = re.match(r"---\n(.*?)\n---\n", repo.files.get("README.md", b"").decode(), re.DOTALL)
        data = None
        if card:
            import yaml

            data = yaml.safe_load(card[1])
        config = json.loads(repo.files.get("config.json", b"{}"))
        about = {"library_name": "transformers", "config": config, "downloads": 0, "likes": 0}
        self._json({**about, "id": name, "modelId": name, "sha": repo.sha, "private": repo.private, "tags": [],
                    "siblings": siblings, "cardData": data})  # fmt: skip

    def validate(self):
        import yaml

        text = json.loads(self.body)["content"]
        try:
            data = yaml.safe_load(text.split("---")[1])
            errors = [] if isinstance(data.get("license", ""), str) else [{"message": '"license" must be a string'}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name, _):
        if not self._may("write") or not self._may("read", repo := self.store.repos.get(name)):
            return
        files = []
        for asked in json.loads(self.body)["files"]:
            mode = "lfs" if asked["size"] >= self.store.large_from else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False})
            if (data := repo.files.get(asked["path"])) is not None:
                blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
                files[-1]["oid"] = repo.large.get(asked["path"], blob)
        self._json({"files": files})

    def batch(self, name):
        if not self._may("write") or not self._may("read", self.store.repos.get(name)):
            return
        answer = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer.append({"oid": oid, "size": size})
            if oid in self.store.objects:
                continue
            upload = {"href": f"{self._endpoint}/store/{oid}"}
            if (part := self.store.part) and size > part:
                count = -(-size // part)
                urls = {f"{n:05d}": f"{self._endpoint}/store/{oid}/{n}" for n in range(1, count + 1)}
                upload = {"href": f"{self._endpoint}/complete/{oid}", "header": {"chunk_size": str(part), **urls}}
            verify = {"href": f"{self._endpoint}/{name}.git/info/lfs/objects/verify"}
            answer[-1]["actions"] = {"upload": upload, "verify": verify}
        self._json({"transfer": "basic", "objects": answer})

    def put(self, oid):
        assert not self.token, "a token was sent to the file store"
        self.store.objects[oid] = self.body
        self._send(b"")

    def put_part(self, oid, number):
        assert not self.token, "a token was sent to the file store"
        self.store.parts.setdefault(oid, {})[int(number)] = self.body
        self._send(b"", headers={"ETag": f'"{number}"'})

    def complete(self, oid):
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.store.objects[oid] = b"".join(self.store.parts[oid][number] for number in numbers)
        self._json({})

    def verify(self, _):
        oid = json.loads(self.body)["oid"]
        intact = hashlib.sha256(self.store.objects.get(oid, b"")).hexdigest() == oid
        self._json({}, 200 if intact else 422)

    def commit(self, name, _):
        if not self._may("write") or not self._may("read", repo := self.store.repos.get(name)):
            return
        done = {"summary": "", "changed": [], "deleted": []}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                done["summary"] = value["summary"]
                continue
            path = value["path"]
            if item["key"] == "deletedFile":
                done["deleted"].append(path)
                del repo.files[path]
                continue
            done["changed"].append(path)
            if item["key"] == "lfsFile" and value["oid"] in self.store.known:
                repo.files[path], repo.large[path] = self.store.known[value["oid"]][1], value["oid"]
            elif item["key"] == "lfsFile":
                repo.files[path], repo.large[path] = self.store.objects[value["oid"]], value["oid"]
            else:
                repo.files[path] = base64.b64decode(value["content"])
                repo.large.pop(path, None)
        repo.commits.append(done)
        url = f"{self._endpoint}/{name}/commit/{repo.sha}"
        self._json({"commitUrl": url, "commitOid": repo.sha, "success": True})

    def resolve(self, name, _, path):
        if not self._may("read", repo := self.store.repos.get(name)):
            return
        if (data := repo.files.get(path)) is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": repo.sha}
        if path in repo.large:
            headers |= {"X-Linked-ETag": f'"{repo.large[path]}"', "X-Linked-Size": str(len(data))}
            if repo.large[path] in self.store.known:
                route = f"{self._endpoint}/api/models/{name}/xet-read-token/main"
                headers |= {"X-Xet-Hash": self.store.known[repo.large[path]][0], "X-Xet-Refresh-Route": route}
        self._send(data, headers=headers)

    def xet_token(self, name, right):
        if self._may(right, self.store.repos.get(name)):
            until = int(time.time()) + 3600
            told = {"X-Xet-Cas-Url": self.store.xet, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
            self._json({"casUrl": self.store.xet, "accessToken": "xet", "exp": until}, headers=told)


_NAME = r"([^/]+/[^/]+?)"
ROUTES = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{_NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/([^/]+)", Handler.commit),
    ("GET", f"/api/models/{_NAME}(?:/revision/[^/]+)?", Handler.info),
    ("GET", f"/api/models/{_NAME}/xet-(read|write)-token/[^/]+", Handler.xet_token),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/verify", Handler.verify),
    ("PUT", "/store/([0-9a-f]{64})", Handler.put),
    ("PUT", "/store/([0-9a-f]{64})/([0-9]+)", Handler.put_part),
    ("POST", "/complete/([0-9a-f]{64})", Handler.complete),
    ("GETHEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)
