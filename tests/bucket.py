"""A bucket of Cloud Storage on loopback: as much of it as gcsfs, google.cloud.storage, TensorStore and ArrayRecord use.

An object has a generation, and what is asked for on condition of one is refused otherwise, as there.
"""

import contextlib
import email.parser
import http.server
import importlib.util
import itertools
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from mixgrpo_jax.runtime.files import CLIENTS


def _lacks(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True


MISSING = [name for name in CLIENTS["gs"] if _lacks(name)]
needs_clients = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: install the extra gcs")


class Refused(Exception):
    def __init__(self, status: int):
        self.status = status


class Bucket:
    """Objects {name: (bytes, generation)}. `requests` are those answered, (method, name or path)."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.requests: list[tuple[str, str]] = []
        self.sessions: dict[str, tuple[dict[str, str], bytearray]] = {}
        self.lock, self.count = threading.Lock(), itertools.count(1)
        self.refuses: re.Pattern | None = None  # names of objects that nobody may write

    def read(self, name: str, query: dict[str, str]) -> tuple[bytes, int]:
        data, generation = self.objects.get(name, (b"", 0))
        self.check(name, query, generation)
        if not generation:
            raise Refused(404)
        return data, generation

    def write(self, name: str, data: bytes, query: dict[str, str]) -> dict[str, Any]:
        with self.lock:
            if self.refuses and self.refuses.search(name):
                raise Refused(403)
            self.check(name, query, self.objects.get(name, (b"", 0))[1])
            self.objects[name] = data, time.time_ns() // 1000 * 1000 + next(self.count) % 1000
            return self.about(name)

    def delete(self, name: str, query: dict[str, str]) -> None:
        with self.lock:
            self.read(name, query)
            del self.objects[name]

    def check(self, name: str, query: dict[str, str], generation: int) -> None:
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise Refused(412)
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            raise Refused(304)

    def about(self, name: str) -> dict[str, Any]:
        data, generation = self.objects[name]
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(generation / 1e9))
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": when,
            "updated": when,
            "contentType": "application/octet-stream",
        }

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names, prefixes = [], dict[str, None]()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or not query.get("startOffset", "") <= name:
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            head, found, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes[f"{prefix}{head}{delimiter}"] = None
            else:
                names.append(name)
        items = [self.about(name) for name in names]
        return {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)}

    def upload(self, query: dict[str, str], body: bytes, kind: str) -> dict[str, Any]:
        name = query.get("name", "")
        if query["uploadType"] == "media":
            return self.write(name, body, query)
        if query["uploadType"] == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", kind)[1].encode()
            about, data = (
                part.split(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n", 1)[1]
                for part in body.split(b"--" + boundary)[1:3]
            )
            data = data[: -2 if data.endswith(b"\r\n") else -1]
            return self.write(json.loads(about).get("name", name), data, query)
        raise NotImplementedError(query)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 1 << 16  # an answer is one packet
    bucket: Bucket

    def do_GET(self) -> None:
        path, query = self.where()
        if match := re.fullmatch(r"(?:/download)?/storage/v1/b/[^/]+/o/(.+)", path):
            name = urllib.parse.unquote(match[1])
            with self.answering("GET", name):
                data, generation = self.bucket.read(name, query)
                if query.get("alt") != "media" and not path.startswith("/download"):
                    return self.send(200, self.bucket.about(name))
                headers = {"X-Goog-Generation": str(generation)}
                if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
                    size, (first, last) = len(data), asked.groups()
                    start = int(first) if first else max(0, size - int(last))
                    stop = min(int(last) + 1, size) if first and last else size
                    if start >= size:
                        raise Refused(416)
                    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
                    return self.send(206, data[start:stop], headers)
                return self.send(200, data, headers)
        elif re.fullmatch(r"/storage/v1/b/[^/]+/o/?", path):
            with self.answering("LIST", query.get("prefix", "")):
                self.send(200, self.bucket.list(query))
        elif re.fullmatch(r"/storage/v1/b/[^/]+", path):
            with self.answering("GET", path):
                self.send(200, {"kind": "storage#bucket", "name": "bucket", "id": "bucket"})
        else:
            self.send(404, {})

    def do_DELETE(self) -> None:
        path, query = self.where()
        name = urllib.parse.unquote(path.partition("/o/")[2])
        with self.answering("DELETE", name):
            self.bucket.delete(name, query)
            self.send(204, b"")

    def do_PUT(self) -> None:
        query = self.where()[1]
        body = self.body()
        with self.answering("PUT", query.get("upload_id", "")):
            first, session = self.bucket.sessions[query["upload_id"]]
            start, total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"]).groups()
            if start is not None:
                session[int(start) :] = body
            if total == "*" or len(session) < int(total):
                held = {"Range": f"bytes=0-{len(session) - 1}"} if session else {}
                return self.send(308, b"", held)
            self.send(200, self.bucket.write(first["name"], bytes(session), first))

    def do_POST(self) -> None:
        path, query = self.where()
        if "upload_id" in query:
            return self.do_PUT()
        body, kind = self.body(), self.headers.get("Content-Type", "")
        if path.startswith("/batch/"):
            return self.batch(body, kind)
        with self.answering("POST", query.get("name", path)):
            if path.startswith("/upload/") and query["uploadType"] == "resumable":
                about = {"name": json.loads(body)["name"]} if body and "name" not in query else {}
                session = str(next(self.bucket.count))
                self.bucket.sessions[session] = query | about, bytearray()
                return self.send(200, {}, {"Location": f"{self.url}{path}?upload_id={session}"})
            if path.startswith("/upload/"):
                return self.send(200, self.bucket.upload(query, body, kind))
            source, to, target = re.fullmatch(
                r"/storage/v1/b/[^/]+/o/(.+?)/(rewriteTo/b/[^/]+|copyTo/b/[^/]+|moveTo)/o/(.+)", path
            ).groups()
            source, target = urllib.parse.unquote(source), urllib.parse.unquote(target)
            about = self.bucket.write(target, self.bucket.read(source, {})[0], query)
            if to == "moveTo":
                self.bucket.delete(source, {})
            size = about["size"]
            done = {"done": True, "resource": about, "totalBytesRewritten": size, "objectSize": size}
            self.send(200, done if to.startswith("rewrite") else about)

    def batch(self, body: bytes, kind: str) -> None:
        text, parts = email.parser.BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body), []
        for part in text.get_payload():
            path = re.match(r"DELETE (\S+)", part.get_payload().strip())[1]
            status = 204
            name = urllib.parse.unquote(path.partition("/o/")[2].partition("?")[0])
            self.bucket.requests.append(("DELETE", name))
            try:
                self.bucket.delete(name, {})
            except Refused as error:
                status = error.status
            parts.append(
                f"--b\r\nContent-Type: application/http\r\nContent-ID: <response-{part['Content-ID'].strip('<>')}>"
                f"\r\n\r\nHTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        self.send(200, ("".join(parts) + "--b--\r\n").encode(), {"Content-Type": "multipart/mixed; boundary=b"})

    @property
    def url(self) -> str:
        return f"http://{self.headers['Host']}"

    def where(self) -> tuple[str, dict[str, str]]:
        path, _, query = self.path.partition("?")
        return path, dict(urllib.parse.parse_qsl(query, keep_blank_values=True))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    @contextlib.contextmanager
    def answering(self, method: str, name: str) -> Iterator[None]:
        self.bucket.requests.append((method, name))
        try:
            yield
        except Refused as error:
            self.send(error.status, {"error": {"code": error.status, "message": f"{name} is refused"}})

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | (headers or {})
        if status in (204, 304):
            body = b""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # of a client that was killed
            super().handle_error(request, client_address)


@contextlib.contextmanager
def served() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """gs://bucket, and the environment in which clients find it."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield (
            bucket,
            {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
                "FSSPEC_GS_TOKEN": "anon",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google's own servers
                "EPATH_USE_TF": "0",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
