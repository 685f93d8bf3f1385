"""Checks that Python and the installed packages are new enough.

This file must be readable by older versions of Python than the project needs.
"""

import importlib.metadata
import re
import sys

PYTHON = (3, 10)
# The oldest versions that have what the project uses; requirements.txt has the tested ones. torch:
# the setting that caches compiled models with a custom autograd.Function; tiktoken:
# encode_to_numpy().
PACKAGES = {"numpy": (2, 0), "torch": (2, 8), "tiktoken": (0, 9)}


def check_requirements():
    """Exit with one sentence if Python or a package is too old.

    A package that is missing is not reported, because not every script needs each of them.
    """
    if sys.version_info < PYTHON:
        found = words(sys.version_info[:2])
        sys.exit(f"Python {found} is too old: {words(PYTHON)} or newer is needed")
    too_old = []
    for package, needed in PACKAGES.items():
        found = installed_version(package)
        numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
        if numbers and numbers < needed:
            too_old.append(f"{package} {found} is too old: {words(needed)} or newer is needed")
    if too_old:
        sys.exit(f"{'; '.join(too_old)} (pip install -r requirements.txt installs it)")


def installed_version(package: str) -> str:
    """Return the version of an installed package without importing it, or "" if it is unknown."""
    try:
        return importlib.metadata.version(package) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def words(version) -> str:
    """Return a version as text: (3, 10) is "3.10"."""
    return ".".join(str(number) for number in version)
