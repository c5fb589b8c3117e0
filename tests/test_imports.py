"""The way of the data: imports run leftwards only."""

import ast
from pathlib import Path

import fastrot

ROOT = Path(fastrot.__file__).parent
ROOMS = (
    ("errors", "signals", "version"),
    ("hadamard",),
    ("journal", "memory"),
    ("kernels",),
    ("rotation",),
    ("mapping",),
    ("checks",),
    ("transform_config",),
    ("edits", "patterns"),
    ("index",),
    ("sites",),
    ("heads", "coverage"),
    ("arguments", "rows"),
    ("resolve",),
    ("foreign", "fuse", "online"),
    ("record", "values"),
    ("integrations",),
    ("damage",),
    ("removal",),
    ("handle",),
    ("api",),
    ("suggest",),
    ("__init__",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "fastrot":
                names = [f"fastrot.{alias.name}" for alias in node.names]
                names = [n if n.split(".")[1] in RANK else "fastrot.__init__" for n in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastrot":
                yield parts[1] if len(parts) > 1 else "__init__"


def violations(files):
    return [
        (str(path.relative_to(ROOT)), other)
        for path in files
        for other in imported_rooms(path)
        if other != room(path) and RANK[other] >= RANK[room(path)]
    ]


def test_imports_run_leftwards():
    files = sorted(ROOT.rglob("*.py"))
    assert {room(path) for path in files} <= set(RANK)
    assert violations(files) == []


def test_the_check_can_fail(tmp_path, monkeypatch):
    (tmp_path / "fuse").mkdir()
    wrong = tmp_path / "fuse" / "wrong.py"
    wrong.write_text("from fastrot.online import install\n")
    monkeypatch.setattr("test_imports.ROOT", tmp_path)
    assert violations([wrong]) == [("fuse/wrong.py", "online")]


def test_the_specification_stands_alone():
    """No kernel imports the reference, only operators do; the reference imports no kernel."""
    for path in (ROOT / "kernels").glob("*.py"):
        if path.stem not in ("op", "fused", "rope", "reference"):
            assert "kernels.reference" not in path.read_text(), path
    reference = set(imported_rooms(ROOT / "kernels" / "reference.py"))
    assert reference == {"hadamard"}
