"""A service for agents.py to ask: it answers as models and tools do, some of them late and some out of order.

Run it with `python recipes/stub_service.py 8765`. What it knows, it knows by heart.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

FACTS = {
    "Everest": "Mount Everest is 8,849 m high.",
    "Mariana": "The Mariana Trench is 10,984 m deep.",
    "Nile": "The Nile is 6,650 km long.",
    "Baikal": "Lake Baikal is 1,642 m deep.",
    "Sahara": "The Sahara has 9,200,000 square kilometres.",
}

NONE: Mapping[str, Any] = {}


def facts(text: str) -> list[str]:
    """Return what is known of the things that a text names."""
    return [fact for name, fact in FACTS.items() if name in text]


def reply(what: str, given: dict[str, Any]) -> Any:
    """Answer a request, as a model or a tool would."""
    known = facts(given.get("question", ""))
    if what == "plan":
        parts = re.split(r"\band\b|[?,;]", given["question"])
        return [part.strip() for part in parts if part.strip()]
    if what == "judge":
        told = [sum(fact in draft["text"] for fact in known) for draft in given["drafts"]]
        return {**given["drafts"][told.index(max(told))], "sure": max(told) / len(known) if known else 0.0}
    if what == "write":
        return " ".join(given["notes"])
    if what == "compute":
        numbers = sorted(float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", " ".join(known)))
        return f"The numbers go from {numbers[0]:,.0f} to {numbers[-1]:,.0f}." if numbers else "There are no numbers."
    return known[0] if known else "Nobody knows."


class Service(ThreadingHTTPServer):
    """Answers POST requests of JSON at once, but for those that it's told to be slow or out of order for.

    Parameters
    ----------
    port : int
        Where on this machine; a free one by default.
    slow : mapping
        Seconds that some kinds of request take.
    failing : mapping
        How many of the next requests of a kind get an error 503.

    Attributes
    ----------
    asked : Counter
        How often each kind of request came.
    left : Counter
        How often whoever asked hung up before the answer.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, slow: Mapping[str, float] = NONE, failing: Mapping[str, int] = NONE) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.slow = dict(slow)
        self.failing = Counter(failing)
        self.asked: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.changed = threading.Condition()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def reply(self, what: str, given: dict[str, Any]) -> Any:
        """Answer a request."""
        return reply(what, given)

    def take(self, what: str) -> bool:
        """Count a request, and tell whether it's to fail."""
        with self.changed:
            self.asked[what] += 1
            self.changed.notify_all()
            fails = self.failing[what] > 0
            self.failing[what] -= fails
            return fails

    def lose(self, what: str) -> None:
        """Count a request whose answer nobody waits for."""
        with self.changed:
            self.left[what] += 1
            self.changed.notify_all()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 30) -> bool:
        """Wait for something about ``asked`` or ``left``; returns whether it came true."""
        with self.changed:
            return self.changed.wait_for(condition, seconds)


class Handler(BaseHTTPRequestHandler):
    """One request: its path is its kind, its body JSON."""

    server: Service

    def do_POST(self) -> None:
        """Answer, unless whoever asked hangs up first."""
        what = self.path.strip("/")
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fails = self.server.take(what)
        if what in self.server.slow and self._hangs_up(self.server.slow[what]):
            self.server.lose(what)
            return
        data = b"out of order" if fails else json.dumps(self.server.reply(what, given)).encode()
        self.send_response(503 if fails else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _hangs_up(self, seconds: float) -> bool:
        self.connection.settimeout(seconds)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)  # nothing more is sent: it returns at the end
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


if __name__ == "__main__":
    with Service(int(sys.argv[1]), slow={"expert": 60}, failing={"compute": 1}) as running:
        print(f"answers at {running.url}; Ctrl-C ends it")
        threading.Event().wait()
