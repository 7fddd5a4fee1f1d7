"""Finds the extra of harmonica-rt that installs a missing package, in the metadata of the installation."""

from __future__ import annotations

import re
from importlib import metadata

_PROJECT = "harmonica-rt"
_MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "nvidia-ml-py": "pynvml", "protobuf": "google"}
"""Names under which packages are imported, where they differ from the package's own."""


def missing(name: str) -> str | None:
    """How to install a package that we require or one of our extras has; None if it is installed, or is neither.

    Args:
        name: the package, or the module that it is imported as.
    """
    package = next((package for package, module in _MODULES.items() if module == name), _normal(name))
    if package not in _extras() or _installed(package):
        return None
    return f"the package {package} is not installed: {install(package)}"


def remedy(error: ImportError) -> str | None:
    """What to install after a failed import; None if it failed for another reason than a missing package.

    Libraries that import lazily name the package in the text of an error of their own.
    """
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "harmonica_rt":
        top = error.name.partition(".")[0]
        return missing(top) or f"the package {top} is not installed: pip install {top}"
    words = re.findall(r"[A-Za-z][\w-]*", str(error))
    return next((found for word in words if (found := missing(word))), None)


def install(package: str) -> str:
    """The command that installs a package in a version that harmonica-rt works with."""
    extras = _extras().get(_normal(package), ())
    return f"pip install '{_PROJECT}[{extras[0]}]'" if extras else f"pip install {_PROJECT}"


def _extras() -> dict[str, list[str]]:
    """Package -> the extras that have it, the smallest first; no extras for a package that is always required."""
    members: dict[str, list[str]] = {}
    always: list[str] = []
    try:
        requirements = metadata.requires(_PROJECT) or []
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        requirements = []
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", requirement)
        if name and extra:
            members.setdefault(extra.group(1), []).append(_normal(name.group()))
        elif name:
            always.append(_normal(name.group()))
    found: dict[str, list[str]] = {name: [] for name in always}
    for extra_name, names in sorted(members.items(), key=lambda item: len(item[1])):
        for each in names:
            if each not in always:
                found.setdefault(each, []).append(extra_name)
    return found


def _normal(name: str) -> str:
    """The name of a package as the metadata of installations compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
