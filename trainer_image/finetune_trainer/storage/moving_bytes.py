"""Bodies of requests that are sent and received piece by piece, so that each piece is a sign of life.

Bytes as a whole would be sent by one call, which Python ends after the socket's time-out however much has gone: 16 MiB
in 60 s, eight parts at a time, need 2.2 MB/s. In pieces, the time-out is for each of them.
"""

import io
from typing import Any

from finetune_trainer.signs_of_life import beat

RECEIVED_PIECE = 64 << 10
"""At 1 kB/s, a piece takes a minute."""


class MovingBytes(io.BytesIO):
    """A body that botocore reads while it sends it, 16 KiB at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns the next piece: the one before has been sent."""
        beat()
        return super().read(size)


def read_moving(body: Any) -> bytes:
    """Reads botocore's StreamingBody to its end."""
    data = bytearray()
    while piece := body.read(RECEIVED_PIECE):
        beat()
        data += piece
    return bytes(data)
