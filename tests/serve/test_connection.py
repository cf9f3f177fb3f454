"""Clients that leave while they are answered, over real sockets: nothing more is written to them."""

import asyncio
import logging
import socket
import struct
import threading

import pytest

from serve.listening import listening

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
START = {"type": "http.response.start", "status": 200, "headers": []}
PIECE = {"type": "http.response.body", "body": b"piece", "more_body": True}
RESET = struct.pack("ii", 1, 0)  # for SO_LINGER: closing tells the other side that nothing is read any more


@pytest.mark.parametrize("num_requests", [1, 2], ids=["alone", "pipelined"])
def test_a_client_that_leaves_ends_the_answer_that_is_written(num_requests):
    gone = threading.Event()

    async def app(scope, receive, send):
        await receive()
        await send(START)
        await send(PIECE)
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    with listening(app) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sender:
            sender.sendall(GET * num_requests)
            assert sender.recv(65536)
        assert gone.wait(60)


def test_pieces_that_are_ready_when_a_client_leaves_make_no_noise_in_the_log(caplog):
    left, written = threading.Event(), threading.Event()

    async def app(scope, receive, send):
        await receive()
        await send(START)
        left.wait(60)  # holds the event loop, which hears of nothing
        for _ in range(20):
            await send(PIECE)
        await asyncio.sleep(0)
        for _ in range(20):
            await send(PIECE)
        written.set()

    with caplog.at_level(logging.INFO), listening(app) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sender:
            sender.sendall(GET)
            assert sender.recv(65536)
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        left.set()
        assert written.wait(60)
    assert "asyncio" not in {record.name for record in caplog.records}
