"""Any ASGI app behind a real socket, with the options that the server runs with."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from freehold.serve.connection import UVICORN_OPTIONS


@contextmanager
def listening(app: Any, **options: Any) -> Iterator[int]:
    """Yield the port on 127.0.0.1 where an app answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, lifespan="off", **{**UVICORN_OPTIONS, **options})
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def exchange(port: int, *pieces: bytes) -> bytes:
    """Return all that a server sends until it closes the connection, having been sent some pieces."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        for piece in pieces:
            client.sendall(piece)
        return read_to_end(client)


def read_to_end(client: socket.socket) -> bytes:
    """Return what comes until the other side closes, or cuts, the connection."""
    received = b""
    try:
        while piece := client.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received
