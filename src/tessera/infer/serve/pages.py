"""The two pages of a server: a small chat at ``/``, and its description at ``/docs``.

Each is one file with everything in it, so they work where nothing else can be reached. A header tells the browser to
run and load nothing but what the file itself holds.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

_HERE = files("tessera.infer.serve")
PAGE = (_HERE / "page.html").read_text(encoding="utf-8")
DOCS = (_HERE / "docs.html").read_text(encoding="utf-8")


def headers(page: str) -> dict[str, str]:
    """Headers of ``page``: only its own scripts and styles, named by their hashes, and only this server."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
