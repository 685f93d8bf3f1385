"""onenight/system/requirements.py: versions that are too old are refused with one sentence."""

import importlib.metadata
import re
import sys

import pytest

from helpers import ROOT
from onenight.system.requirements import PACKAGES, check_requirements


@pytest.fixture
def installed(monkeypatch):
    """Return a function that sets the versions that seem to be installed."""

    def set_versions(**versions):
        def version(package):
            if package not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return set_versions


@pytest.mark.parametrize(
    "versions, words",
    [
        ({"numpy": "1.26.4"}, "numpy 1.26.4 is too old: 2.0 or newer is needed (pip install"),
        ({"torch": "2.4.1+cu121"}, "torch 2.4.1+cu121 is too old: 2.8 or newer is needed (pip"),
        ({"torch": "1.13.1", "numpy": "1.23.0"}, "2.0 or newer is needed; torch 1.13.1 is too old"),
        ({"tiktoken": "0.7.0"}, "tiktoken 0.7.0 is too old: 0.9 or newer"),
    ],
)
def test_packages_that_are_too_old_are_refused(installed, versions, words):
    installed(**versions)
    with pytest.raises(SystemExit) as refusal:
        check_requirements()
    assert words in refusal.value.code
    assert len(refusal.value.code.splitlines()) == 1


@pytest.mark.parametrize(
    "versions",
    [
        {},  # conda may install packages without this information
        {"numpy": "2.0.0rc1", "torch": "2.10.0a0+git1f2e", "tiktoken": "0.14.0"},
        {"numpy": "10.0", "torch": "3", "tiktoken": "unknown"},
    ],
)
def test_newer_packages_and_unknown_versions_are_accepted(installed, versions):
    installed(**versions)
    check_requirements()


def test_the_tested_versions_are_accepted():
    text = (ROOT / "requirements.txt").read_text()
    for package, needed in PACKAGES.items():
        pinned = re.findall(rf"^{package}==(\d+)\.(\d+)", text, re.MULTILINE)
        assert pinned
        for numbers in pinned:
            assert tuple(map(int, numbers)) >= needed


def test_a_python_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match="Python 3.9 is too old: 3.10 or newer is needed"):
        check_requirements()
