"""Fetching an image that a request names, without becoming a way into the network this server stands in.

A URL in a request is chosen by a stranger, and the server may reach what the stranger cannot: other machines of its
network, services on loopback, a cloud's metadata. So only public addresses are connected to, and what was judged is
what is used: a name is resolved once, every address it has must be public, and the connection goes to that address and
no other, so that a name cannot mean something else a moment later. Redirects are followed a few times, each judged
anew. Time and size are bounded, compression is not accepted, proxies are not asked.

IPv4 is judged by the list of special-purpose networks; of IPv6 only global unicast is public, without the parts in
which an IPv4 address or a tunnel hides (2002::/16, 2001::/23; ::ffff:0:0/96 and 64:ff9b::/96 lie outside anyway).
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, quote, urljoin, urlsplit

TIMEOUT_S, HOPS = 10.0, 3
_CHUNK = 1 << 16
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
_UNICAST = ipaddress.ip_network("2000::/3")


class Unfetched(Exception):  # noqa: N818 - it says what happened
    """Why a URL was not fetched, in words for the client."""


def public(address: str) -> bool:
    """Whether ``address`` (as resolved, no name) is one of the public Internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6 and found not in _UNICAST:
        return False
    return not any(found.version == network.version and found in network for network in _NOT_PUBLIC)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host``; OSError if it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Fetches files of at most ``max_bytes`` from public hosts, or only from ``domains`` if any are given.

    A domain is a host's name; ``.example.org`` stands for every host below it, the one word ``none`` for no host.
    Methods block and may be called from any thread. ``allowed`` judges an address.
    """

    def __init__(
        self,
        domains: Sequence[str] = (),
        *,
        max_bytes: int,
        timeout: float = TIMEOUT_S,
        find: Callable[[str, int], list[str]] = resolve,
        allowed: Callable[[str], bool] = public,
    ) -> None:
        self._domains = tuple(domain.lower() for domain in domains)
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._find = find
        self._allowed = allowed
        self._context = ssl.create_default_context()

    def get(self, url: str) -> bytes:
        """The file at ``url``; Unfetched says why there is none."""
        deadline = time.monotonic() + self._timeout
        for _ in range(HOPS + 1):
            parts = self._judged(url)
            found = self._once(parts, deadline)
            if isinstance(found, bytes):
                return found
            if parts.scheme == "https" and urlsplit(found).scheme == "http":
                raise Unfetched("it redirects from https to http")
            url = found
        raise Unfetched(f"it redirects more than {HOPS} times")

    def _judged(self, url: str) -> SplitResult:
        """The parts of a URL of a kind and host that may be asked."""
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise Unfetched("its URL is malformed") from None
        if parts.scheme not in ("http", "https") or not host:
            raise Unfetched("its URL is neither http nor https")
        if "@" in parts.netloc:
            raise Unfetched("its URL holds a user name")
        if self._domains and not any(_within(host, domain) for domain in self._domains):
            raise Unfetched("images are not fetched from its host (--allowed_media_domains)")
        return parts

    def _once(self, parts: SplitResult, deadline: float) -> bytes | str:
        """The file, or the URL that the server sends us on to."""
        secure = parts.scheme == "https"
        assert parts.hostname is not None
        port = parts.port or (443 if secure else 80)
        try:
            addresses = self._find(parts.hostname, port)
        except (OSError, UnicodeError):
            addresses = []
        # The same words for no address and for a private one: what names exist in there is nobody's business.
        if not addresses or not all(self._allowed(address) for address in addresses):
            raise Unfetched("its host has no public address")
        connection = _Pinned(parts.hostname, port, addresses[0], self._context if secure else None, deadline)
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), connection.abort)
        timer.daemon = True
        timer.start()
        try:
            return self._read(connection, parts, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= deadline
            why = f"it took longer than {self._timeout:g} s" if late else f"the connection failed ({_kind(error)})"
            raise Unfetched(why) from None
        finally:
            timer.cancel()
            connection.close()

    def _read(self, connection: http.client.HTTPConnection, parts: SplitResult, deadline: float) -> bytes | str:
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        headers = {"User-Agent": "tessera", "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            return urljoin(parts.geturl(), location)
        if response.status != 200:
            raise Unfetched(f"its server answered {response.status}")
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise Unfetched("its server compresses what was asked for as it is")
        announced = response.getheader("Content-Length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self._max_bytes:
            raise Unfetched(f"it is larger than {self._max_bytes} bytes")
        chunks: list[bytes] = []
        size = 0
        while chunk := response.read(_CHUNK):
            size += len(chunk)
            if size > self._max_bytes:
                raise Unfetched(f"it is larger than {self._max_bytes} bytes")
            chunks.append(chunk)
        if time.monotonic() >= deadline:  # the timer ended the stream: what is here may be a part
            raise TimeoutError
        return b"".join(chunks)


class _Pinned(http.client.HTTPConnection):
    """A connection for ``host`` that goes to ``address`` whatever the name means by then."""

    def __init__(self, host: str, port: int, address: str, context: ssl.SSLContext | None, deadline: float) -> None:
        super().__init__(host, port)
        self.default_port = 443 if context else 80  # as in the Host header
        self._address = address
        self._context = context
        self._deadline = deadline
        self._held: socket.socket | None = None

    def connect(self) -> None:
        left = max(0.01, self._deadline - time.monotonic())
        self.sock = socket.create_connection((self._address, self.port), left)
        self._held = self.sock  # a response that ends with its connection takes ``sock`` away
        if self._context is not None:
            secure = self._context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock = self._held = secure
            secure.do_handshake()

    def abort(self) -> None:
        """End whatever another thread is waiting for."""
        if self._held is not None:
            try:
                socket.socket.shutdown(self._held, socket.SHUT_RDWR)  # not TLS's own, which waits for the other side
            except OSError:  # it has ended by itself
                return


def _within(host: str, domain: str) -> bool:
    return host.endswith(domain) if domain.startswith(".") else host == domain


def _kind(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not valid"
    return type(error).__name__
