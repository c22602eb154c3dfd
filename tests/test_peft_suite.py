"""The runner of PEFT's tests: what it fetches, what it keeps, and when a run counts as failed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from ranktune import DoraConfig, RankConfig
from tests.peft_suite import selection, source, subjects, verdict

VERSION = "9.9"


def write_archive(folder: Path, version: str) -> Path:
    """A stand-in for PEFT's source archive, with a file beside the tests that tries to leave the folder."""
    names = [f"peft-{version}/tests/{name}" for name in source.TEST_MODULES + source.SHARED_MODULES]
    path = folder / f"peft-{version}.tar.gz"
    folder.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name in [*names, "../../escaped.py"]:
            member = tarfile.TarInfo(name)
            member.size = len(b"x = 1\n")
            archive.addfile(member, io.BytesIO(b"x = 1\n"))
    return path


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The versions that were downloaded; nothing leaves the machine, and no model is built."""
    made: list[str] = []

    def download(folder: Path, version: str) -> Path:
        made.append(version)
        return write_archive(folder, version)

    monkeypatch.setattr(source, "_download", download)
    monkeypatch.setattr(source.hub, "build", lambda folder: (folder / "model").mkdir(parents=True))
    return made


def test_the_tests_are_fetched_once_and_nothing_else_is_written(tmp_path: Path, downloads: list[str]) -> None:
    folder = tmp_path / "project" / ".peft-suite"
    layout = source.prepare(folder, VERSION)
    assert source.prepare(folder, VERSION) == layout
    assert downloads == [VERSION]
    assert {path.name for path in (layout / source.PACKAGE).iterdir()} == {
        "__init__.py",
        *source.TEST_MODULES,
        *source.SHARED_MODULES,
    }
    assert not list(tmp_path.rglob("escaped.py"))
    assert [path.name for path in folder.iterdir()] == [layout.name]


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_folder_is_fetched_again(tmp_path: Path, downloads: list[str], damage: str) -> None:
    module = source.prepare(tmp_path, VERSION) / source.PACKAGE / source.TEST_MODULES[0]
    if damage == "change":
        module.write_text("x = 2\n")
    else:
        module.unlink()
    source.prepare(tmp_path, VERSION)
    assert downloads == [VERSION, VERSION]
    assert module.read_text() == "x = 1\n"


def test_an_archive_without_the_tests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_download", lambda folder, version: write_archive(folder, version + ".1"))
    with pytest.raises(source.SourceError, match=r"no file peft-9\.9/tests/"):
        source.prepare(tmp_path, VERSION)
    assert not list(tmp_path.iterdir())


def test_failures_and_idle_explanations_are_complaints() -> None:
    outcomes = {
        "T::one[a]": {"config": "A", "outcome": "failed"},
        "T::two[a]": {"config": "A", "outcome": "explained"},
        "T::three[b]": {"config": "B", "outcome": "passed"},
    }
    used = verdict.Explanation(r"T::two\[.*\]", "known")
    idle = verdict.Explanation(r"T::two", "covers no whole id")
    assert verdict.complaints(outcomes, [used], complete=True) == ["failed: T::one[a]"]
    assert len(verdict.complaints(outcomes, [used, idle], complete=True)) == 2
    assert len(verdict.complaints(outcomes, [used, idle], complete=False)) == 1


def test_every_explanation_in_the_project_has_a_reason_and_a_valid_pattern() -> None:
    for explanation in verdict.read_explanations():
        assert explanation.reason.strip()
        assert not explanation.covers("")


def test_every_module_that_is_fetched_has_a_selection() -> None:
    assert {f"{module}.py" for module in selection.SELECTIONS} == set(source.TEST_MODULES)


def test_each_rewritten_test_meets_the_configs_it_is_about() -> None:
    found = subjects.load_subjects()
    chosen = selection.Selection(
        rewritten=("T.*",), for_one_config=("T.once",), for_fixed_ranks=("T.ranks",), left_out={"why": ("T.other",)}
    )
    assert chosen.rewritten_for("T.any", found) == found
    assert chosen.rewritten_for("T.once", found) == found[:1]
    assert {subject.config_cls for subject in chosen.rewritten_for("T.ranks", found)} >= {RankConfig, DoraConfig}
    assert chosen.rewritten_for("T.other", found) == []
    assert chosen.reason_left_out("T.other") == "why"
    assert chosen.rewritten_for("U.any", found) == []
    assert chosen.reason_left_out("U.any") is None


def test_a_config_written_for_lora_is_built_as_ours() -> None:
    found = {subject.config_cls: subject for subject in subjects.load_subjects()}
    assert [RankConfig, DoraConfig] == list(found)[:2]
    config = found[RankConfig].build(target_modules=["q"], init_lora_weights=False)
    assert type(config) is RankConfig
    assert config.init_weights is False
    assert found[DoraConfig].kwargs["use_dora"] is True
