"""Load a server of the built-in LLaVA with parallel clients, and count what comes back.

python benchmarks/serve_load.py --clients 32 --seconds 60

The server is a separate process, started and stopped (SIGTERM) here. Each client is one of OpenAI's library
without retries; it asks the next question as soon as the last answer is complete, streamed and whole in turn, with
another method each time. Ends with status 1 if one request is lost or the server does not end cleanly.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

METHODS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"method": "dense"},
    {"keep": 36},
    {"method": "visionzip", "keep": 24},
)


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port; returns the process and its address."""
    command = [sys.executable, "-m", "vtr", "serve", "--method", "flowcut", "--keep", "64"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--json", *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the server ended with status {process.wait()}")
    return process, json.loads(line)["url"]


def load(url: str, clients: int, seconds: float, key: str = "none") -> dict[str, Any]:
    """Ask until the time is over; returns the counts of answers and of errors by their names."""
    import openai

    from vtr.zoo import vqa

    samples = vqa(20, seed=3)
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    end = time.monotonic() + seconds

    def messages(number: int) -> list[Any]:
        sample = samples[number % len(samples)]
        buffer = io.BytesIO()
        sample.image.save(buffer, "png")
        data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        image = {"type": "image_url", "image_url": {"url": data}}
        return [{"role": "user", "content": [image, {"type": "text", "text": sample.question}]}]

    def run(number: int) -> None:
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=300)
        while True:  # each client asks once at least
            wanted = METHODS[number % len(METHODS)]
            try:
                answer = client.chat.completions.create(
                    model="digits-llava",
                    messages=messages(number),
                    max_tokens=16,
                    stream=bool(number % 2),
                    extra_body={} if wanted is None else {"vtr": wanted},
                )
                if number % 2:
                    text = "".join(c.choices[0].delta.content or "" for c in answer if c.choices)
                else:
                    text = answer.choices[0].message.content
                found = "answered" if text else "empty"
            except openai.OpenAIError as error:
                found = f"{type(error).__name__}: {error}"[:200]
            with lock:
                counts[found] += 1
            number += 1
            if time.monotonic() >= end:
                return

    threads = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered = counts.pop("answered", 0)
    return {"clients": clients, "seconds": seconds, "answered": answered, "lost": dict(counts)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    process, url = start()
    try:
        found = load(url, given.clients, given.seconds)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    print(json.dumps({**found, "server": status}))
    return 1 if found["lost"] or not found["answered"] or status else 0


if __name__ == "__main__":
    sys.exit(main())
