"""The import rules of the project, checked on the source and in fresh processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
ROOTS = {"harmonica_rt": REPO, "harmonica_kernels": REPO / "kernels", "harmonica_training": REPO / "training"}

# Each stage may import itself, the stages before it, the base and harmonica_kernels.
STAGES = ("capture", "passes", "plan", "lower", "runtime", "parity")
BASE = ("errors", "indices", "changes", "untrusted", "wrapped")


def allowed(importer: str, imported: str) -> bool:
    """Whether module `importer` may import module `imported`, both of this project, by dotted name."""
    package, target = importer.split(".")[0], imported.split(".")[0]
    if package == target and package != "harmonica_rt":
        return True
    if package == "harmonica_kernels":
        return False
    part, target_part = (f"{name}.".split(".")[1] for name in (importer, imported))
    if package == "harmonica_training":
        return target == "harmonica_rt" and target_part in ("schedule", "errors", "changes", "untrusted")
    if target == "harmonica_training":
        return part == "cli"  # one command line for both
    if part in BASE:
        return target == "harmonica_rt" and target_part in BASE
    if part == "schedule":
        return target == "harmonica_rt" and target_part in ("schedule", "errors", "untrusted", "wrapped")
    if part not in STAGES:  # the surface: api, backend, cli, ...
        return True
    earlier = STAGES[: STAGES.index(part) + 1]
    return target == "harmonica_kernels" or target_part in ("schedule", *BASE, *earlier)


def modules() -> Iterator[tuple[str, Path]]:
    for package, root in ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything of this project that a file imports, anywhere in the file."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in ROOTS:
                yield node.lineno, name


def test_imports_flow_one_way() -> None:
    edges = [(module, line, name, path) for module, path in modules() for line, name in imports(module, path)]
    assert edges, "found no imports at all: the test looks in the wrong place"
    wrong = [
        f"{path.relative_to(REPO)}:{line}: {module} may not import {name}"
        for module, line, name, path in edges
        if not allowed(module, name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("harmonica_rt.schedule.schedule", "harmonica_rt.errors", True),
        ("harmonica_rt.schedule.schedule", "harmonica_rt.capture", False),
        ("harmonica_rt.schedule.schedule", "harmonica_kernels", False),
        ("harmonica_rt.capture.graph", "harmonica_rt.schedule.Schedule", True),
        ("harmonica_rt.capture.graph", "harmonica_rt.plan", False),
        ("harmonica_rt.parity.verify", "harmonica_rt.capture.graph", True),
        ("harmonica_rt.lower.fused", "harmonica_kernels.gated_residual", True),
        ("harmonica_rt.runtime.run", "harmonica_rt.api", False),
        ("harmonica_rt.cli", "harmonica_rt.parity", True),
        ("harmonica_rt.cli.train", "harmonica_training", True),
        ("harmonica_rt.api", "harmonica_training", False),
        ("harmonica_kernels.gated_residual.op", "harmonica_kernels._build", True),
        ("harmonica_kernels.gated_residual.op", "harmonica_rt.errors", False),
        ("harmonica_training.trainer", "harmonica_rt.schedule", True),
        ("harmonica_training.trainer", "harmonica_rt.compile", False),
        ("harmonica_training.trainer", "harmonica_kernels", False),
    ],
)
def test_rule_itself(importer: str, imported: str, expected: bool) -> None:
    assert allowed(importer, imported) is expected


def in_fresh_process(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(root) for root in ROOTS.values())},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["harmonica_rt", "harmonica_kernels"])
def test_import_is_light(package: str) -> None:
    in_fresh_process(
        f"import sys, {package}, torch\n"
        "heavy = {'triton', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        f"assert not heavy, f'import {package} imports {{heavy}}'\n"
        f"assert not torch.cuda.is_initialized(), 'import {package} initialises CUDA'\n"
    )


def test_training_needs_no_triton() -> None:
    in_fresh_process("import sys; sys.modules['triton'] = None; import harmonica_training")
