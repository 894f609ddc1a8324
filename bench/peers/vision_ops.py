"""Let torchvision's Python half be imported next to a CPU build of torch.

The torchvision wheel on the package index is linked against CUDA, so its compiled operators cannot be loaded here and
``import torchvision`` stops at the first operator it wants to describe. The peers need only its transforms, which are
plain Python over torch. Declaring the missing operators (never called: they are detection operators) is enough, and
lets both peers use their *default, fastest* image processor, which is the fair thing to measure them with.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch


def declare() -> torch.library.Library | None:
    """Declare torchvision's operators; keep the returned handle alive. None if torchvision is absent or works as is."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        torch.ops.load_library(next(folder.glob("_C*.so")))
        return None
    except (OSError, StopIteration):
        pass
    source = (folder / "_meta_registrations.py").read_text()
    names = set(re.findall(r"[\"']torchvision::(\w+)[\"']", source)) | set(
        re.findall(r"register_meta\(\"(\w+)\"\)", source)
    )
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(names):
        library.define(f"{name}(Tensor input) -> Tensor")
    return library
