"""What vLLM makes of a checkpoint. Nothing here imports fastrot."""

import gc
import random
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from vllm import LLM, SamplingParams

PROMPTS = [random.Random(n).choices(range(3, 256), k=n) for n in (1, 5, 17, 40)]


class Answers(NamedTuple):
    """Greedy tokens after every prompt, and log-probabilities.

    ``logprobs`` are the five best of each token; ``scores`` those of the tokens of the longest
    prompt, which no choice of a token can change.
    """

    tokens: list[list[int]]
    logprobs: torch.Tensor
    scores: torch.Tensor


@contextmanager
def engine(folder, **kwargs):
    """A running vLLM, eager and in float32 unless said otherwise."""
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,  # the longest prompt is prefilled in chunks
        "disable_log_stats": True,
    }
    llm = LLM(str(folder), **(options | kwargs))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def answers(llm, tokens=16, adapter=None):
    llm.reset_prefix_cache()
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    options = {"use_tqdm": False, "lora_request": adapter}
    outputs = [done.outputs[0] for done in llm.generate(prompts, sampling, **options)]
    best = [[_best(step) for step in output.logprobs] for output in outputs]
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    steps = llm.generate(prompts[-1:], scoring, **options)[0].prompt_logprobs
    scores = [step[token].logprob for step, token in zip(steps, PROMPTS[-1], strict=True) if step]
    tokens = [list(output.token_ids) for output in outputs]
    return Answers(tokens, torch.tensor(best), torch.tensor(scores))


def _best(step):
    return sorted((entry.logprob for entry in step.values()), reverse=True)[:5]


def distance(got, scores):
    return float((got.scores - scores).abs().mean())


def served(folder, **kwargs):
    with engine(folder, **kwargs) as llm:
        return answers(llm)


def assert_same(got, expected, tolerance=2e-5):
    assert got.tokens == expected.tokens
    assert float((got.logprobs - expected.logprobs).abs().max()) < tolerance


def rotations(worker_model):
    """How many online rotations a worker has, by their places."""
    named = worker_model.named_modules(remove_duplicate=False)  # queries and keys share one
    leaves = (name.rpartition(".")[2] for name, _ in named)
    return dict(Counter(leaf for leaf in leaves if leaf.startswith("fastrot_")))


def without(llm, place, end=""):
    """What an engine answers while the rotations of one place are off.

    ``end`` is that of the names of the modules that are meant, all if it is left out.
    """
    llm.apply_model(partial(_swap, place, f"kept_{place}", end))
    try:
        return answers(llm)
    finally:
        llm.apply_model(partial(_swap, f"kept_{place}", place, end))


def _swap(old, new, end, worker_model):
    """Give what is called ``old`` the name ``new``, with nothing in its place, or the way back."""
    for name, module in list(worker_model.named_modules()):
        if name.endswith(end) and hasattr(module, old):
            setattr(module, new, getattr(module, old))
            setattr(module, old, nn.Identity())
            if old.startswith("kept_"):
                delattr(module, old)
