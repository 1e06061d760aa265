"""Which file of configuration is read where the project, an installed package and the user have one each."""

from __future__ import annotations

from pathlib import Path

import pytest

from mode.config import groups
from mode.config.compose import compose
from mode.config.groups import conf_dirs, list_members, read_group
from mode.core.errors import ConfigError
from tests.support.refusals import refused


def write(folder: Path, *names: str) -> Path:
    """Write files of configuration that say which folder they are in, and return the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"from: {folder}\n", encoding="utf-8")
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of configuration of a package that registers a method."""
    folder = write(tmp_path / "norms" / "conf", "method/norms.yaml", "domain/code.yaml", "domain/my code.yaml")
    monkeypatch.setattr(groups, "list_registered_folders", lambda: (folder,))
    return folder


def test_a_file_of_the_project_goes_before_one_of_a_package(package: Path) -> None:
    assert "sources" in read_group("domain", "code")
    assert read_group("method", "norms") == {"from": str(package)}
    assert list_members("domain").count("code") == 1


def test_a_file_of_a_package_with_an_impossible_name_is_left_out(package: Path) -> None:
    assert (package / "domain" / "my code.yaml").exists()
    assert "my code" not in list_members("domain")


@pytest.mark.parametrize(
    ("name", "owner"), [("method/norms.yaml", "the package norms"), ("domain/code.yaml", "the project")]
)
def test_a_file_of_the_user_may_not_have_a_name_that_is_taken(
    tmp_path: Path, package: Path, name: str, owner: str
) -> None:
    assert (package / name).exists()
    own = write(tmp_path / "own", "method/mine.yaml")
    assert conf_dirs(own)[-1] == own
    write(own, name)
    with pytest.raises(ConfigError) as caught:
        conf_dirs(own)
    assert str(caught.value) == f"{own / name}: {owner} has a {name} too; choose another name"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_refused_with_its_name(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "domain" / "mine.yaml"
    path.parent.mkdir()
    path.write_bytes("description: ros\xe9\nlicence: own\nsources: []\nsplits: {}\n".encode(encoding))
    with refused(str(path), "UTF-8"):
        read_group("domain", "mine", tmp_path)
    with refused(str(path), "UTF-8"):
        compose(["targets=[mine]"], tmp_path)
