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

# What harmonica_rt is made of, in the order data flows: each may import itself and what comes before it. From `model`
# on, each may also import harmonica_kernels, whose extension tells whether a model has changed, and runs operators.
ROOMS = (
    *("untrusted", "version", "errors", "options", "indices", "changes", "torch_state", "wrappers"),
    *("schedule", "call", "model", "graph", "capture", "plan", "lower", "planfile"),
    *("engine", "reference_engine", "execute", "sampling", "pipelines"),
    *("plan_report", "report", "parity", "fitting", "arguments", "backend", "api"),
)
SURFACE = ("demo", "recipes", "cli")  # they use the package as its users do, and each other
CONTRACT = ("untrusted", "errors", "wrappers", "schedule")  # all that the schedule imports


def allowed(importer: str, imported: str) -> bool:
    """Whether module `importer` may import module `imported`, both of this project, by dotted name."""
    package, target = importer.split(".")[0], imported.split(".")[0]
    if package == target and package != "harmonica_rt":
        return True
    if package == "harmonica_kernels":
        return False
    part, target_part = (f"{name}.".split(".")[1] for name in (importer, imported))
    if package == "harmonica_training":
        return target == "harmonica_rt" and target_part in ("changes", *CONTRACT)
    if target == "harmonica_training":
        return part == "cli"  # one command line for both
    if part in ("", *SURFACE):
        return True
    if target == "harmonica_kernels":
        return ROOMS.index(part) >= ROOMS.index("model")
    if part == "schedule":
        return target_part in CONTRACT
    return target_part in ROOMS[: ROOMS.index(part) + 1]


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


def test_every_module_has_its_room() -> None:
    found = {f"{module}.".split(".")[1] for module, _ in modules() if module.split(".")[0] == "harmonica_rt"}
    assert found == {"", *ROOMS, *SURFACE}


def test_no_files_import_each_other_in_a_circle() -> None:
    """Also not for annotations, or within functions."""
    files = dict(modules())
    graph: dict[str, set[str]] = {
        module: {
            target
            for _, name in imports(module, path)
            if (target := name if name in files else name.rpartition(".")[0]) in files and target != module
        }
        for module, path in files.items()
    }
    graph["harmonica_rt"].clear()  # its names come with the first use of each
    while leaves := {module for module, targets in graph.items() if not targets}:
        graph = {module: targets - leaves for module, targets in graph.items() if module not in leaves}
    assert graph == {}


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("harmonica_rt.schedule.schedule", "harmonica_rt.errors", True),
        ("harmonica_rt.schedule.schedule", "harmonica_rt.capture", False),
        ("harmonica_rt.schedule.schedule", "harmonica_kernels", False),
        ("harmonica_rt.capture.capture", "harmonica_rt.schedule.Schedule", True),
        ("harmonica_rt.capture.capture", "harmonica_rt.plan", False),
        ("harmonica_rt.parity.verify", "harmonica_rt.capture.capture", True),
        ("harmonica_rt.lower.fused", "harmonica_kernels.gated_residual", True),
        ("harmonica_rt.sampling.run", "harmonica_rt.api", False),
        ("harmonica_rt.sampling.denoiser", "harmonica_rt.pipelines.install", False),
        ("harmonica_rt.pipelines.install", "harmonica_rt.sampling.denoiser", True),
        ("harmonica_rt.planfile.file", "harmonica_rt.compile", False),
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


def test_imports_are_light_and_training_needs_no_triton() -> None:
    """One process for all three packages: most of its time goes to torch."""
    in_fresh_process(
        "import importlib, sys, torch\n"
        "for package in ('harmonica_kernels', 'harmonica_rt'):\n"
        "    importlib.import_module(package)\n"
        "    heavy = {'triton', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, f'import {package} imports {heavy}'\n"
        "    assert not torch.cuda.is_initialized(), f'import {package} initialises CUDA'\n"
        "sys.modules['triton'] = None\n"
        "import harmonica_training\n"
    )
