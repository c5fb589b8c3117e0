"""An error at any point of ``apply`` leaves the model as it was, bit for bit.

Without copies that holds until the first write; from then on the model refuses to run.
"""

import copy
import gc
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from linecache import getline
from pathlib import Path

import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from torch import nn

import fastrot
import fastrot.api
from fastrot.fuse import Fusion
from fastrot.journal import Journal
from fastrot.kernels.cpu_weight import MatrixRotation
from fastrot.online import rotation as rotation_module

PACKAGE = str(Path(fastrot.__file__).parent)

ROTATIONS = ("R1", "R2", "R3", "R4")
UNDO = ("memory", "disk")
ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError)

POINTS = {
    "Fusion": (fastrot.api, "Fusion"),
    "make": (fastrot.api, "make"),
    "run": (Fusion, "run"),
    "matrix": (MatrixRotation, "run"),
    "writing": (Journal, "writing"),
    "replace": (Journal, "replace"),
    "set": (Journal, "set"),
    "on_error": (Journal, "on_error"),
    "attach": (fastrot.api, "attach"),
    "OnlineRotation": (rotation_module, "stored"),
    "pre-hook": (nn.Module, "register_forward_pre_hook"),
    "own config": (fastrot.api, "own_config"),
    "ties": (fastrot.api, "_forget_ties"),
    "record": (fastrot.api, "with_application"),
    "mark": (fastrot.api, "mark"),
    "retrace": (fastrot.api, "retrace"),
}


@cache
def _original(model_type: str):
    return tiny(
        model_type,
        tied=True,
        dtype=torch.float64,
        heads=2,
        kv_heads=1,
        head_dim=8,
        hidden=16,
        intermediate=12,
        layers=1,
        vocab=16,
    )


def small(model_type: str = "llama"):
    return copy.deepcopy(_original(model_type))


SETTINGS = {"rotations": ROTATIONS, "transform_type": "random-hadamard"}


def rotate(model, undo: str) -> None:
    fastrot.apply(model, **SETTINGS, undo=undo)


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """The folder in which the journal makes its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


class Trap:
    """Counts the calls of a function and raises at one of them, before or after its work."""

    def __init__(self, function, at: int | None, error: type[BaseException], late: bool):
        self.function, self.at, self.error, self.late = function, at, error, late
        self.calls = 0

    def __get__(self, instance, owner):
        return self if instance is None else lambda *a, **k: self(instance, *a, **k)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at and not self.late:
            raise self.error("injected")
        result = self.function(*args, **kwargs)
        if self.calls == self.at:
            raise self.error("injected")
        return result


def calls_of(point: str) -> int:
    """How often a whole ``apply`` passes the point."""
    with pytest.MonkeyPatch.context() as patch:
        owner, name = POINTS[point]
        trap = Trap(getattr(owner, name), None, RuntimeError, False)
        patch.setattr(owner, name, trap)
        rotate(small(), "memory")
    return trap.calls


def restored(model, before, undo: str, error: type[BaseException], temporary: Path) -> None:
    """``rotate`` fails with ``error`` and nothing is left of it; it is called under a trap."""
    with pytest.raises(error, match="injected"):
        rotate(model, undo)
    assert difference(before, fingerprint(model)) == []
    assert list(temporary.iterdir()) == []


def refuses(model) -> bool:
    """Whether a model says everywhere that it is rotated in part."""
    for action in (
        lambda: logits(model, random_ids(model, 1, 4, seed=0)),
        lambda: logits(model.model, torch.zeros(1, 4, dtype=torch.long)),
        lambda: fastrot.plan(model),
        lambda: fastrot.apply(model),
        lambda: fastrot.remove(model),
    ):
        with pytest.raises(fastrot.HalfRotatedError, match=r"load the model anew|start from"):
            action()
    return True


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_error_without_copies(point, late, monkeypatch):
    """Until the first write nothing has changed; from then on nothing can be computed."""
    count = calls_of(point)
    for n in sorted({1, (count + 1) // 2, count}):
        model = small()
        before = fingerprint(model)
        owner, name = POINTS[point]
        with monkeypatch.context() as patch:
            trap = Trap(getattr(owner, name), n, RuntimeError, late)
            patch.setattr(owner, name, trap)
            with pytest.raises(
                (RuntimeError, fastrot.HalfRotatedError), match="injected"
            ) as caught:
                rotate(model, "none")
        written = point in ("run", "matrix", "writing") and (late or point == "matrix")
        assert isinstance(caught.value, fastrot.HalfRotatedError) == written
        if written:
            assert isinstance(caught.value.__cause__, RuntimeError)
            assert refuses(model)
        else:
            assert difference(before, fingerprint(model)) == []


def test_a_damaged_model_is_damaged_on_disk_and_as_a_copy(monkeypatch, tmp_path):
    model = small()
    monkeypatch.setattr(Fusion, "run", Trap(Fusion.run, 1, MemoryError, True))
    with pytest.raises(fastrot.HalfRotatedError):
        rotate(model, "none")
    monkeypatch.undo()
    assert refuses(copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    with pytest.raises(fastrot.HalfRotatedError, match="start from the original"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("undo", UNDO)
@pytest.mark.parametrize("point", POINTS)
def test_error_at_every_call(point, undo, late, monkeypatch, temporary):
    """Every n, on one model: each failure leaves it fit for the next, and at last it is rotated."""
    model = small()
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    before = fingerprint(model)
    owner, name = POINTS[point]
    count = calls_of(point)
    assert count > 0
    for n in range(1, count + 1):
        with monkeypatch.context() as patch:
            error = ERRORS[n % len(ERRORS)]
            patch.setattr(owner, name, Trap(getattr(owner, name), n, error, late))
            restored(model, before, undo, error, temporary)
    rotate(model, undo)
    assert list(temporary.iterdir()) == []
    assert relative_error(logits(model, ids), expected) <= 1e-6


class Interrupt:
    """Raises when a line of the package is about to run for the ``n``-th time.

    Lines count from the entry of the journal to its exit, like a Ctrl-C that may come at any time.
    """

    def __init__(self, line: tuple[str, int] | None = None, n: int = 1):
        self.line, self.left = line, n
        self.counts: dict[tuple[str, int], int] = {}
        self.active = False

    def __call__(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        if code.co_filename.endswith("journal.py") and code.co_name == "__exit__":
            self.active = False  # now the work is either complete or being undone
        # Leaving the journal is the commit: the work is complete. And what is raised where Python
        # leaves any block would keep it from leaving, so from putting torch's default device back.
        leaving = getline(code.co_filename, frame.f_lineno).lstrip().startswith("with ")
        if event == "line" and self.active and not leaving:
            self._count((code.co_filename, frame.f_lineno))
        return self if self.active else None

    def _count(self, line: tuple[str, int]) -> None:
        self.counts[line] = self.counts.get(line, 0) + 1
        if line == self.line:
            self.left -= 1
            if self.left == 0:
                self.active = False
                raise KeyboardInterrupt("injected")

    def run(self, action: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Traced from the journal on: what comes before would only take longer."""
        previous, enter = sys.gettrace(), Journal.__enter__

        def entered(journal):
            self.active = True
            sys._getframe(1).f_trace = self
            sys.settrace(self)
            return enter(journal)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "__enter__", entered)
            try:
                action(*args, **kwargs)
            finally:
                sys.settrace(previous)


KEEPERS = ("journal.py", "install.py")
"""They know how a change is taken back: every line, every time. Of other lines the first and the
last time that they run, and of these too where only the way back of the weights is another."""


def interrupt_at_every_line(undo, temporary, keepers=KEEPERS):
    model = small()
    rotate = partial(fastrot.apply, rotations=fastrot.plan(model, **SETTINGS))  # it never writes
    rotate(small(), undo=undo)  # what is imported or computed only once
    watch = Interrupt()
    watch.run(rotate, small(), undo=undo)
    assert len(watch.counts) > 80
    before = fingerprint(model)
    failures = []
    for (file, number), count in watch.counts.items():
        for n in range(1, count + 1) if file.endswith(keepers) else sorted({1, count}):
            interrupted = False
            try:
                Interrupt((file, number), n).run(rotate, model, undo=undo)
            except BaseException as error:
                interrupted = type(error) is KeyboardInterrupt
            changed = difference(before, fingerprint(model))
            if undo == "none" and changed and interrupted:
                with pytest.raises(fastrot.HalfRotatedError):
                    logits(model, random_ids(model, 1, 4, seed=0))
                model = small()
                before = fingerprint(model)
                continue
            if changed or not interrupted:
                failures.append((Path(file).name, number, n, changed[:2]))
                model = small()
                before = fingerprint(model)
    gc.collect()
    assert list(temporary.iterdir()) == []
    assert failures == []
    assert not torch._C._is_torch_function_mode_enabled()


@pytest.mark.parametrize("undo", [*UNDO, "none"])
def test_interrupt_at_every_line(undo, temporary):
    interrupt_at_every_line(undo, temporary, KEEPERS if undo == "memory" else KEEPERS[:1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("undo", [*UNDO, "none"])
def test_interrupt_at_every_line_every_time(undo, temporary):
    interrupt_at_every_line(undo, temporary)


@pytest.mark.parametrize("undo", UNDO)
@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_last_step_fails(model_type, kind, undo, monkeypatch, temporary):
    """Everything is done and everything is undone, for every architecture."""
    model = small(model_type)
    before = fingerprint(model)

    monkeypatch.setattr(Fusion, "run", Trap(Fusion.run, 1, RuntimeError, True))
    with pytest.raises(RuntimeError, match="injected"):
        fastrot.apply(model, ROTATIONS, transform_type=kind, randomize=True, undo=undo)
    assert difference(before, fingerprint(model)) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("undo", UNDO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_layouts_come_back(dtype, undo, monkeypatch, temporary):
    model = tiny("llama", dtype=dtype, layers=1)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    before = fingerprint(model)
    monkeypatch.setattr(Fusion, "run", Trap(Fusion.run, 1, MemoryError, True))
    restored(model, before, undo, MemoryError, temporary)


@pytest.mark.parametrize("undo", UNDO)
def test_second_rotation_fails_and_the_first_stays(undo, monkeypatch, temporary):
    model = small()
    fastrot.apply(model, ("R1", "R4"))
    before = fingerprint(model)
    monkeypatch.setattr(Fusion, "run", Trap(Fusion.run, 1, RuntimeError, True))
    with pytest.raises(RuntimeError, match="injected"):
        fastrot.apply(model, ("R2", "R3"), undo=undo)
    assert difference(before, fingerprint(model)) == []
    assert list(temporary.iterdir()) == []


def test_one_failing_undo_step_does_not_stop_the_others():
    """A step that was announced but not made can fail to be taken back."""
    value = nn.Parameter(torch.zeros(3))

    def work():
        with Journal([value], "memory") as journal:
            value.data.fill_(1.0)
            journal.on_error(lambda: delattr(value, "never_set"))
            raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        work()
    assert torch.equal(value.data, torch.zeros(3))


def test_remove_fails_half_way(monkeypatch):
    """``remove`` keeps the promise too: the weights and the hooks belong together."""
    model = small()
    rotate(model, "memory")
    before = fingerprint(model)

    def fail(*_):
        raise KeyboardInterrupt("injected")

    removal = sys.modules["fastrot.removal"]
    for owner, name, undo in [
        (removal, "uninstall", "none"),
        (removal, "without_groups", "none"),
        (removal, "unmark", "none"),
        (MatrixRotation, "run", "memory"),
        (MatrixRotation, "run", "disk"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(KeyboardInterrupt):
                fastrot.remove(model, undo=undo)
        assert difference(before, fingerprint(model)) == [], name


def test_another_model_of_the_same_configuration_sees_nothing(monkeypatch):
    first = small()
    with torch.random.fork_rng(devices=[]):
        second = type(first)(first.config).eval()
    before = fingerprint(second)
    monkeypatch.setattr(fastrot.api, "mark", Trap(None, 1, RuntimeError, False))
    with pytest.raises(RuntimeError, match="injected"):
        rotate(first, "memory")
    assert difference(before, fingerprint(second)) == []
    monkeypatch.undo()
    rotate(first, "memory")
    assert difference(before, fingerprint(second)) == []


@pytest.mark.parametrize("undo", UNDO)
def test_these_tests_notice_a_journal_that_forgets(undo, monkeypatch, temporary):
    """Negative control: without undo steps the model does not come back."""
    model = small()
    before = fingerprint(model)
    monkeypatch.setattr(Journal, "_restore", lambda self: None)
    monkeypatch.setattr(Fusion, "run", Trap(Fusion.run, 1, RuntimeError, True))
    with pytest.raises(AssertionError):
        restored(model, before, undo, RuntimeError, temporary)
    changed = difference(before, fingerprint(model))
    assert "model.layers.0.mlp.down_proj.weight: bytes" in changed
    assert "model.layers.0.mlp: _forward_pre_hooks" in changed
    assert "lm_head.weight: object" in changed
    assert ".config: to_dict" in changed
