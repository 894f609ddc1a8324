"""``swift deploy`` in this process: declares torchvision's missing operators, then hands all arguments to ms-swift."""

from __future__ import annotations

import vision_ops  # beside this file

if __name__ == "__main__":
    operators = vision_ops.declare()
    from swift.pipelines import deploy_main

    deploy_main()
