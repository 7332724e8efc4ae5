"""Which room may import which, which file may import which library, and what no file may call.

The rules are functions of source text, so the second half of this file can show that each of
them catches the mistake it is there for.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "core": {"core"},
    "models": {"core", "models"},
    "motion": {"core", "motion"},
    "tokenizers": {"core", "tokenizers"},
    "pipelines": {"core", "models", "motion", "tokenizers", "pipelines"},
    "training": {"core", "models", "motion", "tokenizers", "training"},
    "commands": {"core", "motion", "pipelines", "training", "commands", "app"},
    "demo": {"core", "motion", "pipelines", "commands", "demo"},
    "cli.py": {"core", "commands"},
    "__main__.py": {"cli"},
}
STANDARD_OF_CORE = {"torch", "einops", "jaxtyping", "pydantic", "numpy", "yaml", "safetensors"}
# Library -> files or folders that may import it; everything not named here is free.
OWNERS = {
    "gradio": ("app.py", "demo/handlers.py", "demo/look.py"),
    "transformers": ("models/pretrained_text.py", "tokenizers/adapters.py"),
    "tokenizers": (),
    "tyro": ("cli.py", "commands/"),
    "accelerate": ("training/",),
    "vector_quantize_pytorch": ("tokenizers/",),
    "torchmetrics": ("training/",),
    "pyarrow": ("training/",),
    "pandas": (),
    "requests": (),
    "urllib": (),
    "matplotlib": ("commands/",),
    "subprocess": (),
    "pickle": (),
    "shelve": (),
    "marshal": (),
    "dill": (),
}
LIGHT = ("cli.py", "commands/", "pipelines/media.py", "pipelines/params.py", "core/errors.py")
HEAVY = {"torch", "diffusers", "transformers", "gradio", "accelerate"}


def shipped() -> list[Path]:
    """Python files of the package."""
    folders = [room for room in ROOMS if not room.endswith(".py")]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted([*found, *ROOT.glob("*.py")])


def imports(tree: ast.AST) -> Iterator[tuple[int, str, ast.stmt]]:
    """Yield (level, dotted name, node); `from . import x` yields the name x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, node
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                for alias in node.names:
                    yield node.level, alias.name, node
            else:
                yield node.level, node.module, node


def is_type_checking(node: ast.AST) -> bool:
    """Say whether a statement is `if TYPE_CHECKING:`."""
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def top_level(tree: ast.Module) -> set[ast.stmt]:
    """Import statements that run when the module is imported."""
    runs: set[ast.stmt] = set()
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            runs.add(node)
        elif isinstance(node, ast.If | ast.Try | ast.With) and not is_type_checking(node):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return runs


def target_room(path: str, level: int, name: str) -> str:
    """Return the first part, seen from the package root, of a relative import."""
    folder = path.split("/")[:-1]
    base = folder[: len(folder) - (level - 1)]
    return [*base, *name.split(".")][0]


def room_faults(path: str, source: str) -> list[str]:
    """Check the one-way rule and that our own modules are imported relatively."""
    faults = []
    room = path.split("/")[0]
    for level, name, node in imports(ast.parse(source)):
        where = f"{path}:{node.lineno}"
        if level == 0:
            if name.split(".")[0] == "blockloom" and path != "app.py":
                faults.append(f"{where} absolute import of {name}")
            if name.split(".")[0] in set(ROOMS) - {"tokenizers"}:
                faults.append(f"{where} bare import of {name}")
        elif path != "__init__.py" and room != "app.py":
            target = target_room(path, level, name)
            if target not in ROOMS.get(room, set()) | {"__version__"}:
                faults.append(f"{where} {room} imports {target}")
    return faults


def library_faults(path: str, source: str) -> list[str]:
    """Check which file imports which library, and what must load late."""
    tree = ast.parse(source)
    early = top_level(tree)
    faults = []
    for level, name, node in imports(tree):
        if level:
            continue
        library = name.split(".")[0]
        where = f"{path}:{node.lineno}"
        if library in OWNERS and not path.startswith(OWNERS[library] or ("-",)):
            faults.append(f"{where} may not import {library}")
        if path.startswith("core/") and library in HEAVY - STANDARD_OF_CORE:
            is_scheduler_base = library == "diffusers" and path.startswith("core/schedulers/")
            if not is_scheduler_base:
                faults.append(f"{where} core may not import {library}")
        if path.startswith(LIGHT) and library in HEAVY and node in early:
            faults.append(f"{where} imports {library} before it is needed")
    return faults


FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint", "print"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("os", "system"),
    ("os", "popen"),
    ("tempfile", "mktemp"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("torch", "manual_seed"),
    ("random", "seed"),
}
FORBIDDEN_KEYWORDS = {("shell", True), ("verify", False), ("allow_pickle", True)}


def source_faults(path: str, source: str) -> list[str]:
    """Check for calls that run foreign code, touch global state, or hide errors."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append(f"{path}:{node.lineno} bare except")
        if not isinstance(node, ast.Call):
            continue
        call = node.func
        may_print = path in ("cli.py", "commands/output.py")
        if isinstance(call, ast.Name) and call.id in FORBIDDEN_NAMES:
            if call.id != "print" or not may_print:
                faults.append(f"{path}:{node.lineno} calls {call.id}")
        if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
            if (call.value.id, call.attr) in FORBIDDEN_ATTRIBUTES:
                faults.append(f"{path}:{node.lineno} calls {call.value.id}.{call.attr}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in FORBIDDEN_KEYWORDS:
                faults.append(f"{path}:{node.lineno} passes {keyword.arg}={value}")
    return faults


def annotation_faults(path: str, source: str) -> list[str]:
    """Check that no file with jaxtyping shapes turns its annotations into strings."""
    names = {(level, name) for level, name, _ in imports(ast.parse(source))}
    if (0, "jaxtyping") in names and (0, "__future__") in names:
        return [f"{path} uses jaxtyping together with __future__ annotations"]
    return []


RULES = {
    "rooms": room_faults,
    "libraries": library_faults,
    "source": source_faults,
    "annotations": annotation_faults,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule: str) -> None:
    faults = []
    for path in shipped():
        faults += RULES[rule](path.relative_to(ROOT).as_posix(), path.read_text())
    assert faults == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        ("rooms", "core/a.py", "from ..models import backbone"),
        ("rooms", "core/schedulers/a.py", "from ...models import backbone"),
        ("rooms", "models/a.py", "from ..tokenizers.base import x"),
        ("rooms", "motion/a.py", "from ..models.text import x"),
        ("rooms", "tokenizers/a.py", "from ..motion.clip import Motion"),
        ("rooms", "tokenizers/a.py", "from ..models.text import x"),
        ("rooms", "pipelines/a.py", "from ..training import loop"),
        ("rooms", "training/a.py", "def f():\n    from ..pipelines import media"),
        ("rooms", "pipelines/a.py", "import blockloom.core"),
        ("rooms", "app.py", "from pipelines.image import ImagePipeline"),
        ("rooms", "cli.py", "from .training import loop"),
        ("libraries", "models/backbone.py", "import transformers"),
        ("libraries", "core/a.py", "import tokenizers"),
        ("libraries", "core/a.py", "from diffusers import ModelMixin"),
        ("libraries", "core/a.py", "import transformers"),
        ("libraries", "pipelines/a.py", "import gradio"),
        ("libraries", "models/a.py", "import accelerate"),
        ("libraries", "commands/a.py", "import torch"),
        ("libraries", "cli.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("libraries", "training/a.py", "import pickle"),
        ("libraries", "core/a.py", "import subprocess"),
        ("source", "core/a.py", "eval('1')"),
        ("source", "core/a.py", "torch.load('x')"),
        ("source", "core/a.py", "yaml.load('x')"),
        ("source", "core/a.py", "os.system('x')"),
        ("source", "core/a.py", "run('x', shell=True)"),
        ("source", "core/a.py", "np.load('x', allow_pickle=True)"),
        ("source", "core/a.py", "try:\n    f()\nexcept:\n    pass"),
        ("source", "core/a.py", "torch.manual_seed(0)"),
        ("source", "core/a.py", "print(1)"),
        ("annotations", "core/a.py", "from __future__ import annotations\nimport jaxtyping"),
    ],
)
def test_the_rule_catches(rule: str, path: str, source: str) -> None:
    assert RULES[rule](path, source) != []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        ("rooms", "pipelines/a.py", "from ..core.errors import DataError\nfrom . import media"),
        ("rooms", "core/schedulers/a.py", "from ..sampling import x\nfrom .base import Row"),
        ("libraries", "core/schedulers/a.py", "from diffusers import SchedulerMixin"),
        ("libraries", "commands/a.py", "def f():\n    import torch"),
        ("libraries", "commands/a.py", "if TYPE_CHECKING:\n    import torch"),
        ("source", "core/a.py", "model.eval()\nnp.load('x', allow_pickle=False)"),
    ],
)
def test_the_rule_allows(rule: str, path: str, source: str) -> None:
    assert RULES[rule](path, source) == []
