"""Bounds what a TLS connection holds in memory.

asyncio gives each a receive buffer of 256 KiB, filled with zeros, although a record of TLS has 16 KiB at most: 200
trainers that report at once would hold 50 MiB of nothing.
"""

from asyncio.sslproto import SSLProtocol

RECEIVE_BYTES = 32 * 1024


def shrink_tls_buffers() -> None:
    """Give every later TLS connection of this process a receive buffer of `RECEIVE_BYTES`."""
    # The attribute has no other way in. Without it (another asyncio), there is nothing to shrink.
    if hasattr(SSLProtocol, "max_size"):
        SSLProtocol.max_size = RECEIVE_BYTES
