"""Tests of the project's structure: imports between packages, content of the wheel, and the docs."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {
    "resight": ROOT / "src/resight",
    "resight.training": ROOT / "training",
    "resight.exporters": ROOT / "exporters",
    "resight.service": ROOT / "service",
    "resight.v1": ROOT / "proto/resight/v1",
}
# What each package may import besides itself, also inside functions. "core" stands for the modules directly in
# resight, which import no package; names without a dot are packages of resight.
TRAINING_BASE = "core encoder bundle runtime metrics neighbours training"
ALLOWED = {
    "bundle": "core",
    "encoder": "core",
    "metrics": "core",
    "neighbours": "core",
    "runtime": "core bundle",
    "client": "core v1",
    "cycle": "core bundle client",
    "demo": "core bundle encoder metrics client exporters training training.*",
    "cli": "core bundle encoder metrics neighbours runtime client cycle demo exporters training.* service service.*",
    "exporters": "core bundle encoder runtime",
    "training": "core",
    "training.store": TRAINING_BASE,
    "training.features": f"{TRAINING_BASE} training.store",
    "training.ingest": f"{TRAINING_BASE} training.store",
    "training.curation": f"{TRAINING_BASE} training.store",
    "training.clustering": f"{TRAINING_BASE} training.store",
    "training.evaluation": f"{TRAINING_BASE} training.store training.features",
    "training.adaptation": f"{TRAINING_BASE} training.store training.features training.clustering",
    "training.judging": f"{TRAINING_BASE} training.store training.features training.clustering training.curation",
    "training.calibration": f"{TRAINING_BASE} training.store training.clustering training.judging",
    "training.report": f"{TRAINING_BASE} training.store training.features training.clustering training.curation "
    "training.evaluation training.judging training.calibration",
    "training.synthetic": f"{TRAINING_BASE} training.store training.features training.adaptation training.evaluation "
    "training.report",
    # The modules directly in service are the records at its bottom and the application at its top.
    "service": "core bundle runtime neighbours client v1 service.*",
    "service.storage": "core v1 service",
    "service.access": "core v1 service",
    "service.inference": "core bundle runtime v1 service",
    "service.index": "core service service.storage",
    "service.search": "core neighbours v1 service service.storage service.index service.inference",
    "service.jobs": "core v1 service service.storage service.access service.inference service.search",
    "service.rpc": "core v1 service service.storage service.access service.inference service.search service.jobs",
    "service.monitoring": "core bundle runtime client v1 service service.storage service.access service.inference "
    "service.index service.search service.jobs",
}
TORCH_PACKAGES = ("resight.encoder", "resight.neighbours.search", "resight.training", "resight.exporters")
HEAVY = ("torch", "torchvision", "faiss", "onnx", "onnxruntime", "sklearn", "scipy")
MAX_MODULES, MAX_LINES, MIN_LINES, MAX_FUNCTION_LINES = 15, 800, 30, 60
SMALL_ON_PURPOSE = {
    "resight.__main__": "the entry of `python -m resight`",
    "resight.client_async": "a deprecated alias, for one release",
}


def module_files() -> dict[str, Path]:
    """Every module of ours but the generated ones, by dotted name; a package by the name of its ``__init__``."""
    found = {}
    for root, folder in ROOTS.items():
        if root == "resight.v1":
            continue
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((root, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = module_files()


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules a file imports; `top_level` leaves out those inside functions and under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST] = list(tree.body) if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(modules: set[str], *packages: str) -> set[str]:
    return {module for module in modules if any(module == name or module.startswith(name + ".") for name in packages)}


def graph() -> dict[str, set[str]]:
    """Which of our modules each one imports, also inside functions."""
    return {name: (imports(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}


def package_of(module: str) -> str:
    """``resight.service.rpc.search`` -> ``service.rpc``; modules directly in resight are ``core``."""
    is_package = MODULES[module].name == "__init__.py" if module in MODULES else False
    parts = module.split(".")[1:] if is_package else module.split(".")[1:-1]
    return ".".join(parts) or "core"


def test_packages_import_only_what_the_table_allows() -> None:
    wrong = []
    for module, targets in graph().items():
        package = package_of(module)
        if module in ("resight", "resight.__main__", "resight.client_async"):
            continue  # the public names, the entry point and the alias
        allowed = ALLOWED[package].split() if package != "core" else []
        for target in targets:
            other = package_of(target)
            if target in ("resight", package) or other in (package, *allowed):
                continue
            if not any(name.endswith(".*") and other.startswith(name[:-1]) for name in allowed):
                wrong.append(f"{module} -> {target}")
    assert wrong == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    edges = {
        name: {target for target in targets if MODULES[target].name != "__init__.py"}
        for name, targets in graph().items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_a_public_class_name_is_defined_once() -> None:
    homes: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_a_small_module_with_one_importer_has_its_reason() -> None:
    importers: dict[str, set[str]] = {name: set() for name in MODULES}
    for module, targets in graph().items():
        for target in targets:
            importers[target].add(module)
    small = {
        name
        for name, path in MODULES.items()
        if path.name != "__init__.py" and len(path.read_text().splitlines()) < MIN_LINES and len(importers[name]) <= 1
    }
    assert small <= SMALL_ON_PURPOSE.keys()


def test_a_folder_fits_on_one_screen() -> None:
    counts: dict[Path, int] = {}
    for path in MODULES.values():
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_torch_is_imported_only_where_it_computes() -> None:
    for module, path in MODULES.items():
        if not within({module}, *TORCH_PACKAGES, "resight.cli", "resight.demo"):
            assert not within(imports(path), "torch", "torchvision", "safetensors"), module


def test_the_command_line_and_the_demos_import_heavy_things_inside_their_functions() -> None:
    late = (
        "resight.training",
        "resight.exporters",
        "resight.service",
        "resight.encoder.model",
        "resight.encoder.weights",
    )
    for module, path in MODULES.items():
        if within({module}, "resight.cli", "resight.demo"):
            assert not within(imports(path, top_level=True), *late, *HEAVY), module


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_bare_folder_import_no_hard_device_no_long_file_or_function(path: Path) -> None:
    assert not within(imports(path), "training", "exporters", "service", "proto")
    text = path.read_text()
    assert ".cuda(" not in text
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            doc = (node.body[0].end_lineno or 0) - node.body[0].lineno + 1 if documented else 0
            assert (node.end_lineno or 0) - node.lineno + 1 - doc <= MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize(
    "module, absent",
    [
        ("resight", HEAVY),
        ("resight.client", (*HEAVY, "resight.service", "resight.training")),
        ("resight.cli.main", (*HEAVY, "resight.service", "resight.training")),
        ("resight.service.app", ("torch", "torchvision", "sklearn", "resight.training", "resight.exporters")),
    ],
)
def test_importing_loads_nothing_it_does_not_need(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert answer.stdout.strip() == "[]"


def test_the_public_names_are_these() -> None:
    import resight

    names = ["ImageSpec", "Manifest", "ReIDError", "__version__", "cosine_similarity", "open_bundle"]
    assert sorted(resight.__all__) == sorted(names)


def test_the_drawn_error_tree_is_the_real_one() -> None:
    from resight import errors

    assert errors.__doc__
    drawn = re.findall(r"^ *[│├└─ ]*(\w+Error)\b", errors.__doc__, re.MULTILINE)
    real = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert sorted(drawn) == sorted(real)


def test_the_wheel_carries_the_tree(tmp_path: Path) -> None:
    clean = tmp_path / "tree"  # in the checkout setuptools would pack what an earlier build left in build/
    outputs = [str(path.relative_to(ROOT)) for path in ROOT.glob("*demo*")]
    shutil.copytree(
        ROOT,
        clean,
        ignore=lambda folder, names: {
            *shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")(folder, names),
            *(outputs if Path(folder) == ROOT else ()),
        },
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--disable-pip-version-check",
        "-w",
        tmp_path,
        clean,
    ]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = tmp_path.glob("resight-*.whl")
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = set()
    for package, folder in ROOTS.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                expected.add(f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}")
    assert carried == expected


def shell_lines(path: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", path.read_text(), re.DOTALL)
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines() if line.strip()]


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for path in documents:
        used = {line.split()[1] for line in shell_lines(path) if line.startswith("make ")}
        used |= set(re.findall(r"`make ([a-z-]+)", path.read_text()))
        assert used <= targets, path


def test_every_resight_line_in_the_docs_is_a_command_with_such_options() -> None:
    from typer.main import get_command

    from resight.cli.main import app

    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line for path in documents for line in shell_lines(path) if line.startswith("resight ")]
    assert lines
    for line in lines:
        command, words = get_command(app), shlex.split(line, comments=True)[1:]
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_every_command_is_in_the_readme() -> None:
    from typer.main import get_command

    from resight.cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"resight (\w+)", (ROOT / "README.md").read_text()))
    assert {name for name, command in commands.items() if not command.hidden} <= named


def test_every_recipe_is_in_the_guide() -> None:
    from resight.training.adaptation.recipe import recipe_names

    text = (ROOT / "docs" / "guide.md").read_text()
    assert [name for name in recipe_names() if f"`{name}`" not in text] == []


def test_containers_run_without_a_named_user_and_the_service_has_no_torch() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    named = {re.search(r"AS (\S+)", stage)[1]: stage for stage in stages}  # type: ignore[index]
    assert set(named) == {"wheel", "service", "gpu-service", "training"}
    for name, stage in named.items():
        assert re.match(r"python:\d+\.\d+-slim-\w+ ", stage), name
        assert "ADD " not in stage and ":latest" not in stage
        if name != "wheel":
            assert "\nUSER 10001\n" in stage and "HEALTHCHECK" in stage
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for stage, extra in (("service", "cpu"), ("gpu-service", "gpu")):
        assert f"[{extra}]" in named[stage]
        assert not any(requirement.startswith("torch") for requirement in extras[extra] + extras["service"])


def test_the_dockerfile_passes_hadolint() -> None:
    linted = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout


def test_compose_publishes_on_loopback_only_and_takes_rights_away() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    targets = set(re.findall(r"AS (\S+)", (ROOT / "Dockerfile").read_text()))
    for service in services.values():
        assert service["build"]["target"] in targets
        assert service["cap_drop"] == ["ALL"]
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
    assert services["service"]["read_only"] is True


def test_extras_that_exclude_each_other_are_both_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cpu", "gpu", "train", "export", "milvus", "cycle", "dev"} <= set(extras)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    for extra in ("cpu", "train", "export", "cycle", "dev", "service"):
        for requirement in extras[extra]:
            name = re.split(r"[>=<\[]", requirement)[0].lower()
            assert name == "resight" or name in locked, requirement
