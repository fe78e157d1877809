"""The built wheel, away from the checkout: presets, demo models and data, and the model card's template are inside."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel alone."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True, timeout=300)
    (wheel,) = folder.glob("tsdkd-*.whl")
    assert any(name.endswith("LICENSE") for name in zipfile.ZipFile(wheel).namelist())
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, timeout=300)
    return folder / "site"


def run(site: Path, where: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command], cwd=where, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_wheel_works_elsewhere(site: Path, tmp_path: Path) -> None:
    where = run(site, tmp_path, "-c", "import tsdkd; print(tsdkd.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert "demo.yaml" in run(site, tmp_path, "-m", "tsdkd", "configs")
    out = run(site, tmp_path, "-m", "tsdkd", "train", "--config", "demo.yaml", "--max_steps", "2")
    assert "saved the student" in out
    assert (tmp_path / "runs" / "demo" / "model.safetensors").is_file()
    assert "TSD-KD" in (tmp_path / "runs" / "demo" / "README.md").read_text(encoding="utf-8")
