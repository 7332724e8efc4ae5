"""Guards of the repository-root-is-the-package layout, and of file and function sizes.

Each hazard is described in CONTRIBUTING.md under "Packaging".
"""

import ast
import importlib
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import blockloom

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
ROOT_MODULES = {"__init__.py", "__main__.py", "app.py", "cli.py"}
NOT_SHIPPED = {"tests", "docs", "benchmarks", "examples", "build", "dist", "outputs", "runs"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_PIPELINE_CALL_LINES = 120


def source_files() -> list[Path]:
    """Python files that ship in the wheel."""
    folders = [ROOT, *(ROOT / name.partition(".")[2].replace(".", "/") for name in PACKAGES[1:])]
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def run_in_root(code: str) -> str:
    """Run Python code in a new process whose first import place is the repository root."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


def test_package_list_equals_folders_on_disk() -> None:
    found = {"blockloom"}
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in NOT_SHIPPED or any(p.startswith((".", "__")) for p in parts[:-1]):
            continue
        if any(p.endswith(".egg-info") for p in parts):
            continue
        if path.suffix == ".py" and len(parts) > 1:
            found.add("blockloom." + ".".join(parts[:-1]))
    data_only = {"blockloom.configs", "blockloom.weights"}
    assert set(PACKAGES) - data_only == found - data_only


def test_root_holds_only_the_four_modules() -> None:
    assert {path.name for path in ROOT.glob("*.py")} <= ROOT_MODULES


def test_tokenizers_is_no_regular_package() -> None:
    assert not (ROOT / "tokenizers" / "__init__.py").exists()
    assert not (ROOT / "tokenizers" / "__init__.pyi").exists()


def test_hugging_face_wins_in_the_root() -> None:
    place = run_in_root("import tokenizers; print(tokenizers.__file__)")
    assert "site-packages" in place and str(ROOT / "tokenizers") not in place


def test_transformers_imports_in_the_root() -> None:
    assert run_in_root("import transformers; print(transformers.AddedToken.__module__)") in (
        "tokenizers",
        "transformers.tokenization_utils_base",
    )


def test_the_tests_run_against_this_checkout_or_a_wheel() -> None:
    place = Path(blockloom.__file__ or "").resolve().parent
    assert place == ROOT or "site-packages" in place.parts


def test_recipes_and_weights_are_package_data() -> None:
    assert files("blockloom.configs").is_dir()
    assert any(item.name == "image" for item in files("blockloom.configs").iterdir())
    assert files("blockloom.weights").is_dir()


def test_importing_the_package_loads_nothing() -> None:
    loaded = run_in_root(
        "import sys, blockloom; print([m for m in sys.modules if m.startswith('blockloom.')])"
    )
    assert loaded == "[]"


def test_the_command_line_loads_no_torch() -> None:
    heavy = run_in_root(
        "import sys, blockloom.cli, blockloom.commands.generate, blockloom.commands.batch;"
        "import blockloom.commands.inspect, blockloom.commands.edit, blockloom.commands.train;"
        "import blockloom.commands.play, blockloom.commands.edit_video;"
        "print(sorted({'torch', 'diffusers', 'transformers', 'gradio'} & set(sys.modules)))"
    )
    assert heavy == "[]"


@pytest.mark.parametrize("name", [name for name in blockloom.__all__ if name != "__version__"])
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(blockloom, name)
    home = importlib.import_module(value.__module__)
    assert getattr(home, name) is value


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Layuot"):
        blockloom.Layuot  # noqa: B018


def test_version_is_said_once() -> None:
    assert PYPROJECT["project"]["version"] == blockloom.__version__


@pytest.mark.parametrize("path", source_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            is_call = node.name == "__call__" and path.parent.name == "pipelines"
            limit = MAX_PIPELINE_CALL_LINES if is_call else MAX_FUNCTION_LINES
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= limit, f"{node.name} has {length} lines"


def test_every_module_says_what_it_is() -> None:
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in source_files()
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []
