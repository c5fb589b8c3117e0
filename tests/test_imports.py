"""The way of the data: imports run leftwards only, and those that cost much come late."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import save_rotated

import fastrot

ROOT = Path(fastrot.__file__).parent
ROOMS = (
    ("errors", "scalars", "signals", "version"),
    ("hadamard",),
    ("journal", "memory"),
    ("kernels",),
    ("rotations",),
    ("mapping",),
    ("checks",),
    ("transform_config",),
    ("edits", "patterns"),
    ("index", "norms"),
    ("sites",),
    ("heads", "coverage", "ends"),
    ("arguments", "rows"),
    ("middle", "recipe"),
    ("spinquant",),
    ("resolve",),
    ("foreign", "fuse", "online"),
    ("record", "values"),
    ("fit",),
    ("integrations",),
    ("damage",),
    ("removal", "restoration"),
    ("handle", "verification"),
    ("api",),
    ("checkpoint", "suggest"),
    ("lab",),
    ("learning",),
    ("__init__",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
WITH_TRANSFORMERS = ("integrations", "suggest", "lab", "learning", "demo", "cli")
"""Rooms that may import transformers when they are imported themselves."""
HEAVY = ("transformers", "accelerate", "numba", "triton", "safetensors", "torch._dynamo", "sympy")
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
        if path.stem not in ("run", "fused", "rope", "reference"):
            assert "kernels.reference" not in path.read_text(), path
    reference = set(imported_rooms(ROOT / "kernels" / "reference.py"))
    assert reference == {"hadamard"}


def imported_at_once(tree):
    """What is imported as soon as the module is: not in functions, not for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (name for other in node.orelse for name in imported_at_once(other))
        elif not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            yield from imported_at_once(node)


def test_few_rooms_import_transformers_at_once():
    found = {
        room(path)
        for path in ROOT.rglob("*.py")
        for name in imported_at_once(ast.parse(path.read_text()))
        if name.partition(".")[0] in ("transformers", "accelerate")
    }
    assert found <= set(WITH_TRANSFORMERS)


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def sums(code):
    return [float(word) for word in in_a_new_process(code)]


def about(expected):
    """Products round differently where memory begins elsewhere; a model without R4 is far off."""
    return pytest.approx(expected, rel=1e-5)


def test_importing_fastrot_imports_nothing_heavy():
    code = f"""
import sys, torch
before = set(sys.modules)
import fastrot
print(*[name for name in {HEAVY} if name in set(sys.modules) - before])"""
    assert in_a_new_process(code) == []


def test_nothing_outside_of_these_rooms_needs_transformers():
    """Nor may a way lead there, say by a room that imports one of them; a plan needs no kernel."""
    rooms = ["kernels", "resolve", "fuse", "online", "mapping", "record", "api", "removal"]
    code = f"""
import sys, fastrot
from importlib import import_module
for name in {rooms}:
    import_module("fastrot." + name)
for name in fastrot.__all__:
    if name not in ("Suggestion", "suggest_mapping", "learn"):
        getattr(fastrot, name)
print(*[name for name in {HEAVY[:5]} if name in sys.modules])"""
    assert in_a_new_process(code) == []


def test_what_is_exported():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = {
        alias.name: node.module.removeprefix("fastrot.")
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    assert typed == fastrot._HOMES
    assert set(fastrot.__all__) == {*typed, "__version__", "hadamard_transform"}
    assert set(fastrot.__all__) <= set(dir(fastrot))
    for name in fastrot.__all__:
        assert getattr(fastrot, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'rotate'"):
        fastrot.rotate  # noqa: B018


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotated")
    model, expected = save_rotated(folder)
    (folder / "model.pickle").write_bytes(pickle.dumps(model))
    (folder / "config.pickle").write_bytes(pickle.dumps(model.config))
    return folder, expected


SUM = """
import torch
generator = torch.Generator().manual_seed(0)
ids = torch.randint(3, model.config.vocab_size, (1, 5), generator=generator)
print(model(ids).logits.double().sum().item())"""

LOADS = {
    "fastrot first": "import fastrot; from transformers import AutoModelForCausalLM as Auto",
    "transformers first": "from transformers import AutoModelForCausalLM as Auto; import fastrot",
    "a model first": "from transformers import LlamaForCausalLM as Auto; import fastrot",
    "masks first": """
import fastrot, transformers.masking_utils
from transformers import AutoModelForCausalLM as Auto""",
    "a pickled config first": """
import pickle
pickle.load(open("{}/config.pickle", "rb"))
from transformers import AutoModelForCausalLM as Auto""",
    "imported again": """
import fastrot, sys
from transformers import LlamaForCausalLM
for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
    del sys.modules[name]
from transformers import AutoModelForCausalLM as Auto""",
}


@pytest.mark.parametrize("order", LOADS)
def test_whichever_is_imported_first(order, rotated):
    folder, expected = rotated
    load = f"{LOADS[order]}\nmodel = Auto.from_pretrained({str(folder)!r})"
    assert sums(load.replace("{}", str(folder)) + SUM) == [about(expected)]


def test_a_pickled_model_brings_fastrot_along(rotated):
    folder, expected = rotated
    load = f"import pickle; model = pickle.load(open({str(folder / 'model.pickle')!r}, 'rb'))"
    assert sums(load + SUM) == [about(expected)]


def test_registering_leaves_modules_as_they_are():
    """Looking for a module imports nothing; the module knows nothing of the finder."""
    code = """
import fastrot, importlib.util, sys
name = "transformers.integrations.moe"
spec = importlib.util.find_spec(name)
assert name not in sys.modules and spec.loader.is_package(name) is False
assert "ALL_EXPERTS_FUNCTIONS" in spec.loader.get_source(name)
import transformers.integrations.moe as module
assert type(module.__loader__) is importlib.machinery.SourceFileLoader
assert module.__spec__.loader is module.__loader__ and module.__spec__.origin == module.__file__
importlib.reload(fastrot)
importlib.reload(module)
print(*[key for key in module.ALL_EXPERTS_FUNCTIONS if "fastrot" in key])"""
    assert in_a_new_process(code) == ["fastrot"]
