"""A backbone out of a pinned wheel: what is checked before anything is converted."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from mode.backbone import locate
from mode.settings import Backbone, ConfigError, WheelModel

PIN = "some-model==1.0"
CONTENT = b"GGUF but not really"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache that holds a wheel, so that nothing is fetched."""
    folder = tmp_path / "wheels" / PIN
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_model/model.gguf", CONTENT)
    return tmp_path


def backbone(cache: Path, *, member: str = "some_model/model.gguf", content: bytes = CONTENT) -> Backbone:
    digest = hashlib.sha256(content).hexdigest()
    wheel = WheelModel(requirement=PIN, member=member, sha256=digest, cache=str(cache))
    return Backbone(name="some", path="model.gguf", wheel=wheel)


def test_a_model_converted_before_is_found(cache: Path) -> None:
    made = cache / "backbones" / hashlib.sha256(CONTENT).hexdigest()[:16]
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}", "utf-8")
    assert locate(backbone(cache)) == made


def test_another_file_than_the_pinned_one_is_refused(cache: Path) -> None:
    with pytest.raises(ConfigError, match="not the pinned model"):
        locate(backbone(cache, content=b"something else"))
    with pytest.raises(ConfigError, match="the wheel has no member nothing"):
        locate(backbone(cache, member="nothing"))
    assert not (cache / "backbones").exists()


def test_a_damaged_wheel_is_refused(cache: Path) -> None:
    (wheel,) = (cache / "wheels" / PIN).glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:40])
    with pytest.raises(ConfigError, match="a damaged wheel"):
        locate(backbone(cache))


def test_a_file_that_is_no_gguf_leaves_nothing_behind(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read|gguf"):
        locate(backbone(cache))
    assert list((cache / "backbones").iterdir()) == []
