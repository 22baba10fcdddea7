"""A small HTTP proxy that stands between a client and a real S3 server on the loopback and spoils what it is told to.

    with FaultProxy(server_url) as proxy:
        proxy.plan(Fault("reset", method="GET", path="x.tar", after_bytes=1000, times=2))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        ...                                   # the client meets two resets, then an undisturbed server
        assert proxy.ranges("x.tar") == ["bytes=0-", "bytes=1000-4999", "bytes=2000-4999"]

Kinds of faults. "After N bytes" is after `after_bytes` bytes of the answer's body:

    reset          the connection is reset (RST) after N bytes
    cut            the connection is closed in good order after N bytes, though the answer's head promised more
    short          an answer in itself whole, with status 200 and the first N bytes as its body
    short_range    the same with status 206 and the range that was asked for
    ignore_range   the whole object with status 200, whatever the range
    ignore_match   whatever version is there, though another was asked for (If-Match)
    flip           byte N of the body is changed on its way: of the request if it is a PUT, else of the answer
    stall          no byte any more after N bytes; with after_bytes=-1, not even the head
    lost_answer    the server does what is asked, but its answer is lost (RST)
    403 412 500 503   the proxy itself answers so, with S3's error code; the server hears nothing
"""

import base64
import http.client
import socket
import struct
import threading
import zlib
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

CODES = {403: "AccessDenied", 412: "PreconditionFailed", 500: "InternalError", 503: "SlowDown"}
IGNORED = {"ignore_range": "range", "ignore_match": "if-match"}
KINDS = {"reset", "cut", "short", "short_range", *IGNORED, "flip", "stall", "lost_answer", *map(str, CODES)}


@dataclass(frozen=True)
class Fault:
    """One disturbance of the requests that match: from the `first` matching one on, `times` of them."""

    kind: str
    method: str = ""  # "" = any
    path: str = ""  # a part of the decoded path and query: "x.tar", "partNumber=2"; "" = any
    signed_by: str = ""  # a part of the Authorization header, such as an access key's id; "" = any
    after_bytes: int = 0
    first: int = 1
    times: int = 1


@dataclass(frozen=True)
class Seen:
    """One request as it came in."""

    method: str
    path: str  # decoded, with the query
    headers: dict[str, str]  # names in lower case
    fault: str  # kind, or ""


class FaultProxy:
    """The proxy; a context manager. All its attributes may be read at any time."""

    def __init__(self, target_url: str, verify_checksums: bool = False) -> None:
        """`verify_checksums`: refuse a wrong CRC32 of a PUT with BadDigest, where the server itself does not (moto)."""
        parts = urlsplit(target_url)
        self.target = (parts.hostname or "", parts.port or 80)
        self.verify_checksums = verify_checksums
        self.seen: list[Seen] = []
        self.connections = 0  # opened by clients so far
        self.closing = threading.Event()
        self._plan: list[tuple[Fault, list[int]]] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def plan(self, *faults: Fault) -> None:
        """Adds faults. Each counts the requests it matches from now on; of several due at once the earliest acts."""
        assert {fault.kind for fault in faults} <= KINDS
        with self._lock:
            self._plan += [(fault, [0]) for fault in faults]

    def clear(self) -> None:
        """Forgets plan and requests."""
        with self._lock:
            self._plan, self.seen = [], []

    def count(self, method: str = "", path: str = "") -> int:
        """Number of requests with this method whose path contains `path`."""
        return len(self._matching(method, path))

    def ranges(self, path: str = "") -> list[str]:
        """The Range headers of all GETs whose path contains `path`, in order; "" where one had none."""
        return [seen.headers.get("range", "") for seen in self._matching("GET", path)]

    def _matching(self, method: str, path: str) -> list[Seen]:
        with self._lock:
            return [seen for seen in self.seen if seen.method in (method or seen.method) and path in seen.path]

    def take(self, request: Seen) -> Fault | None:
        """Notes a request and returns the fault that is due for it."""
        due = None
        with self._lock:
            for fault, count in self._plan:
                signature = request.headers.get("authorization", "")
                if fault.method not in ("", request.method) or fault.path not in request.path:
                    continue
                if fault.signed_by not in signature:
                    continue
                count[0] += 1
                if due is None and fault.first <= count[0] < fault.first + fault.times:
                    due = fault
            self.seen.append(replace(request, fault=due.kind if due else ""))
        return due


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def get_request(self):
        self.proxy.connections += 1
        return super().get_request()

    def handle_error(self, request, client_address):
        """Clients that give up are what the proxy is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def relay(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        fault = self.server.proxy.take(Seen(self.command, unquote(self.path), dict(headers), ""))
        kind, after = (fault.kind, fault.after_bytes) if fault else ("", 0)
        if kind == "stall" and after < 0:
            self.server.proxy.closing.wait()
            self.reset()
            return
        if kind.isdigit():
            self.refuse(int(kind), CODES[int(kind)])
            return
        if kind == "flip" and self.command == "PUT":
            body = flipped(body, after)
            kind = ""
        if self.server.proxy.verify_checksums and self.mangled(headers, body):
            self.refuse(400, "BadDigest")
            return
        headers.pop(IGNORED.get(kind, ""), None)
        status, answer_headers, answer = self.forward(headers, body)
        if kind == "lost_answer":
            self.reset()
        elif kind in ("short", "short_range"):
            answer = answer[:after]
            if kind == "short":
                status, answer_headers = 200, [h for h in answer_headers if h[0].lower() != "content-range"]
            self.answer(status, answer_headers, answer, len(answer))
        elif kind in ("reset", "cut", "stall"):
            self.answer(status, answer_headers, answer[:after], len(answer))
            if kind == "stall":
                self.server.proxy.closing.wait()
            self.close_connection = True
            if kind != "cut":
                self.reset()
        else:
            self.answer(status, answer_headers, flipped(answer, after) if kind == "flip" else answer, len(answer))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay

    def forward(self, headers: dict[str, str], body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Asks the server. The Host header stays the client's, as it is signed."""
        upstream = http.client.HTTPConnection(*self.server.proxy.target, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if name not in ("expect", "connection"):
                upstream.putheader(name, value)
        upstream.endheaders(body)
        response = upstream.getresponse()
        answer = response.read()
        upstream.close()
        return response.status, response.getheaders(), answer

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, promised_bytes: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        if self.command == "HEAD":
            promised_bytes = int({name.lower(): value for name, value in headers}.get("content-length", 0))
        if status not in (204, 304):
            self.send_header("Content-Length", str(promised_bytes))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>planned</Message></Error>'
        body = b"" if self.command == "HEAD" else text.encode()
        self.answer(status, [("Content-Type", "application/xml")], body, len(body))

    def mangled(self, headers: dict[str, str], body: bytes) -> bool:
        declared = headers.get("x-amz-checksum-crc32")
        return declared is not None and declared != base64.b64encode(struct.pack(">I", zlib.crc32(body))).decode()

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


def flipped(data: bytes, position: int) -> bytes:
    """`data` with one byte changed."""
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]
