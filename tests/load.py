"""Servers in processes of their own, and many requests at once: good, bad, given up."""

import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

TOKENS = 12
PROMPTS = [" ".join(f"w{3 + (7 * n + 5 * k) % 60}" for k in range(1 + n % 9)) for n in range(20)]
ELSEWHERE = {"model": "nobody/nothing"}
NEGATIVE = {"max_tokens": -1}
LONG = {"prompt": "w5 " * 400}


@contextmanager
def serving(*command):
    """The address of a server that a command starts, once it is healthy."""
    with closing(socket.create_server(("localhost", 0))) as free:
        port = str(free.getsockname()[1])
    process = subprocess.Popen(
        [*command, "--port", port],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = f"http://localhost:{port}"
    # Nobody else reads what it says, and a full pipe would stop it.
    with ThreadPoolExecutor(1) as reader:
        said = reader.submit(process.stderr.read)
        try:
            while process.poll() is None and not healthy(address):
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            print(said.result())
            process.wait()


def healthy(address):
    """Whether a server answers, and says that it is well."""
    try:
        with urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except URLError:
        return False


def answers(model, tokenizer):
    """What a model says after every prompt, greedily."""
    said = []
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**asked, max_new_tokens=TOKENS, do_sample=False)[0]
        start = asked["input_ids"].shape[1]
        said.append(tokenizer.decode(tokens[start:], skip_special_tokens=True))
    return said


def load(address, model, expected, bad):
    """Send 200 requests from 16 threads, and look whether the server is well afterwards.

    Of ten in a row one is given up after its first piece, and one is bad. All others must get what
    is expected.

    Args:
        address: of the server.
        model: what it calls the model.
        expected: the answer to each prompt.
        bad: bad requests: what is wrong, and the status that refuses it; None where this server
            answers such a request.
    """
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

        def create(number, **changes):
            prompt = PROMPTS[number % len(PROMPTS)]
            body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            return client.completions.create(**body | changes, timeout=60)

        def ask(number):
            if number % 10 == 3:
                with create(number, stream=True) as pieces:
                    next(iter(pieces))
            elif number % 10 == 7:
                wrong, status = bad[number // 10 % len(bad)]
                if status is None:
                    return create(number, **wrong) and None
                with pytest.raises(openai.APIStatusError) as error:
                    create(number, **wrong)
                assert error.value.status_code == status
            else:
                return number, create(number).choices[0].text.strip()

        with ThreadPoolExecutor(16) as threads:
            got = dict(filter(None, threads.map(ask, range(200))))
    assert healthy(address)
    assert got == {n: expected[n % len(PROMPTS)] for n in range(200) if n % 10 not in (3, 7)}
