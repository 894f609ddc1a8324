"""``transformers serve`` in this process, where torchvision cannot be loaded whole (it is built for CUDA's torch).

Declares its missing operators, lets Pillow decode images in place of its extension, then hands all arguments on.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import torch
import vision_ops  # beside this file
from PIL import Image


def decode_image(data: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The pixels ``[3, H, W] uint8`` of an image file, as torchvision's function of this name."""
    pixels = np.asarray(Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


if __name__ == "__main__":
    operators = vision_ops.declare()
    import torchvision.io
    from transformers import image_utils
    from transformers.cli.transformers import main

    for module in (torchvision.io, torchvision.io.image, image_utils):
        module.decode_image = decode_image

    sys.argv = ["transformers", *sys.argv[1:]]
    main()
