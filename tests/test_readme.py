"""What README.md says is true: its commands parse, its code runs, its tables match the package."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from blockloom import cli
from blockloom.commands.arguments import COMMANDS
from blockloom.core.recipe import list_recipes, load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def marked(name: str) -> str:
    """Return the fenced block below a marker, the way `.ci/run` reads it."""
    match = re.search(rf"^<!-- ci: {name} -->\n```bash\n(.*?)^```", README, re.M | re.S)
    assert match, f"README has no block marked {name}"
    return match[1].strip()


def test_first_command_installs_and_draws() -> None:
    install, _, draw = marked("picture").partition(" && ")
    assert install == "pip install ."
    words = shlex.split(draw)
    assert words[:3] == ["blockloom", "generate", "image"]
    parsed = cli._parse(words[1:])
    assert parsed.prompt
    assert parsed.out.endswith(".png")


def test_second_command_installs_and_tests() -> None:
    assert marked("tests") == 'pip install ".[test]" && python -m pytest -n 2'


def test_ci_reads_the_commands_from_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for name in ("picture", "tests"):
        assert f"readme_command {name}" in script
        assert marked(name) not in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_commands_are_those_of_the_program() -> None:
    section = README.split("## Commands")[1].split("\n## ")[0]
    named = set(re.findall(r"blockloom (\w+)", section))
    named |= set(re.findall(r"`(doctor|bench|data|demo)[ `]", section))
    assert set(COMMANDS) == named


def test_recipe_table_matches_the_recipes() -> None:
    rows = re.findall(r"^\| `(image/\w+)` \| .* \| (\w+) \| (\w+) \|$", README, re.M)
    assert sorted(name for name, _, _ in rows) == list_recipes("image")
    for name, tokens, cache in rows:
        recipe = load_recipe(name)
        is_code = recipe.head.kind == "categorical"
        assert (name, tokens) == (name, "codes" if is_code else "latents")
        written = "exact" if recipe.cache.exact else recipe.cache.write
        assert (name, cache) == (name, written)


def test_python_example_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.S)
    assert block
    monkeypatch.chdir(tmp_path)
    source = block[1].replace("blockloom/emoji", str(tiny_model))
    assert len(source.strip().splitlines()) <= 7
    exec(compile(source, "README.md", "exec"), {})
    assert (tmp_path / "face.png").is_file()


def test_motion_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.findall(r"```python\n(.*?)```", README, re.S)[2]
    monkeypatch.chdir(tmp_path)
    told: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), told)
    assert len(told["motion"]) == 80 and told["motion"].text == "walk; jump; stand idle"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["body.bvh", "body.glb"]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    names = set(
        re.findall(r"`((?:core|models|tokenizers|pipelines|training|tests|configs)/[\w/.]*)`", text)
    )
    missing = [n for n in names if not (ROOT / n).exists()]
    assert missing == []
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert [p for p in pictures if not (ROOT / p).exists()] == []
