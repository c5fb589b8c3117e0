"""Rotates a model again and again while real signals arrive, and says what became of it.

    python -m attacks.interrupts --runs 200 --undo none --threads 1 2 4

Prints a JSON line for each number of threads: how many runs left the original, the rotated model,
or anything else, and how many of the interrupts hit. Run as a process of its own: it sends signals
to itself.
"""

import _thread
import argparse
import contextlib
import copy
import hashlib
import json
import os
import random
import signal
import threading
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastrot
import fastrot.journal
from fastrot.kernels import _cpu_threads

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """What the handlers raise: once a run, so that the rest of this file is spared."""


armed = []


def stop(number, frame):
    if armed:
        armed.clear()
        raise Stopped


def digest(model):
    total = hashlib.sha256()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        total.update(name.encode())
        total.update(parameter.detach().view(torch.uint8).numpy())
    return total.hexdigest()


def build():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def rotate(model, undo):
    fastrot.apply(model, ("R1", "R2", "R3", "R4"), undo=undo)


def one_run(model, undo, delay, numbers):
    """Rotate while a thread sends the signals; returns whether one was raised."""

    done = []

    def send():
        time.sleep(delay)
        for number in numbers:
            os.kill(os.getpid(), number)
        done.append(True)

    hit = False
    armed.append(True)
    try:
        threading.Thread(target=send).start()
        rotate(model, undo)
    except Stopped:
        hit = True
    armed.clear()
    while not done:  # what comes late must not meet the next run
        time.sleep(0.001)
    time.sleep(0.001)
    return hit


def state(model, first, last):
    """``original``, ``rotated``, or what is wrong."""
    time.sleep(0.001)
    workers = _thread._count()
    found, record = digest(model), bool(getattr(model.config, "fastrot", None))
    time.sleep(0.002)
    if workers or found != digest(model):
        return f"{workers} threads write on"
    if (found, record) == (first, False):
        return "original"
    return "rotated" if (found, record) == (last, True) else "half rotated"


def attack(original, threads, arguments):
    """All runs with one number of threads, as a report."""
    torch.set_num_threads(threads)
    first = digest(original)
    rotated = copy.deepcopy(original)
    rotate(rotated, arguments.undo)
    last = digest(rotated)
    again = copy.deepcopy(original)
    start = time.perf_counter()
    rotate(again, arguments.undo)
    length = time.perf_counter() - start
    chance = random.Random(threads)
    found = {}
    hits = 0
    for _ in range(arguments.runs):
        model = copy.deepcopy(original)
        numbers = chance.choices(SIGNALS, k=chance.choice([1, 1, 2]))
        hits += one_run(model, arguments.undo, chance.uniform(0, 1.1 * length), numbers)
        word = state(model, first, last)
        found[word] = found.get(word, 0) + 1
        if arguments.without_hold and word not in ("original", "rotated"):
            break
    return {"threads": threads, "found": found, "hits": hits, "length": length}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--undo", default="none")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--without-hold", action="store_true", help="the negative control")
    arguments = parser.parse_args()
    for number in SIGNALS:
        signal.signal(number, stop)
    if arguments.without_hold:
        fastrot.journal.held_signals = contextlib.nullcontext
        _cpu_threads.held_signals = contextlib.nullcontext
    original = build()
    for threads in arguments.threads:
        print(json.dumps(attack(original, threads, arguments)))


if __name__ == "__main__":
    main()
