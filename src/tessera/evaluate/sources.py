"""From flags to what answers: the model of ``--model`` in this process, or the server of ``--eval_url``.

Answers are greedy unless something asks for sampling: a benchmark is to be the same tomorrow. What decides an answer
besides its question is collected in ``settings``: the model by the contents of its files, sampling, the limits of
images and prompts. Two answers under the same settings are answers of the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tessera.checkpoint.open import locate
from tessera.config.parse import nearest, usage_error
from tessera.config.run import InferArgs, Run
from tessera.evaluate.answerer import Answerer, Embedded
from tessera.evaluate.identity import fingerprint_of
from tessera.evaluate.remote import Remote, Server, check_url
from tessera.evaluate.server import Deployed
from tessera.infer.session import Session

GENERATION: Mapping[str, str] = {
    "max_new_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
"""Entries of ``--eval_generation_config`` that are flags as well."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

OTHER = ("do_sample", "seed", "n", "stream", "timeout")
"""Further entries that are understood."""

DECIDES = ("torch_dtype", "max_pixels", "min_pixels", "video_max_pixels", "fps", "max_num", "use_tiling")
QUANTISED = ("quant_method", "quant_bits")
SHAPES = ("system", "max_length", "truncation_strategy", "image_resize", "columns")


def with_generation(run: Run) -> Run:
    """``run`` with ``--eval_generation_config`` in its flags, where they are not given themselves; else greedy.

    UserError for an entry that the embedded engine does not have; a server gets it as it is.
    """
    given, infer, train = dict(run.evaluate.eval_generation_config or {}), run.infer, run.train
    if given.pop("do_sample", True) is False:
        given["temperature"] = 0.0
    if given.pop("n", 1) != 1:
        raise usage_error("--eval_generation_config n: every question is answered once")
    for name in ("stream", "timeout"):
        given.pop(name, None)
    seed = given.pop("seed", None)
    if seed is not None and run.provenance["seed"] == "default":
        train = replace(train, seed=int(seed))
    for name, flag in GENERATION.items():
        if name in given:
            value = given.pop(name)
            if run.provenance[flag] in ("default", "args.json"):
                infer = replace(infer, **{flag: value})
    if given and run.evaluate.eval_url is None:
        name = next(iter(given))
        near = nearest(name, [*GENERATION, *OTHER])
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise usage_error(f"--eval_generation_config {name}: not offered{hint}; there are {', '.join(GENERATION)}")
    if infer.temperature is None:
        infer = replace(infer, temperature=0.0)
    return replace(run, infer=infer, train=train, evaluate=replace(run.evaluate, eval_generation_config=given or None))


def answerer_of(run: Run) -> Answerer:
    """What answers; the model is loaded, or the server asked for its name. ``run`` is :func:`with_generation`'s."""
    args = run.evaluate
    if args.eval_url is not None:
        check_url(args.eval_url)
        server = Server(args.eval_url, run.model.model or "", run.deploy.api_key, args.eval_timeout)
        return Remote(server, request_body(run), concurrency=args.concurrency, root_image_dir=run.data.root_image_dir)
    backend = run.deploy.infer_backend
    if backend != "tessera":
        return Deployed(run, backend, settings_of(run), request_body(run))
    # The limit of a benchmark is said with every question.
    session = Session.open(replace(run, infer=replace(run.infer, max_new_tokens=run.infer.max_new_tokens or 1)))
    return Embedded(session, {**settings_of(run), **sampling_of(run, session)})


def request_body(run: Run) -> dict[str, Any]:
    """What every request says of sampling: the flags that were given, and the rest of the generation config."""
    infer: InferArgs = run.infer
    flags = asdict(infer)
    body = {name: flags[name] for name in SAMPLING if flags[name] is not None}
    return {**body, **(run.evaluate.eval_generation_config or {})}


def settings_of(run: Run) -> dict[str, Any]:
    """The model and the limits of ``run`` that decide an answer, the model by the contents of its files."""
    model, data = asdict(run.model), asdict(run.data)
    assert run.model.model is not None, "checked by config.evaluate"
    found: dict[str, Any] = {"model": fingerprint_of(locate(run.model.model))}
    if run.model.hf_dir is not None:
        found["hf_dir"] = fingerprint_of(locate(run.model.hf_dir, "--hf_dir"))
    if run.model.adapters:
        found["adapters"] = [fingerprint_of(Path(name)) for name in run.model.adapters]
    found |= {name: model[name] for name in (*DECIDES, *QUANTISED) if model[name] is not None}
    return found | {name: data[name] for name in SHAPES if data[name] is not None}


def sampling_of(run: Run, session: Session) -> dict[str, Any]:
    """How ``session`` chooses tokens; the seed only where it draws."""
    found = asdict(session.sampling)
    return found if session.sampling.greedy else {**found, "seed": run.train.seed}


def model_name(run: Run, answerer: Answerer) -> str:
    """What results are called after: the directory of the model or adapter, a checkpoint's with its run's, or the
    server's name for it."""
    if isinstance(answerer, Remote):
        return answerer.model
    path = Path(run.model.adapters[0] if run.model.adapters else run.model.model or "model")
    return f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
