"""Real signals at random times: the model is the original or wholly rotated, never between."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
RUNS = int(os.environ.get("FASTROT_ATTACKS", "15"))
"""Runs of each kind; ``make attack`` asks for 200, and for every way back with all threads."""
THREADS = {"none": (1, 2, 4), "memory": (2,), "disk": (4,)}


def attack(*arguments):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path])
    child = subprocess.run(
        [sys.executable, "-m", "attacks.interrupts", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=1800,
    )
    reports = [json.loads(line) for line in child.stdout.splitlines()]
    if child.returncode:
        word = f"exit status {child.returncode}"
        reports.append({"found": {word: 1}, "hits": 0, "error": child.stderr})
    return reports


@pytest.mark.parametrize("undo", THREADS)
def test_whole_or_untouched(undo):
    threads = THREADS["none" if RUNS > 15 else undo]
    reports = attack("--runs", RUNS, "--undo", undo, "--threads", *threads)
    for report in reports:
        assert set(report["found"]) <= {"original", "rotated"}, report
        assert report["hits"] > RUNS // 5, report
    assert tuple(report["threads"] for report in reports) == threads


@pytest.mark.slow
def test_without_the_hold_weights_are_left_half_rotated():
    """Negative control: these signals do hit the pass; threads that go on may even crash it."""
    reports = attack("--runs", 400, "--without-hold")
    assert set().union(*(report["found"] for report in reports)) - {"original", "rotated"}, reports
