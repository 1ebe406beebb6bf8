"""A web server on loopback that does what lines, mirrors and hubs do to a download: it cuts, lies about lengths, sends
wrong bytes, changes the file meanwhile, redirects, stalls. It speaks Hugging Face's and ModelScope's addresses too.

with FaultyServer({"a/b/file.jsonl": data}) as server:
    server.plan = [Cut(1000), Plain()]          # what happens to the first, the second, ... request for a file
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Reply:
    """How one request for a file is answered; the last of the plan answers all that follow."""

    status: int | None = None  # an error instead of the file
    headers: dict = field(default_factory=dict)
    cut: int | None = None  # after so many bytes of the body the line is cut
    stall: bool = False  # or, there, nothing more comes
    length: int | None = None  # announced instead of the right one
    no_length: bool = False  # chunks instead
    ranges: bool = True  # False: the whole file for every request
    if_range: bool = True  # False: a part of whatever the file is now
    etag: bool = True
    wrong: bool = False  # other bytes than the listing speaks of


class FaultyServer:
    def __init__(self, files: dict[str, bytes]):
        self.files, self.plan, self.requests = dict(files), [Reply()], []
        self.token: str | None = None  # without it, 401
        self.listed: dict[str, dict] = {}  # what the listing says instead of the truth, by path
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that was killed
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.other_host = f"http://localhost:{self.http.server_port}"

    def __enter__(self) -> "FaultyServer":
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def ranges(self) -> list[str | None]:
        """Those that were asked for, one for each request for a file."""
        return [headers.get("Range") for path, headers in self.requests if "/api/" not in path or "FilePath" in path]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        parts, headers = urlsplit(handler.path), dict(handler.headers)
        self.requests.append((handler.path, headers))
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            if not parts.path.startswith("/cdn/"):
                return self.send(handler, 401, b"")
        if parts.path.startswith("/hop/"):  # to another host, as hubs do
            return self.send(handler, 302, b"", {"Location": f"{self.other_host}/cdn/{parts.path[5:]}"})
        if parts.path.startswith("/api/"):
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            if "FilePath" in query:
                return self.send_file(handler, query["FilePath"])
            return self.send_listing(handler, parts.path, query)
        path = unquote(parts.path).lstrip("/").removeprefix("cdn/")
        if path.startswith("datasets/"):  # OWNER/NAME/resolve/main/PATH
            path = path.split("/", 5)[5]
        self.send_file(handler, path)

    def send(self, handler, status: int, body: bytes, headers: dict | None = None) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def send_listing(self, handler, path: str, query: dict) -> None:
        """In pages of two files."""
        rows = []
        for name, data in self.files.items():
            sha256 = hashlib.sha256(data).hexdigest()
            rows.append({"path": name, "size": len(data), "sha256": sha256} | self.listed.get(name, {}))
        if "/v1/" in path:  # ModelScope
            files = [{"Path": r["path"], "Size": r["size"], "Sha256": r["sha256"], "Type": "blob"} for r in rows]
            files.append({"Path": "folder", "Size": 0, "Type": "tree"})
            files = files if query["PageNumber"] == "1" else []
            return self.send(handler, 200, json.dumps({"Code": 200, "Data": {"Files": files}}).encode())
        first = int(query.get("cursor", 0))
        page = [{"type": "directory", "path": "folder", "size": 0, "oid": "0"}]
        for row in rows[first : first + 2]:
            blob = self.files[row["path"]]
            oid = hashlib.sha1(f"blob {len(blob)}\0".encode() + blob).hexdigest()
            large = {"oid": row["sha256"], "size": row["size"], "pointerSize": 130}
            small = row["path"].startswith("small")
            page.append(
                {"type": "file", "path": row["path"], "size": row["size"], "oid": oid}
                | ({} if small else {"lfs": large})
            )
        link = f'<{self.url}{path}?recursive=true&cursor={first + 2}>; rel="next"'
        self.send(handler, 200, json.dumps(page).encode(), {"Link": link} if first + 2 < len(rows) else {})

    def send_file(self, handler, path: str) -> None:
        reply = self.plan.pop(0) if len(self.plan) > 1 else self.plan[0]
        if reply.status:
            return self.send(handler, reply.status, b"", reply.headers)
        if path not in self.files:
            return self.send(handler, 404, b"")
        data = self.files[path]
        data = data[:-1] + bytes([data[-1] ^ 1]) if reply.wrong else data
        etag = f'"{hashlib.md5(data).hexdigest()}"' if reply.etag else None
        first, asked = 0, handler.headers.get("Range")
        if asked and reply.ranges and (not reply.if_range or handler.headers.get("If-Range", etag) == etag):
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            if first >= len(data):
                return self.send(handler, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
        body = data[first:]
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        if etag:
            handler.send_header("ETag", etag)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        if reply.no_length:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            return
        handler.send_header("Content-Length", str(len(body) if reply.length is None else reply.length))
        handler.end_headers()
        handler.wfile.write(body if reply.cut is None else body[: reply.cut])
        handler.wfile.flush()
        if reply.stall:
            self.release.wait(60)
