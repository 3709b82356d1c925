"""The layers of docs/design.rst: a module imports its own package and lower levels, nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "backupfs"
LEVELS = {
    "errors": 0,
    "ids": 0,
    "": 0,
    "workers": 1,
    "forked": 1,
    "memory": 1,
    "interrupts": 1,
    "chunking": 1,
    "codec": 1,
    "stores": 1,
    "repository": 2,
    "snapshots": 3,
    "localfs": 4,
    "disks": 4,
    "view": 4,
    "fuse": 5,
    "usecases": 6,
    "cli": 7,
    "__main__": 8,
}
ALONE = {"pyfuse3": "fuse", "boto3": "stores", "click": "cli"}
MODULES = sorted(ROOT.rglob("*.py"))


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = node.module == "backupfs"
            found |= {f"{node.module}.{alias.name}" if whole else str(node.module) for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_lower_levels(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    level = LEVELS["" if own == "__init__" else own]
    for module in imports_of(path):
        if module.split(".")[0] == "backupfs":
            other = part_of(module)
            if other == "__version__":
                continue
            assert LEVELS[other] < level or other == own, f"{path} imports {module}"
        alone = ALONE.get(module.split(".")[0])
        assert alone is None or alone == own, f"only {alone} may import {module}"


def test_every_part_has_a_level() -> None:
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert parts <= LEVELS.keys()


def test_modules_import_each_other_without_cycles() -> None:
    graph = {}
    names = {"backupfs." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    for name, path in names.items():
        graph[name] = {module for module in top_level_imports_of(path) if module in names}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a cycle: {' → '.join((*above, name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def top_level_imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found
