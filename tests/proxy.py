"""A network between a client and a server that can be reset, stalled and healed.

`python -m tests.proxy PORT …` has a proxy in front of each of these ports: see `Wires`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from tests.bank_data import PROJECT

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """Passes bytes on between whoever connects to `port` and a server."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.answers_to_lose = 0
        self._losing_of = b""

    def lose_answers(self, statement: bytes, times: int) -> None:
        """Hang up in place of the answer to a COMMIT that follows a statement."""
        self._losing_of, self.answers_to_lose = statement, times

    def stall(self) -> None:
        """Keep what is sent from now on, both ways, without a word."""
        self._flowing.clear()

    def heal(self) -> None:
        """Pass on what was kept, and what comes."""
        self._flowing.set()

    def lead_to(self, server_port: int) -> None:
        """Connect whoever comes from now on with another server, as a name that moves on does."""
        self._server_port = server_port

    def reset(self) -> None:
        """Cut every connection the hard way."""
        for writer in self._writers:
            if writer.is_closing():
                continue
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    def half_close(self) -> None:
        """End one direction of every connection, the other goes on; which one is by turns."""
        for writer in list(self._writers)[::2]:
            if not writer.is_closing() and writer.can_write_eof():
                writer.write_eof()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect a client with the server until either leaves."""
        try:
            there = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:  # nobody is there: the client is to see just that
            writer.transport.abort()
            return
        self._writers |= {writer, there[1]}
        seen = bytearray()
        try:
            async with asyncio.TaskGroup() as both_ways:
                both_ways.create_task(self._pass_on(reader, there[1], seen.extend))
                both_ways.create_task(self._pass_on(there[0], writer, lambda _: self._lose(seen)))
        finally:
            self._writers -= {writer, there[1]}

    def _lose(self, asked: bytearray) -> None:
        """Raise in place of passing an answer on that is to be lost; forget what it answers."""
        losing = self.answers_to_lose > 0 and self._losing_of in asked
        if b"COMMIT" in asked:
            asked.clear()
            if losing:
                self.answers_to_lose -= 1
                raise ConnectionResetError

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        look: Callable[[bytes], None],
    ) -> None:
        try:
            while received := await reader.read(65_536):
                look(received)
                await self._flowing.wait()
                writer.write(received)
                await writer.drain()
        except OSError:
            return
        except RuntimeError:  # after `half_close`: there is nobody to pass it on to
            return
        finally:
            writer.close()


@asynccontextmanager
async def proxy_to(server_port: int) -> AsyncGenerator[Proxy]:
    """Run a proxy in front of a server."""
    proxy = Proxy(server_port)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = listener.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        proxy.heal()
        listener.close()
        proxy.reset()


class Wires:
    """Proxies in front of servers, by name, in a process of their own.

    Beside threads that are at work they would be slow, which is a fault that nobody planned.
    """

    def __init__(self, servers: dict[str, int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.proxy", *map(str, servers.values())],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._numbers = {name: number for number, name in enumerate(servers)}
        self.ports = dict(zip(servers, map(int, self._heard().split()), strict=True))

    def do(self, name: str, action: str) -> None:
        """Do something to a proxy, by the name of its method."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._numbers[name]} {action}\n")
        self._process.stdin.flush()
        assert self._heard() == "done\n"

    def close(self) -> None:
        """Hang up."""
        assert self._process.stdin is not None
        with self._process:
            self._process.stdin.close()
            assert self._process.wait(20) == 0

    def _heard(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


async def _serve(ports: Sequence[str]) -> None:
    """Say on which ports the proxies listen; do to them what lines say until there are no more."""
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(proxy_to(int(port))) for port in ports]
        _say(*(proxy.port for proxy in proxies))
        while line := await asyncio.to_thread(sys.stdin.readline):
            number, action = line.split()
            getattr(proxies[int(number)], action)()
            _say("done")
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=5)  # their connections are cut


def _say(*words: object) -> None:
    sys.stdout.write(f"{' '.join(map(str, words))}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1:]))
