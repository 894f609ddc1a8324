"""Pushing a directory to the Hugging Face hub, and saying in one line why it did not work.

The upload itself is ``huggingface_hub``'s: it hashes, skips what is already there, resumes and commits. What is added
here is what it leaves to its callers: only files that serve whoever downloads the model go up (no optimiser states,
no answers of earlier inferences), the access token never reaches a message, a log or a file, and each of the usual
failures (no token, a bad token, a namespace of somebody else, no network) is told by its cause::

    --hub_token ...: the hub does not know this token (401); make one with write access and pass it

``endpoint`` is an argument rather than a global so that a test, or a company's own hub, can be named explicitly.
"""

from __future__ import annotations

import re
from pathlib import Path

from tessera.config.errors import UserError

LEFT_OUT = (
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "training_args.bin",
    "trainer_state.json",
    "*.distcp",
    "state/*",
    "global_step*",
    "runs/*",
    "images/*",
    "infer_result/*",
    ".*",
    "*/.*",
)
"""Patterns of files that only resuming or looking back needs."""


def push(
    directory: Path, repo_id: str, *, token: str | None, private: bool = False, endpoint: str | None = None
) -> str:
    """Upload ``directory`` to the model repository ``repo_id``, created if need be; the address of the repository.

    ``token`` None means the one stored by ``hf auth login``; ``endpoint`` None means the public hub.
    """
    import huggingface_hub

    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) is None:
        raise UserError(f"--hub_model_id {repo_id}: expected namespace/name")
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            ignore_patterns=list(LEFT_OUT),
            commit_message=f"Upload {directory.name}",
        )
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise UserError(_refused(error.response.status_code, str(error), repo_id, token)) from None
    except (huggingface_hub.errors.HFValidationError, ValueError) as error:
        raise UserError(f"--hub_model_id {repo_id}: {_first_line(error, token)}") from None
    # HTTPError is that of whichever HTTP client the library uses; its own errors derive from it.
    except (huggingface_hub.errors.OfflineModeIsEnabled, huggingface_hub.errors.HTTPError, OSError) as error:
        raise UserError(
            f"--push_to_hub: {api.endpoint} cannot be reached ({_first_line(error, token)}); {directory} is complete "
            "and can be pushed later"
        ) from None
    return str(url)


def _refused(status: int, message: str, repo_id: str, token: str | None) -> str:
    """What an answer other than success means for the person who asked."""
    if status == 401 and token is None:
        return "--push_to_hub: not logged in; give --hub_token or run: hf auth login"
    if status == 401:
        return "--hub_token: the hub does not know this token (401); make one with write access"
    if status == 403:
        return f"--hub_model_id {repo_id}: this token may not write there (403); check its scope and the namespace"
    if status == 404:
        return f"--hub_model_id {repo_id}: not found on the hub (404); check the namespace"
    return f"--push_to_hub {repo_id}: the hub answered {status}: {_first_line(message, token)}"


def _first_line(error: object, token: str | None) -> str:
    """The first line of a message that says something, without the token."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0][:200]
    return line.replace(token, "***") if token else line
