"""A local server that speaks the part of the Hugging Face hub's API that models need.

Large files go through Git LFS (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md),
others into the commit itself, as huggingface_hub's client asks for without its Xet storage.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

LARGE = (".safetensors",)


class HubServer(http.server.ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repos: by name: {"private": bool, "files": {path: bytes}, "commits": [summary]}.
        seen: (method, path) of each request.
        token: what `Authorization` must carry; None lets everybody in.
        fail: paths (regular expressions) that are answered with a status, by the expression.
        cut: paths whose content breaks off in the middle, each once.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.blobs, self.seen = {}, {}, []
        self.token, self.fail, self.cut = None, {}, set()

    def handle_error(self, request, client_address):
        pass  # clients that hang up

    def environment(self, folder):
        """The variables by which a process finds this server."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

    def sha(self, repo):
        files = self.repos[repo]["files"]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.path = urllib.parse.unquote(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._read_chunks()
        self.server.seen.append((self.command, self.path))
        for pattern, status in self.server.fail.items():
            if re.search(pattern, self.path):
                return self._reply(status, {"error": "asked to fail"})
        # The address of an upload is signed; the client sends no token there.
        wanted = None if self.path.startswith("/lfs/") else self.server.token
        if wanted and self.headers.get("Authorization") != f"Bearer {wanted}":
            return self._reply(401, {"error": "Invalid credentials in Authorization header"})
        for pattern, answer in self.ROUTES.items():
            match = re.fullmatch(pattern, self.path.partition("?")[0])
            if match:
                return answer(self, body, *match.groups())
        return self._reply(404, {"error": f"no route {self.path}"})

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, status, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _repo(self, name):
        if name not in self.server.repos:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._reply(404, {"error": "Repository not found"}, **headers)
        return self.server.repos.get(name)

    # --- reading

    def info(self, body, repo, revision="main"):
        if self._repo(repo):
            sha = self.server.sha(repo)
            if revision not in ("main", sha):
                return self._reply(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in self.server.repos[repo]["files"]]
            self._reply(200, {"id": repo, "sha": sha, "siblings": siblings, "private": False})

    def tree(self, body, repo, revision):
        if self._repo(repo):
            self._reply(200, [
                {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
                for path, content in self.server.repos[repo]["files"].items()
            ])  # fmt: skip

    def resolve(self, body, repo, revision, path):
        found = self._repo(repo)
        if not found:
            return
        sha = self.server.sha(repo)
        if revision not in ("main", sha):
            return self._reply(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        if path not in found["files"]:
            return self._reply(
                404, {"error": "no"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha
            )
        content = found["files"][path]
        headers = {"ETag": f'"{oid(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        status = 206 if start else 200
        if start:
            size, first = len(content), int(start[1])
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
            content = content[first:]
        if self.command == "GET" and path in self.server.cut:
            self.server.cut.discard(path)
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return self._reply(status, content, **headers)

    # --- writing

    def create(self, body):
        wanted = json.loads(body)
        name = "/".join(filter(None, [wanted.get("organization"), wanted["name"]]))
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            return self._reply(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repos[name] = {"private": bool(private), "files": {}, "commits": []}
        return self._reply(200, {"url": url, "name": name})

    def validate(self, body):
        self._reply(200, {"warnings": [], "errors": []})

    def preupload(self, body, repo, revision):
        if self._repo(repo):
            files = [
                {
                    "path": file["path"], "shouldIgnore": False, "oid": None,
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                }
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            self._reply(200, {"files": files})

    def batch(self, body, repo):
        if self._repo(repo):
            objects = [
                {
                    "oid": item["oid"], "size": item["size"],
                    "actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}},
                }
                for item in json.loads(body)["objects"]
            ]  # fmt: skip
            self._reply(200, {"transfer": "basic", "objects": objects})

    def put(self, body, name):
        assert hashlib.sha256(body).hexdigest() == name
        self.server.blobs[name] = body
        self._reply(200, b"")

    def commit(self, body, repo, revision):
        found = self._repo(repo)
        if not found:
            return
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                found["commits"].append(value["summary"])
            elif key == "file":
                found["files"][value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                found["files"][value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del found["files"][value["path"]]
        url = f"{self.server.url}/{repo}/commit/{self.server.sha(repo)}"
        self._reply(200, {"commitUrl": url, "commitOid": self.server.sha(repo), "success": True})

    ROUTES = {
        r"/api/repos/create": create,
        r"/api/validate-yaml": validate,
        r"/api/models/(.+)/preupload/(.+)": preupload,
        r"/(.+)\.git/info/lfs/objects/batch": batch,
        r"/lfs/(\w+)": put,
        r"/api/models/(.+)/commit/(.+)": commit,
        r"/api/models/(.+)/tree/([^/]+)(?:/.*)?": tree,
        r"/api/models/(.+)/revision/(.+)": info,
        r"/api/models/(.+)": info,
        r"/(.+)/resolve/([^/]+)/(.+)": resolve,
    }


def oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve():
    """A running server; stopped at the end."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
