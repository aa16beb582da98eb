"""A server of RTSP (RFC 2326) on loopback that plays MPEG transport streams, as RTP in its connection."""

import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path

_SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=film\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
_PACKETS = 7 * 188  # bytes of a transport stream that go into a packet of RTP (RFC 2250)


class RtspServer:
    """Answers one client after another; each gets the next of some films, and after the last is refused.

    Args:
        films: paths of transport streams; when a film is sent, the connection is cut off.
    """

    def __init__(self, films: list[Path]) -> None:
        self._films = [path.read_bytes() for path in films]
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"rtsp://user:secret@127.0.0.1:{self._socket.getsockname()[1]}/cam"
        self.connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "RtspServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._thread.join(10)

    def _serve(self) -> None:
        for film in self._films:
            with suppress(OSError):
                connection, _ = self._socket.accept()
                self.connections += 1
                with connection:
                    self._answer(connection, film)
        self._socket.close()

    def _answer(self, connection: socket.socket, film: bytes) -> None:
        lines = connection.makefile("rb")
        while request := lines.readline().decode().split():
            headers = {}
            while line := lines.readline().decode().strip():
                key, _, value = line.partition(": ")
                headers[key.lower()] = value
            method, body, more = request[0], "", ""
            if method == "DESCRIBE":
                body, more = _SDP, "Content-Type: application/sdp\r\n"
            elif method == "SETUP":
                more = "Session: 1\r\nTransport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
            elif method == "PLAY":
                more = "Session: 1\r\n"
            elif method == "OPTIONS":
                more = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
            head = f"RTSP/1.0 200 OK\r\nCSeq: {headers['cseq']}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
            connection.sendall((head + body).encode())
            if method == "PLAY":
                for number, at in enumerate(range(0, len(film), _PACKETS)):
                    part = film[at : at + _PACKETS]
                    packet = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, number * 1000, 1) + part
                    connection.sendall(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
                return
