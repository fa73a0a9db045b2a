"""What ACME clients put for the service to find: names in a DNS server, and files on a web server, both on this host."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


@dataclass(slots=True)
class Names:
    """A DNS server that has each name below `test.` on this host, and TXT records: the lines of a file in *directory*."""

    port: int
    directory: Path
    addresses: dict[str, str] = field(default_factory=dict)

    def texts(self, name: str) -> list[str]:
        """Return the TXT records of a name."""
        file = self.directory / name
        return file.read_text().split() if file.exists() else []

    def put(self, name: str, text: str) -> None:
        """Add a TXT record."""
        with (self.directory / name).open("a") as file:
            file.write(f"{text}\n")

    def reply(self, data: bytes) -> bytes:
        """Return the reply to a query."""
        query = dns.message.from_wire(data)
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.AA | dns.flags.RA
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        if question.rdtype == dns.rdatatype.TXT and self.texts(name):
            quoted = [f'"{text}"' for text in self.texts(name)]
            reply.answer.append(dns.rrset.from_text(question.name, 1, "IN", "TXT", *quoted))
        elif question.rdtype == dns.rdatatype.A and name.endswith(".test") and not name.startswith("missing."):
            address = self.addresses.get(name, "127.0.0.1")
            reply.answer.append(dns.rrset.from_text(question.name, 1, "IN", "A", address))
        elif not name.endswith(".test") or name.startswith("missing."):
            reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply.to_wire()


@contextmanager
def serving_names(directory: Path) -> Iterator[Names]:
    """Run a DNS server within the block."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, udp = self.request
            udp.sendto(names.reply(data), self.client_address)

    with socketserver.ThreadingUDPServer(("127.0.0.1", 0), Handler) as server:
        names = Names(server.server_address[1], directory)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield names
        server.shutdown()
        thread.join()


@contextmanager
def serving_files(
    port: int, files: dict[str, bytes], *, host: str = "127.0.0.1", status: int = 200, header: tuple[str, str] | None = None
) -> Iterator[None]:
    """Run a web server within the block, which has *files* by path. *status* and *header* are those of each answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path)
            self.send_response(404 if content is None else status)
            if header is not None:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
            pass

    with ThreadingHTTPServer((host, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield
        server.shutdown()
        thread.join()
