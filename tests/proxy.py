"""A network between a client and a server that can be reset, stalled and healed."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

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
