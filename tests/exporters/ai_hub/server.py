"""An HTTP server on 127.0.0.1 that speaks the qai_hub client's own protocol (REST with protobuf bodies)."""

from __future__ import annotations

import email.parser
import email.policy
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tests.exporters.ai_hub.service import TOKEN, Service

# (method, pattern of the path below /api/v1/) -> what answers
ROUTES = {
    ("GET", r"users/auth/user"): Service.user,
    ("GET", r"devices"): Service.devices,
    ("POST", r"models"): Service.new_model,
    ("GET", r"models/(\w+)"): Service.model,
    ("GET", r"models/(\w+)/multipart_upload"): Service.upload_urls,
    ("POST", r"models/(\w+)/multipart_upload"): Service.uploaded,
    ("GET", r"models/(\w+)/download"): Service.download,
    ("POST", r"datasets"): Service.new_dataset,
    ("GET", r"datasets/(\w+)/upload_url"): Service.dataset_url,
    ("PATCH", r"datasets/(\w+)"): Service.dataset_done,
    ("GET", r"datasets/(\w+)"): Service.dataset,
    ("GET", r"datasets/(\w+)/download_data"): Service.dataset_download,
    ("POST", r"jobs"): Service.new_job,
    ("GET", r"jobs/(\w+)"): Service.job,
    ("GET", r"jobs/(\w+)/result"): Service.result,
    ("GET", r"jobs/(\w+)/device_runs/latest/artifact_list/(\d+)"): Service.artifacts,
    ("GET", r"job_summaries"): Service.summaries,
}


@contextmanager
def serving(service):
    """Answers for ``service`` at ``service.url`` until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(service))
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


def _handler(service):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, method):
            body = self.body()
            path = urlsplit(self.path).path.strip("/")
            if service.down:
                self.close_connection = True
                return self.connection.close()
            if path.startswith("blob/"):
                return self.blob(method, path.removeprefix("blob/"), body)
            path = path.removeprefix("api/v1/")
            if forced := next((code for prefix, code in service.status.items() if path.startswith(prefix)), None):
                return self.reply(forced, b"", "text/plain")
            if self.headers.get("Authorization") != f"token {TOKEN}":
                return self.reply(401, b"", "text/plain")
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            for (wanted, pattern), route in ROUTES.items():
                if wanted == method and (found := re.fullmatch(pattern, path)):
                    service.counts[f"{method} {path.split('/')[0]}"] += 1
                    try:
                        made = route(service, query, body, *found.groups())
                    except (AssertionError, KeyError) as error:
                        code = 404 if isinstance(error, KeyError) else 400
                        return self.reply(code, f'{{"detail": "refused: {error}"}}'.encode(), "application/json")
                    if made is None:
                        self.close_connection = True
                        return self.connection.close()
                    status = 201 if method == "POST" else 200
                    return self.reply(status, made.SerializeToString(), "application/x-protobuf")
            return self.reply(404, f"no route {method} {path}".encode(), "text/plain")

        def blob(self, method, key, body):
            """Storage with links of its own, as the service's is: a token has no business here."""
            assert "Authorization" not in self.headers
            if method == "GET":
                return self.reply(200, service.blobs[key], "application/octet-stream")
            service.blobs[key] = form_file(self.headers["Content-Type"], body) if method == "POST" else body
            self.reply(200, b"", "text/plain", ETag=f'"{len(body)}"')

        def body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def reply(self, status, body, kind, **headers):
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

    for method in ("GET", "POST", "PUT", "PATCH"):
        setattr(Handler, f"do_{method}", lambda self, method=method: self.answer(method))
    return Handler


def form_file(kind, body):
    """The file in the body of a multipart form."""
    head = f"Content-Type: {kind}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    (part,) = message.iter_parts()
    return part.get_payload(decode=True)
