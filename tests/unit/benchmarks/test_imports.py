"""Benchmarks are not run by the tests: what they import from the package has to be there all the same."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def defined(module):
    """Names that a module of the package has at its top level."""
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    names = {child.stem for child in path.glob("*.py")} if path.is_dir() else set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
               and node.module is not None and node.module.split(".")[0] == "nemo_minitron"]
    assert imports
    missing = {f"{node.module}.{alias.name}" for node in imports for alias in node.names
               if alias.name not in defined(node.module)}
    assert not missing
