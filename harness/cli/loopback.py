"""An HTTP server of a few documents that this machine alone can reach."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HOST = "127.0.0.1"
_SECONDS_TO_ASK = 10.0
"""A connection that has asked for nothing by then is closed."""

Answer = tuple[str, Callable[[], bytes], Callable[[], None]]
"""Content type of a document, what makes it, and what is called once it was sent. Both are called from threads."""


class LoopbackServer:
    """Answers GET and HEAD, in threads of its own.

    A page of another site could have a browser ask under a name of that site that leads here (DNS rebinding), so a
    request that names another host than this machine is refused.

    Args:
        answers: by path.
    """

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self._http = _Http(answers)
        self._thread = threading.Thread(target=self._http.serve_forever, name="live page", daemon=True)
        self.address = f"http://{_HOST}:{self._http.server_port}/"

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer nothing more."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        super().__init__((_HOST, 0), _Handler)
        self.answers = answers
        self.hosts = {f"{name}:{self.server_port}" for name in (_HOST, "localhost")}

    def server_bind(self) -> None:
        # The one of http.server asks for this machine's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _HOST, int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a browser may go away before it has its answer."""


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    server_version = "harness"
    sys_version = ""
    timeout = _SECONDS_TO_ASK

    def do_GET(self) -> None:
        if self.headers.get_all("Host") not in [[host] for host in self.server.hosts]:
            wanted = self.server.server_port
            self.send_error(HTTPStatus.FORBIDDEN, explain=f"Ask for 127.0.0.1:{wanted} or localhost:{wanted}")
            return
        answer = self.server.answers.get(self.path)
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content_type, make, sent = answer
        self._send(HTTPStatus.OK, content_type, make())
        sent()

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse, without a word of the request in the answer."""
        status = HTTPStatus(code)
        self._send(status, "text/plain; charset=utf-8", f"{explain or status.phrase}\n".encode())

    def _send(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", content_type),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page asks every two seconds."""
