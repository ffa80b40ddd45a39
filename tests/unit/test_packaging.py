"""What an installed package must carry: every module, the configuration, the data files."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_and_mapped_folder_is_listed():
    folders = {path.parent for path in (ROOT / "nemo_minitron").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETUPTOOLS["packages"]) == packages | set(SETUPTOOLS["package-dir"])


def test_every_file_of_conf_and_data_matches_a_pattern():
    folders = {package: ROOT / package.replace(".", "/") for package in SETUPTOOLS["packages"]}
    folders |= {package: ROOT / folder for package, folder in SETUPTOOLS["package-dir"].items()}
    for package, patterns in SETUPTOOLS["package-data"].items():
        carried = {file for pattern in patterns for file in folders[package].glob(pattern)}
        files = {file for file in folders[package].rglob("*") if file.is_file() and file.suffix not in {".py", ".pyc"}}
        assert files <= carried, package
