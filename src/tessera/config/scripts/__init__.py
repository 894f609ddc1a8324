"""Shell scripts of other projects as commands: ``tessera megatron SCRIPT ...`` with the script's own arguments.

Documents of Megatron's world hand out scripts with positional arguments or with everything filled in. Each such script
is a function here, from its words to a command line of ours; its docstring is the table of what becomes what, and
``tessera megatron SCRIPT --help`` prints it. Nothing else depends on the script: what runs is the command line, which
is printed (``runs: tessera ...``) and can be used instead. Only the last component of the script's path counts, with or
without ``.sh`` or ``.py``; words after the script's own that are flags of ours are added to the command.

The names here are those of other people's files, model families included.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tessera.config.scripts import multimodal, pai
from tessera.config.scripts.words import Setting, Translation

VERBS = ("sft", "pt", "infer", "export")
"""The verbs of ``tessera megatron``."""

Script = Callable[[Sequence[str], Setting], Translation]
SCRIPTS: Mapping[str, Script] = {
    "run_mcore_qwen": pai.train,
    "pai": pai.train,
    "run_8xH20": pai.convert,
    "run_A22B_16xH20": pai.convert,
    "hf2mcore_convertor": pai.convert,
    "internvit_converter": multimodal.tower,
    "convert": multimodal.language_model,
    "combine_lm_vision_checkpoints": multimodal.combine,
    "pp_checkpoint_converter": multimodal.stages,
    "pretrain_yi_34b_internvit_6b": multimodal.pretrain_34b,
    "sft_34b_internvit": multimodal.sft_34b,
    "pretrain_qwen20_72b_internvit_6b": multimodal.pretrain_72b,
    "sft_qwen20_72b_internvit_6b": multimodal.sft_72b,
    "run_text_generation_yi_34b_internvit_6b": multimodal.generation,
    "run_text_generation_qwen20_72b_internvit_6b": multimodal.generation,
    **dict.fromkeys(multimodal.JUDGES, multimodal.judged),
}
NAMES = tuple(SCRIPTS)


def find(argv: Sequence[str]) -> Script | None:
    """The script that the command line ``argv`` names, None if it names a verb or nothing known."""
    if len(argv) < 2 or argv[0] != "megatron" or argv[1] in VERBS:
        return None
    name = re.sub(r"\.(sh|py)$", "", argv[1].rsplit("/", 1)[-1])
    return SCRIPTS.get(name)


def translated(argv: Sequence[str], env: Mapping[str, str]) -> tuple[list[str], tuple[str, ...]]:
    """``argv`` as a command line of ours, and what to tell the user; ``argv`` itself if it names no script."""
    script = find(argv)
    if script is None:
        return list(argv), ()
    setting = Setting(argv[1], env, _gpus(env))
    found = script(list(argv[2:]), setting)
    return list(found.argv), found.notes


def described(argv: Sequence[str]) -> str:
    """The docstring of the script that ``argv`` names."""
    script = find(argv)
    assert script is not None, argv
    return inspect.getdoc(script) or ""


def _gpus(env: Mapping[str, str]) -> int:
    """GPUs of this machine that a process would see; without asking a driver, which would take a library."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
