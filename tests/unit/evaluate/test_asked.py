"""Which benchmarks are meant, and where they are looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import resolve
from tessera.evaluate.asked import REPOSITORIES, find, jobs_of
from tessera.evaluate.tasks import BENCHMARKS
from tessera.evaluate.tasks import find as find_task


def jobs(*words: str | Path) -> list[Any]:
    return jobs_of(resolve(["eval", "--model", "org/m", *map(str, words)], {}), Path("out"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MMMU_DEV_VAL", "mmmu@vlmevalkit"),
        ("mmmu@official", "mmmu@official"),
        ("MMMU_DEV_VAL@megatron", "mmmu@megatron"),
        ("MMBench_DEV_EN_V11", "mmbench@vlmevalkit"),
        ("TextVQA_VAL", "textvqa@official"),
        ("MathVista_MINI", "mathvista@vlmevalkit"),
        ("LaTeX_OCR", "latexocr@im2markup"),
    ],
)
def test_names_of_benchmarks_and_of_their_splits(name: str, meant: str) -> None:
    assert find(name).name == meant


def test_repositories_are_of_benchmarks_that_exist() -> None:
    assert {find_task(name).name.partition("@")[0] for name in REPOSITORIES} <= {
        name.partition("@")[0] for name in BENCHMARKS
    }


def test_settings_of_one_benchmark_hold_over_the_common_ones(tmp_path: Path) -> None:
    args = f'{{"MMMU": {{"local_path": "{tmp_path}", "limit": 3, "max_new_tokens": 7, "name": "few"}}}}'
    few, all_of_it = jobs("--eval_datasets", "MMMU", f"POPE={tmp_path}", "--eval_dataset_args", args,
                          "--eval_limit", "9", "--max_new_tokens", "5")  # fmt: skip
    assert (few.name, few.limit, few.tokens, few.path) == ("few", 3, 7, tmp_path)
    assert (all_of_it.name, all_of_it.limit, all_of_it.tokens) == ("POPE", 9, 5)
    [plain] = jobs("--eval_datasets", f"POPE={tmp_path}")
    assert plain.tokens == find("POPE").max_new_tokens
    for wrong in ('{"POPE": {"limit": 0}}', '{"POPE": {"limit": "x"}}', '{"POPE": 3}'):
        with pytest.raises(UserError, match="--eval_dataset_args POPE: "):
            jobs("--eval_datasets", f"POPE={tmp_path}", "--eval_dataset_args", wrong)


def test_a_common_directory_holds_benchmarks_by_name(tmp_path: Path) -> None:
    (tmp_path / "MMMU.tsv").write_text("x")
    (tmp_path / "pope").mkdir()
    found = jobs("--eval_datasets", "MMMU", "POPE", "--local_path", tmp_path)
    assert [job.path.name for job in found] == ["MMMU.tsv", "pope"]
    with pytest.raises(UserError, match=r"holds no ChartQA"):
        jobs("--eval_datasets", "ChartQA", "POPE", "--local_path", tmp_path)


def test_nothing_is_fetched_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fetched: list[str] = []

    def download(repository: str, **more: Any) -> str:
        assert more["repo_type"] == "dataset"
        fetched.append(repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="nothing is fetched unless --download true"):
        jobs("--eval_datasets", "MMMU")
    with pytest.raises(UserError, match="no such file or directory"):
        jobs("--eval_datasets", "MMMU=me/mmmu")
    assert fetched == []
    [one] = jobs("--eval_datasets", "MMMU", "--download", "true")
    [two] = jobs("--eval_datasets", "MMMU=me/mmmu", "--download", "true")
    assert (one.path, two.path, fetched) == (tmp_path, tmp_path, ["MMMU/MMMU", "me/mmmu"])

    def offline(repository: str, **more: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"--download true: MMMU/MMMU cannot be fetched \(no network\)"):
        jobs("--eval_datasets", "MMMU", "--download", "true")
