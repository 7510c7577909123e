"""The dependency direction of the packages, read from the source; README says why."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "convert"

BASE = {"errors", "dtypes", "units", "progress", "__version__"}
#: package or top-level module -> what else of adaconvert it may import, besides BASE and itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "dtypes": set(),
    "units": set(),
    "progress": set(),
    "io": set(),
    "arch": {"io"},
    "planning": {"io", "arch"},
    "modeling": {"kernels"},
    # the PEFT method of routed adapters
    "adapters": {"io", "modeling"},
    "auto": {"adapters", "arch", "kernels", "modeling"},
    "clustering": set(),
    "layerwise": {"io", "arch", "modeling"},
    "data": {"io", "layerwise"},
    "evaluate": {"io", "arch", "planning", "data", "layerwise", "modeling", "export"},
    "methods": {"io", "arch", "planning", "layerwise", "modeling", "clustering", "data"},
    "verification": {"io", "arch", "planning", "layerwise", "modeling"},
    "reports": {"io", "arch", "planning", "methods"},
    "train": {
        *("io", "arch", "planning", "data", "layerwise", "modeling", "methods"),
        *("export", "evaluate"),
    },
    "export": {"io", "arch", "planning", "layerwise", "modeling"},
    "activations": {"io", "arch", "layerwise", "data"},
    # of the runtime what it refuses of config.json
    "inspection": {"io", "arch", "planning", "methods", "modeling", "reports"},
    "proof": {"io", "arch", "planning", "methods", "verification"},
    "conversion": {
        *("io", "arch", "planning", "layerwise", "methods"),
        *("verification", "export", "reports", "inspection", "proof"),
    },
    "api": {
        *("activations", "conversion", "evaluate", "export", "inspection", "methods", "proof"),
        *("reports", "running", "stage_one", "train", "verification"),
    },
    "stage_one": {"io"},
    # the classes that check the options of a verb, and nothing that runs one
    "recipe": {"io", "methods", "evaluate", "train", "export", "recipes"},
    "running": {
        *("io", "arch", "planning", "data", "layerwise", "modeling", "methods"),
        *("recipe", "train", "reports", "conversion"),
    },
    "cli": {"api", "recipe"},
    "__init__": {"api"},
    "__main__": {"cli"},
    # shipped for the tests of method authors; nothing in the library imports it
    "testing": {
        *("io", "arch", "planning", "layerwise", "methods", "verification"),
        *("export", "reports", "inspection", "conversion", "api", "modeling", "data", "running"),
        "adapters",
    },
    "kernels": set(),
    "recipes": set(),
}
#: what may not be imported when the module is imported; inside a function it may.
HEAVY = {"torch", "transformers", "triton"}
NOT_AT_IMPORT = {
    "errors": HEAVY | {"numpy"},
    "dtypes": HEAVY | {"numpy"},
    "io": HEAVY | {"numpy", "huggingface_hub"},
    "arch": HEAVY | {"numpy"},
    "planning": HEAVY,
    "data": HEAVY | {"numpy", "datasets", "pyarrow"},
    "evaluate": HEAVY | {"lm_eval"},
    "cli": HEAVY | {"numpy", "huggingface_hub", "safetensors"},
    "activations": HEAVY | {"numpy"},
    "api": HEAVY,
    "recipe": HEAVY | {"numpy"},
    "running": HEAVY | {"numpy"},
    "__init__": HEAVY | {"numpy"},
}
MODULES = sorted(
    [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "kernels" / "ops").rglob("*.py"),
        ROOT / "recipes/__init__.py",
    ]
)


def layer_of(path: Path) -> str:
    """Return the package, or the module at the top, that a file belongs to."""
    if path.is_relative_to(PACKAGE):
        return path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "kernels" if path.is_relative_to(ROOT / "kernels") else "recipes"


class Flat(ast.Module):
    """The tree of a file that is copied into checkpoints."""


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Yield each import statement with the full name of what it imports.

    Files that are copied into checkpoints import their neighbours relatively.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and isinstance(tree, Flat):
                continue
            assert node.level == 0, f"relative import on line {node.lineno}"
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def at_import(tree: ast.Module) -> set[ast.AST]:
    """Return the statements that run when the module is imported."""
    found: set[ast.AST] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        found.add(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        todo.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    layer = layer_of(path)
    tree = ast.parse(path.read_text())
    if layer == "modeling":
        tree = Flat(body=tree.body, type_ignores=[])
    early = at_import(tree)
    for node, name in imports(tree):
        top, _, rest = name.partition(".")
        if top == "adaconvert":
            other = rest.partition(".")[0]
            allowed = ALLOWED[layer] | BASE | {layer}
            if layer == "__init__":
                allowed |= {"convert", "inspect", "plan", "verify"}
            assert other in allowed, (
                f"line {node.lineno}: {layer} may not import adaconvert.{other}"
            )
        elif node in early:
            assert top not in NOT_AT_IMPORT.get(layer, set()), (
                f"line {node.lineno}: {layer} may not import {top} at module level"
            )
        if layer == "io":
            knows = path.stem in ("reader", "fingerprint")
            assert top != "torch" or knows, "only read_torch and fingerprints know torch"


def test_every_layer_is_in_the_table() -> None:
    layers = {layer_of(path) for path in MODULES}
    assert layers - set(ALLOWED) == set()


def test_the_table_has_no_cycle() -> None:
    def reach(layer: str, seen: frozenset[str]) -> None:
        assert layer not in seen, f"{layer} reaches itself"
        for other in ALLOWED[layer]:
            reach(other, seen | {layer})

    for layer in ALLOWED:
        reach(layer, frozenset())


def test_nothing_in_the_library_imports_the_test_helpers_or_the_command_line() -> None:
    for layer, allowed in ALLOWED.items():
        assert "testing" not in allowed
        assert "cli" not in allowed or layer == "__main__"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("adaconvert", HEAVY | {"numpy", "click", "huggingface_hub"}),
        ("adaconvert.cli.main", HEAVY | {"numpy", "huggingface_hub"}),
        ("adaconvert.arch.registry", HEAVY | {"numpy"}),
        ("adaconvert.io.source", HEAVY | {"numpy"}),
        ("adaconvert.planning.ops", HEAVY | {"numpy"}),
        ("adaconvert.api", HEAVY),
    ],
)
def test_importing_a_module_loads_nothing_heavy(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
