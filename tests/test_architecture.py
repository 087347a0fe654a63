"""The vocabulary of the rooms (docs/conventions.md, "Who may do what"), read off the source. import-linter holds the ladder."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "deltanet"
FILES = sorted(ROOT.rglob("*.py"))

# What may be said where: a pattern of code, and the places that may use it (prefixes of paths in the package).
WORDS = {
    r"\bos\.environ\b|\bos\.getenv\b|\bsys\.argv\b": ("cli/",),
    r"(?<![\w.])print\(": ("cli/",),
    r"\btl\.|\bgl\.": ("kernels/",),
    r"\bget_device_capability\b": ("ops/backends.py",),
    r"\btorch\.library\b|\bautograd\.Function\b": ("ops/autograd.py", "ops/cross_entropy.py", "ops/selective_scan.py", "ops/short_conv.py"),
    r"\bget_rank\b|\bget_world_size\b": ("training/distributed.py",),
    r"\bimport pickle\b|\btorch\.load\b|\bpickle\.loads?\b": (),
}


def code_of(path: Path) -> str:
    """The source without its comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))] or [
                ast.Pass()
            ]
    return ast.unparse(tree)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_vocabulary(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    code = code_of(path)
    for pattern, allowed in WORDS.items():
        if not any(name.startswith(place) for place in allowed):
            found = re.search(pattern, code)
            assert not found, f"{name} says {found.group()!r}, which only {allowed or 'nobody'} may"


def test_the_words_are_found_where_they_are_allowed() -> None:
    """So that a pattern that matches nothing does not pass for discipline."""
    assert "print(" in "".join(code_of(path) for path in (ROOT / "cli").glob("*.py"))
    assert "torch.library" in code_of(ROOT / "ops" / "autograd.py")
    assert "get_device_capability" in code_of(ROOT / "ops" / "backends.py")


def test_every_room_says_what_lives_there() -> None:
    for init in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(init.read_text())), f"{init} has no docstring"
