"""Build of harmonica-rt: one wheel from three source roots, and the C++ extension of its kernels.

The extension has to be compiled against the torch that it will run beside. An isolated build
(`pip install .`) does not see that torch, and a torch listed as a build requirement would be another one,
gigabytes large. So torch is no build requirement: the build asks the interpreter it runs under where torch is
installed, outside of the isolation, and needs nothing from it but headers and libraries.

HARMONICA_BUILD_CSRC=auto (default)  build if torch is found, else go on without the extension and say so
                     1               build, fail if torch is not found
                     0               do not build
HARMONICA_BUILD_ARGS                 more arguments for the compiler and the linker, as `make sanitize` gives

A compilation that fails always fails the build. What was built, or why nothing was, goes into
`harmonica_kernels/_C.build.json` beside the extension.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError, PlatformError

ROOT = Path(__file__).resolve().parent
URL = "https://github.com/harmonica-rt/harmonica-rt"
EXTENSION = "harmonica_kernels._C"
RECORD = "_C.build.json"
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
ROOTS = {"harmonica_rt": ".", "harmonica_kernels": "kernels", "harmonica_training": "training"}

# -ffp-contract=off: no fma, so that results equal the reference bit for bit on every machine.
# -fno-math-errno -fno-trapping-math: loops with comparisons are vectorised under them; they change no result.
COMPILE_ARGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Torch's own headers set off -Wmaybe-uninitialized once inlined.
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]

INSTALL_REQUIRES = [
    "torch>=2.10",
    "diffusers>=0.36",
    "huggingface_hub>=0.34",
    "numpy>=1.26",
    "safetensors>=0.4",
    "typer>=0.12",
    "rich>=13",
    "matplotlib>=3.8",
    "pillow>=10",
    "nvidia-ml-py>=12",
    'triton>=3.4,!=3.5.1; platform_system == "Linux"',
]
# What diffusers pipelines with text encoders need, and adapters on their denoisers.
MODEL_EXTRAS = ["transformers>=4.50", "accelerate>=1.0", "sentencepiece>=0.2", "protobuf>=4", "peft>=0.17"]
EXTRAS = {
    "models": MODEL_EXTRAS,
    "train": ["scikit-learn>=1.4", "tensorboard>=2.16", "tqdm>=4.66"],
    "bench": [*MODEL_EXTRAS, "scikit-learn>=1.4", "torchmetrics>=1.4"],
    "test": [
        *MODEL_EXTRAS,
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        "torchmetrics>=1.4",
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
    ],
    "lint": ["ruff>=0.9", "mypy>=1.13"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],
}


class BuildPython(build_py):
    """`build_py` that begins with an empty folder: what an earlier build left there would go into the wheel."""

    def run(self) -> None:
        """Remove what was built before, then copy the packages."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtension(build_ext):
    """`build_ext` that finds torch, and leaves a record of what it did."""

    def run(self) -> None:
        """Build against the torch of the target environment, or say why not."""
        choice = os.environ.get("HARMONICA_BUILD_CSRC", "auto")
        if choice not in ("auto", "1", "0"):
            raise PlatformError(f"HARMONICA_BUILD_CSRC is {choice!r}, expected one of auto, 1, 0")
        torch_folder = None if choice == "0" else find_torch()
        if choice == "0":
            self._record = {"reason": "the build was told so: HARMONICA_BUILD_CSRC=0", "chosen": "yes"}
        elif torch_folder is None:
            if choice == "1":
                raise PlatformError(f"HARMONICA_BUILD_CSRC=1, but {sys.executable} has no torch; install torch first")
            self._record = {"reason": "no torch was installed when harmonica-rt was built"}
        else:
            self._use(torch_folder)
        if "torch" not in self._record:
            self.extensions = []
            say(f"building WITHOUT the C++ extension: {self._record['reason']}")
            # Of this build alone: a wheel that is built without the extension leaves that of an editable install be.
            (self._record_folder() / "_C.so").unlink(missing_ok=True)
        super().run()
        self._write_record(self._record_folder())

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, with a hint on failure."""
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            hint = "it needs a C++20 compiler; HARMONICA_BUILD_CSRC=0 installs without it"
            raise type(error)(f"the C++ extension of harmonica_kernels did not build: {error}; {hint}") from error

    def get_ext_filename(self, fullname: str) -> str:
        """`harmonica_kernels/_C.so`: it is loaded by torch, not imported, so it carries no Python ABI tag."""
        return str(Path(*fullname.split("."))) + ".so"

    def copy_extensions_to_source(self) -> None:
        """Inplace and editable builds: the record goes where the extension goes."""
        super().copy_extensions_to_source()
        self._write_record(Path(ROOTS["harmonica_kernels"]) / "harmonica_kernels")

    def _use(self, torch_folder: Path) -> None:
        self.force = True  # objects of an earlier build may hold the headers of another torch
        version = torch_version(torch_folder)
        (ext,) = self.extensions
        include = torch_folder / "include"
        more = shlex.split(os.environ.get("HARMONICA_BUILD_ARGS", ""))
        ext.extra_compile_args = [*COMPILE_ARGS, *WARNINGS, "-isystem", str(include), *more]
        ext.extra_link_args = more
        ext.library_dirs = [str(torch_folder / "lib")]
        ext.libraries = ["c10", "torch_cpu"]
        self._record = {"torch": version, "compiler": compiler(), "library": "_C.so"}
        say(f"building the C++ extension against torch {version} with {self._record['compiler']}")

    def _record_folder(self) -> Path:
        root = ROOTS["harmonica_kernels"] if self.inplace else self.build_lib
        return Path(root) / "harmonica_kernels"

    def _write_record(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        record = {**self._record, "source": str(ROOT)}  # to build it again from
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def find_torch() -> Path | None:
    """Folder of the torch that this interpreter has outside of an isolated build; None if it has none.

    pip isolates a build through environment variables: the same interpreter started with -E shows the target.
    """
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    origin = subprocess.run(
        [sys.executable, "-E", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=sysconfig.get_path("data"),
    ).stdout.strip()
    return Path(origin).parent if origin else None


def torch_version(torch_folder: Path) -> str:
    """Version of a torch, read and not imported."""
    text = (torch_folder / "version.py").read_text()
    match = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    if match is None:
        raise PlatformError(f"{torch_folder / 'version.py'} names no version")
    return match.group(1)


def compiler() -> str:
    """First line of what the C++ compiler says of itself."""
    command = [*shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"), "--version"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        hint = "install a C++20 compiler, or set HARMONICA_BUILD_CSRC=0 to install without the C++ extension"
        raise PlatformError(f"the C++ compiler does not run: {shlex.join(command)}: {error}; {hint}") from error
    return said.splitlines()[0]


def say(message: str) -> None:
    """Print to stderr, which pip shows with -v and when the build fails."""
    print(f"harmonica-rt: {message}", file=sys.stderr, flush=True)


def package_dirs() -> dict[str, str]:
    """Where the packages of the two roots other than "." lie."""
    return {package: f"{root}/{package}" for package, root in ROOTS.items() if root != "."}


def long_description() -> str:
    """The README, with links that lead somewhere from a package index too."""
    text = (ROOT / "README.md").read_text("utf-8")
    pictures = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\g<1>{URL}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{URL}/blob/main/", pictures)


if platform.system() == "Windows":
    raise PlatformError("harmonica-rt builds on Linux and macOS; on Windows use it inside WSL")

setup(
    name="harmonica-rt",
    version="0.1.0",
    description="Compiler and runtime for Diffusion Transformers with cached features",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="harmonica-rt developers",
    url=URL,
    project_urls={
        "Documentation": f"{URL}/tree/main/docs",
        "Changes": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
    },
    keywords=["diffusion", "transformers", "caching", "inference", "torch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[package for name, root in ROOTS.items() for package in find_packages(root, include=[name, f"{name}.*"])],
    package_dir=package_dirs(),
    package_data={
        "harmonica_rt": [
            "py.typed",
            "demo/digits-dit/**/*",
            "demo/digits-dit/*",
            "demo/emoji-pixart/**/*",
            "demo/emoji-pixart/*",
            "schedule/known/*.json",
            "recipes/*.json",
        ],
        "harmonica_kernels": ["py.typed"],
        "harmonica_training": ["py.typed"],
    },
    ext_modules=[Extension(EXTENSION, SOURCES, depends=HEADERS, language="c++")],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["harmonica-rt = harmonica_rt.cli:main"],
        "torch_dynamo_backends": ["harmonica = harmonica_rt.backend:harmonica"],
    },
    zip_safe=False,
)
