"""`vllm serve` of a rotated checkpoint under load; the oracle is its original in transformers."""

import sys

import load
from checkpoints import SIZES
from helpers import tiny, word_tokenizer

import fastrot


def test_many_requests_at_once(tmp_path):
    model, tokenizer = tiny("llama", **SIZES), word_tokenizer()
    expected = load.answers(model, tokenizer)
    fastrot.apply(model, ("R1", "R2", "R3", "R4"), randomize=True)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path)
    # What `vllm serve` starts; the command itself looks for a distribution that is called vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    bad = [(load.ELSEWHERE, 404), (load.NEGATIVE, 400), (load.LONG, 400)]
    with load.serving(*command, *options, "--max-num-seqs", "8") as address:
        load.load(address, str(tmp_path), expected, bad)
