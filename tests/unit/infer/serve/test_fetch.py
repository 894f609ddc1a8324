"""URLs of requests lead to public hosts or nowhere, however they are written, redirected or resolved."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pytest

from tessera.infer.serve.fetch import Fetcher, Unfetched, public

PRIVATE = (
    *(
        "127.0.0.1",
        "127.8.9.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
    ),
    *("100.64.0.1", "100.127.255.255", "192.0.0.8", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
    *("255.255.255.255", "192.88.99.1", "203.0.113.7"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "fe80::1"),
    *("fe80::1%lo", "fc00::1", "fd12::1", "ff02::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "fec0::1"),
)
PUBLIC = ("8.8.8.8", "1.1.1.1", "172.15.0.1", "172.32.0.1", "100.63.0.1", "100.128.0.1", "2606:4700::1111", "2a00::1")


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "[::1]", "2130706433", "127.1", "0x7f000001",
     "0177.0.0.1", "169.254.169.254", "LOCALHOST", "127.0.0.1.", "[::]", "10.0.0.1:80"],
)  # fmt: skip
def test_every_spelling_of_a_private_host_is_refused(host: str) -> None:
    """With the machine's own resolver, which knows them all; nothing is connected to."""
    with pytest.raises(Unfetched, match="no public address"):
        Fetcher(max_bytes=100).get(f"http://{host}/secret")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://example.org/a", "neither http nor https"),
        ("http:///a", "neither"),
        ("http://user@example.org/", "user name"),
        ("http://example.org:99999/", "malformed"),
        ("http://[::1/", "malformed"),
    ],
)
def test_urls_of_another_kind(url: str, why: str) -> None:
    with pytest.raises(Unfetched, match=why):
        Fetcher(max_bytes=100, find=lambda host, port: ["8.8.8.8"]).get(url)


def test_one_private_address_among_public_ones_is_enough() -> None:
    with pytest.raises(Unfetched, match="no public address"):
        Fetcher(max_bytes=100, find=lambda host, port: ["8.8.8.8", "10.0.0.1"]).get("http://both.example/")


class Pages(http.server.BaseHTTPRequestHandler):
    """``/go/URL`` redirects there; other paths are what the tests need."""

    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        if self.path.startswith("/go/"):
            self.send_response(302)
            self.send_header("Location", unquote(self.path[4:]))
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            while True:
                try:
                    self.wfile.write(b".")
                    time.sleep(0.02)
                except OSError:
                    return
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x" * 100)
            except OSError:
                return
        elif self.path == "/zipped":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
        elif self.path == "/large":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
        elif self.path == "/gone":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"picture")

    def log_message(self, *args: Any) -> None:
        """Silence."""


@pytest.fixture
def site() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A web server on loopback: its address, and the requests it saw."""
    pages = type("Own", (Pages,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), pages)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}", pages.seen
    server.shutdown()
    server.server_close()


def lenient(**options: Any) -> Fetcher:
    """Takes 127.0.0.1, and nothing else, for public."""
    return Fetcher(**{"max_bytes": 1000, "allowed": lambda address: address == "127.0.0.1", **options})


def test_a_file_is_fetched(site: tuple[str, list[tuple[str, str]]]) -> None:
    host, seen = site
    assert lenient().get(f"http://{host}/a b.png?x=1#part") == b"picture"
    assert lenient().get(f"http://{host}") == b"picture"
    assert seen == [("/a%20b.png?x=1", host), ("/", host)]


def test_redirects_are_followed_a_few_times(site: tuple[str, list[tuple[str, str]]]) -> None:
    host, _ = site
    assert lenient().get(f"http://{host}/go//go//go//picture") == b"picture"
    with pytest.raises(Unfetched, match="more than 3 times"):
        lenient().get(f"http://{host}/go//go//go//go//picture")


@pytest.mark.parametrize(
    "target", ["http://127.0.0.2:{port}/", "http://169.254.169.254/latest", "http://[::1]:{port}/", "//127.0.0.3/x"]
)
def test_a_redirect_to_a_private_host_is_refused(site: tuple[str, list[tuple[str, str]]], target: str) -> None:
    host, seen = site
    with pytest.raises(Unfetched, match="no public address"):
        lenient().get(f"http://{host}/go/{target.format(port=host.split(':')[1])}")
    assert len(seen) == 1


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1/"])
def test_a_redirect_to_another_scheme_is_refused(site: tuple[str, list[tuple[str, str]]], target: str) -> None:
    with pytest.raises(Unfetched, match="neither http nor https"):
        lenient().get(f"http://{site[0]}/go/{target}")


def test_a_name_is_resolved_once_and_its_address_kept(site: tuple[str, list[tuple[str, str]]]) -> None:
    """A name that means a public host when it is judged and a private one a moment later gains nothing."""
    host, seen = site
    asked = []

    def rebinding(name: str, port: int) -> list[str]:
        asked.append(name)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    port = host.split(":")[1]
    assert lenient(find=rebinding).get(f"http://rebinding.example:{port}/") == b"picture"
    assert asked == ["rebinding.example"]
    assert seen == [("/", f"rebinding.example:{port}")]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("endless", "larger than 1000"),
        ("large", "larger than 1000"),
        ("gone", "answered 404"),
        ("zipped", "compresses"),
    ],
)
def test_what_is_not_taken(site: tuple[str, list[tuple[str, str]]], path: str, why: str) -> None:
    with pytest.raises(Unfetched, match=why):
        lenient().get(f"http://{site[0]}/{path}")


def test_a_host_that_drips_is_left_in_time(site: tuple[str, list[tuple[str, str]]]) -> None:
    started = time.monotonic()
    with pytest.raises(Unfetched, match="longer than 0.3 s"):
        lenient(timeout=0.3).get(f"http://{site[0]}/slow")
    assert time.monotonic() - started < 3


def test_a_host_that_never_answers_is_left_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        started = time.monotonic()
        with pytest.raises(Unfetched, match="longer than 0.3 s"):
            lenient(timeout=0.3).get(f"http://127.0.0.1:{mute.getsockname()[1]}/")
        assert time.monotonic() - started < 3


def test_https_is_checked_against_the_name(site: tuple[str, list[tuple[str, str]]]) -> None:
    with pytest.raises(Unfetched, match="the connection failed"):
        lenient().get(f"https://{site[0]}/")


@pytest.mark.parametrize(
    ("domains", "host", "taken"),
    [
        (["images.example"], "images.example", True),
        (["Images.Example"], "IMAGES.example", True),
        (["images.example"], "other.example", False),
        (["images.example"], "a.images.example", False),
        ([".images.example"], "a.images.example", True),
        ([".images.example"], "evilimages.example", False),
        (["none"], "images.example", False),
        ([], "images.example", True),
    ],
)
def test_only_listed_domains(
    site: tuple[str, list[tuple[str, str]]], domains: list[str], host: str, taken: bool
) -> None:
    fetcher = lenient(domains=domains, find=lambda name, port: ["127.0.0.1"])
    url = f"http://{host}:{site[0].split(':')[1]}/"
    if taken:
        assert fetcher.get(url) == b"picture"
    else:
        with pytest.raises(Unfetched, match="not fetched from its host"):
            fetcher.get(url)
