"""``python -m tessera`` is ``tessera``; torchrun starts every rank this way."""

from __future__ import annotations

import sys

from tessera.cli import main

if __name__ == "__main__":
    sys.exit(main())
