"""Plugin for ms-swift: its Qwen2.5-VL template with the placeholder ids of the benchmark's small vocabulary.

ms-swift writes the ids of Qwen's own vocabulary (151,655 ...) into the template class; a registered subclass is its
documented way to say otherwise.
"""

from __future__ import annotations

from swift.template import register_template
from swift.template.templates.qwen import Qwen2_5VLTemplate, QwenTemplateMeta


class BenchTemplate(Qwen2_5VLTemplate):
    """Ids of ``bench/rows.py``'s special tokens."""

    image_token_id = 5
    video_token_id = 6


register_template(QwenTemplateMeta("bench_vl", template_cls=BenchTemplate))
