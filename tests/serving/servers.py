"""What each server answers, in a process of its own.

The process is forked from one that has imported everything and served nothing. So a cell takes
seconds, and no server sees what another one left behind.
"""

import json
import os
import pickle
import socket
import sys
from contextlib import closing, contextmanager
from multiprocessing import get_context
from signal import Signals
from typing import NamedTuple
from urllib.request import Request, urlopen

import torch
from engine import PROMPTS, Answers, answers, engine, rotations, without
from helpers import word_tokenizer
from quantized import token_scores
from transformers import AutoModelForCausalLM
from transformers.cli.serve import Serve
from vllm.platforms.cpu import CpuPlatform

import fastrot

VLLM_NUMBERS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "W8A8": {"dtype": "bfloat16"},
    "W4A16": {"dtype": "bfloat16"},
    "fp8 KV": {"kv_cache_dtype": "fp8"},
}


class Failure(NamedTuple):
    """Why a server did not answer, and whether fastrot refused."""

    said: str
    ours: bool


def measured(server, folder, numbers):
    """What a server answers, and what it does with the rotations of each online place taken away.

    Returns:
        The answers, and by place those without it; or a failure.
    """
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, SERVERS[server], folder, numbers))
    process.start()
    there.close()
    try:
        if not here.poll(300):
            return Failure("no answer in 300 s", False)
        return pickle.loads(here.recv_bytes())
    except EOFError:
        process.join()
        return Failure(f"its process dies by {Signals(-process.exitcode).name}", False)
    finally:
        process.kill()
        process.join()


def _send(there, server, folder, numbers):
    torch.set_num_threads(1)
    try:
        got = server(folder, numbers)
    except BaseException as error:
        got = _failure(error)
    # Not by torch's own way, which shares the memory of a process that ends here.
    there.send_bytes(pickle.dumps(got))


def _failure(error):
    seen = error
    while seen is not None and not isinstance(seen, (fastrot.RotationError, fastrot.RecordError)):
        seen = seen.__cause__ or seen.__context__
    said = " ".join(str(seen or error).split())
    return Failure(said if seen else f"{type(error).__name__}: {said}", seen is not None)


def _vllm(folder, numbers, **options):
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    # The engine is eager, and what its sampler compiles takes longer than all the rest.
    torch._dynamo.config.disable = True
    register = CpuPlatform.register_triton_kernel_overrides

    def registered(*_):
        # vLLM looks through all modules, and stumbles over an object of this one.
        hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if "llvmlite" in name}
        try:
            register()
        finally:
            sys.modules.update(hidden)

    CpuPlatform.register_triton_kernel_overrides = registered
    with engine(folder, **VLLM_NUMBERS[numbers], **options) as llm:
        [places] = llm.apply_model(rotations)
        got = answers(llm)
        return got, {place: without(llm, place) for place in places}


def _vllm_transformers(folder, numbers):
    return _vllm(folder, numbers, model_impl="transformers")


def _dtype(numbers):
    if numbers == "fp8 KV":
        raise NotImplementedError("transformers has no cache in float8")
    return "float32" if numbers == "float32" else "bfloat16"


def _transformers(folder, numbers):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(numbers))
    return _all(model)


def _all(model):
    model.generation_config.eos_token_id = None
    got, places = _generated(model), {}
    for place in rotations(model):
        with _off(model, place):
            places[place] = _generated(model)
    return got, places


@torch.no_grad()
def _generated(model):
    options = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}
    tokens, best = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=ids > 0, output_logits=True, **options)
        tokens.append(made.sequences[0, len(prompt) :].tolist())
        best.append(torch.cat(made.logits).float().log_softmax(-1).topk(5).values)
    return Answers(tokens, torch.stack(best), token_scores(model, PROMPTS[-1]))


@contextmanager
def _off(model, place):
    """Let all rotations of one place do nothing."""
    modules = [module for name, module in model.named_modules() if name.endswith(place)]
    for module in modules:
        module.forward = lambda x, part=False: x
    yield
    for module in modules:
        del module.forward


def _serve(folder, numbers):
    """Over HTTP, one by one, and in float32 with continuous batching, too.

    HTTP brings no log-probabilities: those are of the model that the server has.
    """
    with _listening(folder, numbers) as (model, ask):
        got, places = _all(model)
        said = [ask(prompt) for prompt in PROMPTS]
    if said != [_words(tokens) for tokens in got.tokens]:
        raise RuntimeError("the answers over HTTP are not those of the model that the server has")
    if numbers == "float32":
        batching = {"continuous_batching": True, "cb_num_blocks": 64, "cb_max_batch_tokens": 64}
        with _listening(folder, numbers, **batching) as (_, ask):
            said += [ask(prompt) for prompt in PROMPTS]
    return got._replace(tokens=said), places


def _words(tokens):
    """As the server's text, without padding (0) and the end (2), which ends nothing here."""
    return " ".join("<s>" if token == 1 else f"w{token}" for token in tokens if token not in (0, 2))


@contextmanager
def _listening(folder, numbers, **options):
    """The model of a running `fastrot serve`, and a way to ask it: what follows a prompt."""
    with closing(socket.create_server(("localhost", 0))) as free:
        port = free.getsockname()[1]
    options |= {"device": "cpu", "dtype": _dtype(numbers), "port": port, "log_level": "error"}
    serve = Serve(str(folder), non_blocking=True, **options)
    manager = serve._model_manager
    name = manager.process_model_name(str(folder))
    model = manager.load_model_and_processor(name)[0]
    model.generation_config.eos_token_id = None
    # For some families transformers would read the file as a tokenizer of another kind.
    manager.loaded_models[name].processor = word_tokenizer(256)

    def ask(prompt):
        body = {"model": str(folder), "prompt": _words(prompt), "max_tokens": 16, "temperature": 0}
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urlopen(Request(f"http://localhost:{port}/v1/completions", data, kind)) as answer:
            return json.load(answer)["choices"][0]["text"]

    while not serve.server.started:
        pass
    try:
        yield model, ask
    finally:
        serve.kill_server()


SERVERS = {
    "vLLM": _vllm,
    "vLLM, models of transformers": _vllm_transformers,
    "transformers": _transformers,
    "fastrot serve": _serve,
}
