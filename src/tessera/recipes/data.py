"""``tessera data``: the datasets of a run as training would see them, without a run."""

from __future__ import annotations

from tessera.checkpoint import open as door
from tessera.config.run import Run
from tessera.data.inspect import show


def main(run: Run) -> None:
    """Print rows, lengths, packs, refused rows and one sample; the model is described but not loaded."""
    source = door.describe(run.model)
    show(run.data, source.path, source.geometry, source.max_positions)
