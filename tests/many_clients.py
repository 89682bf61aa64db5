"""Ask a server by many clients at once for a while, and compare every answer with the model's own.

mixtral-lab serve mini-mixtral --port 8000 &
python tests/many_clients.py http://127.0.0.1:8000 --clients 32 --seconds 30
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

import mixtral_lab


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--max-tokens", type=int, default=12)
    asked = parser.parse_args()
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    prompts = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a in range(8) for b in range(8)]
    said = [lab.chat(prompt, max_new_tokens=asked.max_tokens) for prompt in prompts]
    end = time.monotonic() + asked.seconds

    def client(number: int) -> list[tuple[str, float]]:
        found = []
        with httpx.Client(base_url=asked.url, timeout=120) as session:
            while (begun := time.monotonic()) < end:
                which = (number + 7 * len(found)) % len(prompts)
                body = {"messages": prompts[which], "max_tokens": asked.max_tokens}
                answer = session.post("/v1/chat/completions", json=body)
                if answer.status_code != 200:
                    verdict = f"status {answer.status_code}"
                else:
                    right = answer.json()["choices"][0]["message"]["content"] == said[which]
                    verdict = "right" if right else "not its own"
                found.append((verdict, time.monotonic() - begun))
        return found

    with ThreadPoolExecutor(asked.clients) as pool:
        results = [one for found in pool.map(client, range(asked.clients)) for one in found]
    verdicts = [verdict for verdict, _ in results]
    times = sorted(seconds for _, seconds in results)
    print(f"{asked.clients} clients, {asked.seconds:g} s, {len(set(said))} different answers among {len(said)} prompts")
    print({verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))})
    print(f"seconds for an answer: median {statistics.median(times):.2f}, longest {times[-1]:.2f}")
    print(httpx.get(f"{asked.url}/health").json())
    return 0 if set(verdicts) == {"right"} else 1


if __name__ == "__main__":
    sys.exit(main())
