"""The floors of the package: an import only ever points down, and libraries load when first used."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "cavmae_fast"
WORDS = {"errors", "clip", "compat"}
"Files of the package itself that every floor may import: they import none."
BELOW = {
    **{word: set() for word in WORDS},
    "reference": set(),
    "ops": {"reference"},
    "models": {"ops", "reference"},
    "data": {"ops", "reference"},
    "training": {"evaluation", "models", "data", "ops", "reference"},
    "evaluation": {"models", "data", "ops", "reference"},
    "tuning": {"models", "ops", "reference"},
    "doctor": {"training", "models", "data", "ops", "reference"},
    "__main__": {"cli"},
    "cli": {"doctor", "tuning", "training", "evaluation", "models", "data", "ops", "reference"},
}
"What each floor may import, besides itself. `data` is a wing of its own."
ANYWHERE = {"torch", "numpy", "triton", "safetensors"}
"Libraries that modules below the command line may import at the top."
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def module_of(path: Path) -> list[str]:
    parts = [*path.relative_to(ROOT.parent).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(tree: ast.AST, path: Path, package: list[str] | None = None) -> list[tuple[str, ast.AST]]:
    """Absolute dotted names of all that `tree` imports, wherever in the file (each name of a `from` import)."""
    if package is None:
        package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{module}.{alias.name}", node) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                found.append((name.value if not name.value.startswith(".") else f"cavmae_fast{name.value}", node))
    return found


def floor_of(name: str) -> str | None:
    """The floor that an absolute dotted name belongs to; 'root' for the package itself, None for others'."""
    parts = name.split(".")
    if parts[0] != "cavmae_fast":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in BELOW else "root"


def upward(source: str, path: Path) -> list[str]:
    """The imports of `source` that do not point down."""
    own = module_of(path)[1]
    allowed = BELOW[own] | WORDS | {own}
    bad = []
    for name, node in imports(ast.parse(source), path):
        floor = floor_of(name)
        if floor is not None and floor not in allowed and name != "cavmae_fast.__version__":
            bad.append(f"{path.relative_to(ROOT.parent)}:{node.lineno} imports {name}")
    return bad


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = module_of(path)[1]
    assert own in BELOW, f"{path} stands on no floor: {', '.join(BELOW)}"
    assert upward(path.read_text(), path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_native_sources_are_not_imported(path):
    """csrc is no Python: its libraries are loaded with ctypes by ops alone."""
    names = [name for name, _ in imports(ast.parse(path.read_text()), path)]
    assert not any("csrc" in name.split(".") for name in names)
    assert "ctypes" not in names or module_of(path)[1] == "ops"
    assert not any(name.split(".")[0] in ("tests", "benchmarks", "setup") for name in names)


def at_import(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: no function bodies, no TYPE_CHECKING blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_other_libraries_load_when_first_used(path):
    if module_of(path)[1] == "cli":
        pytest.skip("the command line is where its own libraries are used")
    allowed = ANYWHERE | {"cavmae_fast"} | sys.stdlib_module_names
    names = {name.split(".")[0] for name, _ in imports(at_import(ast.parse(path.read_text())), path)}
    assert names <= allowed
    if module_of(path)[1] in ("reference", "models", "data"):
        assert "triton" not in names  # kernels are ops' business


def test_no_import_runs_code_on_a_device():
    """No call of torch.cuda at module level."""
    for path in FILES:
        tree = at_import(ast.parse(path.read_text()))
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not any(call.startswith("torch.cuda") or call == "print" for call in calls), path


@pytest.mark.parametrize(
    "floor, source, wrong",
    [
        ("ops", "from ..models.cavmae import CAVMAE", True),
        ("ops", "from ..reference import operators", False),
        ("ops", "from . import layout", False),
        ("reference", "def f():\n    from cavmae_fast import ops", True),
        ("reference", "import cavmae_fast.ops.layout", True),
        ("reference", "from .. import ops", True),
        ("models", "from cavmae_fast.data.loader import Loader", True),
        ("models", "import cavmae_fast", True),
        ("models", "from .. import __version__", False),
        ("data", "from ..models import CAVMAE", True),
        ("data", "from ..ops.log_mel_fbank import log_mel_fbank", False),
        ("evaluation", "from ..training import pretrain", True),
        ("tuning", "from cavmae_fast.training import fit", True),
        ("models", "from cavmae_fast.tuning import tune", True),
        ("tuning", "from cavmae_fast.models import CAVMAE", False),
        ("training", "from ..models import CAVMAE\nfrom ..data import loader", False),
        ("models", "import importlib\nimportlib.import_module('cavmae_fast.cli')", True),
    ],
)
def test_this_test_finds_upward_imports(floor, source, wrong):
    assert bool(upward(source, ROOT / floor / "file.py")) == wrong
