"""A TCP line from every process to the first, over which all learn within seconds that one of them is gone, and why.

    process k -> first    {"token", "process", "host"}, then {"shared": number} every second, at last {"ended": sentence, "code"}
    first -> process k    {"token"}, then {"shared": number} every second, at last {"ended": sentence, "code"}

The sentence is empty where all is well; the first process passes on those of others.

A collective never comes back from a process that is gone: accelerators wait until jax gives up after its heartbeat timeout and aborts
with a stack trace, and no process knows which of the others it was. Here a closed line is noticed at once, a silent one after `silence`
seconds. One JSON object per line of text; the token keeps strangers out.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

LOST = 75  # exit code of processes that lost another: a launcher starts the run again, and it goes on from its last checkpoint
TICK = 1.0  # seconds between two signs of life
ANSWER = 5.0  # seconds for a line to be taken up


def leave(sentence: str, code: int) -> None:
    """Say why and end this process at once, whatever its other threads wait for."""
    print(f"\nvlm_jax: {sentence}", file=sys.stderr, flush=True)  # on a line of its own, below a progress bar
    os._exit(code)


class Offer(NamedTuple):
    """Where the first process listens: names it may be reached by, port, and what a caller must know."""

    names: tuple[str, ...]
    port: int
    token: str


class Line:
    """Messages over one socket."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(ANSWER)
        self.socket, self._rest, self._turn = connection, b"", threading.Lock()
        self.process, self.host, self.heard, self.ended = -1, "", time.monotonic(), False

    def send(self, **message: Any) -> None:
        """Send a message; a line that is closed or stuck is noticed where it is read."""
        with self._turn, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived, None where the line is closed."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None


class Peers(threading.Thread):
    """Watches the other processes until all have ended; `lost(sentence, code)` is called when one is gone before its end.

    listener: of process 0. line: of every other process, to process 0. silence: seconds after which a line is dead.
    """

    def __init__(
        self,
        process: int,
        count: int,
        silence: float,
        token: str,
        listener: socket.socket | None = None,
        line: Line | None = None,
        lost: Callable[[str, int], None] = leave,
    ):
        super().__init__(daemon=True, name="peers")
        self._process, self._count, self._silence, self._token = process, count, silence, token
        self._listener, self._lost = listener, lost
        self._lines = [line] if line else []
        self._to_come = 1 if line else count - 1  # lines that have not ended
        self._mine: float | None = None
        self._shared: dict[int, float] = {}

    def share(self, number: float) -> None:
        """Let process 0 know `number` with the next sign of life."""
        self._mine = number

    def shared(self) -> dict[int, float]:
        """{process: number it shares} of all processes that have said one, on process 0; empty on the others."""
        return {} if self._listener is None or self._mine is None else {0: self._mine} | self._shared

    def end(self, why: str = "", code: int = 0) -> None:
        """This process has ended; why, code: the sentence and exit code with which, if it failed. Else returns when all have ended."""
        sentence = f"process {self._process} (host {socket.gethostname()}) failed: {why}" if why else ""
        for line in list(self._lines):
            line.send(ended=sentence, code=code)
        if not why:
            self.join()
            for line in self._lines:
                line.socket.close()

    def cancel(self) -> None:
        """Watch no more."""
        self._to_come = 0
        self.join()

    def run(self) -> None:
        """Until every line has ended."""
        told = 0.0
        with selectors.DefaultSelector() as ready:
            if self._listener:
                ready.register(self._listener, selectors.EVENT_READ)
            for line in self._lines:
                ready.register(line.socket, selectors.EVENT_READ, line)
            while self._to_come > 0:
                for key, _ in ready.select(TICK / 2):
                    self._read(ready, key.data) if key.data else self._take_up(ready)
                now = time.monotonic()
                for line in [line for line in self._lines if not line.ended and now - line.heard > self._silence]:
                    self._gone(ready, line, f"has not been heard of for {self._silence:g} s")
                if now - told >= TICK:
                    told = now
                    for line in self._lines:
                        line.send(**({} if self._mine is None else {"shared": self._mine}))
        if self._listener:
            self._listener.close()

    def _take_up(self, ready: selectors.BaseSelector) -> None:
        line = Line(self._listener.accept()[0])
        ready.register(line.socket, selectors.EVENT_READ, line)

    def _read(self, ready: selectors.BaseSelector, line: Line) -> None:
        messages = line.receive()
        for message in messages or ():
            if line not in self._lines:
                if message.get("token") != self._token:
                    messages = None
                    break
                line.process, line.host = int(message["process"]), str(message["host"])
                line.send(token=self._token)
                self._lines.append(line)
            elif "ended" in message:
                return self._ended(ready, line, message["ended"], message["code"])
            elif "shared" in message:
                self._shared[line.process] = float(message["shared"])
        if messages is None and line in self._lines:
            self._gone(ready, line, "ended without a word: it was killed, or its host went down")
        elif messages is None:
            ready.unregister(line.socket)
            line.socket.close()

    def _gone(self, ready: selectors.BaseSelector, line: Line, what: str) -> None:
        sentence = (
            f"process {line.process} of {self._count} (host {line.host}) {what}; start the same command again in all processes, "
            "and the run goes on from its last checkpoint"
        )
        self._ended(ready, line, sentence, LOST)

    def _ended(self, ready: selectors.BaseSelector, line: Line, sentence: str, code: int) -> None:
        ready.unregister(line.socket)  # it stays open until this process tells its own end
        line.ended = True
        self._to_come -= 1
        if sentence:
            for other in self._lines if self._listener else ():
                if not other.ended:
                    other.send(ended=sentence, code=code)
            self._lost(sentence, code)


def listen(also: str = "") -> tuple[socket.socket, Offer]:
    """A listening socket of the first process on a free port, and how the others find it; also: a name that they know it by."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
    return listener, Offer(tuple(dict.fromkeys(_names(also))), listener.getsockname()[1], secrets.token_hex(16))


def _names(also: str) -> Iterator[str]:
    name = socket.gethostname()
    if also:
        yield also
    yield name
    try:
        yield from (str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
    except OSError:
        pass


def call(offer: Offer, process: int) -> Line | None:
    """The line to the first process; None where it cannot be reached by any of its names, through a firewall for example."""
    for name in offer.names:
        try:
            line = Line(socket.create_connection((name, offer.port), ANSWER))
        except OSError:
            continue
        line.process, line.host = 0, name
        line.send(token=offer.token, process=process, host=socket.gethostname())
        if any(message.get("token") == offer.token for message in line.receive() or ()):
            return line
        line.socket.close()
    return None
