"""Services and their names on a real node: what kube-proxy and CoreDNS do, for TCP and A records.

Each Service's address is one of this machine's bridge, and a connection to it is handed to a ready endpoint. The API
server's Service has no endpoints here; it leads to the control plane's port on loopback.
"""

import asyncio
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from finetune_devcluster.real_node.network import API_SERVICE, DNS, GATEWAY, add_address

Target = tuple[str, int]
POLL_SECONDS = 1.0
SERVICE_LABEL = "kubernetes.io/service-name"


class ServiceNetwork:
    """Forwards connections to Services and answers their names, in a thread of its own."""

    def __init__(self, api: client.ApiClient, api_port: int, hosts: dict[str, str]) -> None:
        """`hosts`: further names and their addresses."""
        self._core = client.CoreV1Api(api)
        self._discovery = client.DiscoveryV1Api(api)
        self._targets: dict[Target, list[Target]] = {(API_SERVICE, 443): [("127.0.0.1", api_port)]}
        self._listening: dict[Target, asyncio.Server] = {}
        self._stop = threading.Event()
        self.names = {"kubernetes.default.svc": API_SERVICE} | hosts

    @classmethod
    @contextmanager
    def run(cls, api: client.ApiClient, api_port: int, hosts: dict[str, str]) -> Iterator[Self]:
        """Serves until the end of the block."""
        network = cls(api, api_port, hosts)
        thread = threading.Thread(target=lambda: asyncio.run(network._serve()), daemon=True)
        thread.start()
        try:
            yield network
        finally:
            network._stop.set()
            thread.join(10)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: _NameServer(self.names), (DNS, 53))
        while not self._stop.is_set():
            with suppress(ApiException, HTTPError):  # the control plane may be busy: the next round asks again
                await asyncio.to_thread(self._read_services)
            for address in [each for each in self._targets if each not in self._listening]:
                self._listening[address] = await self._listen(address)
            await asyncio.sleep(POLL_SECONDS)

        transport.close()
        for server in self._listening.values():
            server.close()

    def _read_services(self) -> None:
        slices: list[Any] = self._discovery.list_endpoint_slice_for_all_namespaces().items
        services: list[Any] = self._core.list_service_for_all_namespaces().items
        for service in services:
            address, metadata = service.spec.cluster_ip, service.metadata
            if address in (None, "None", API_SERVICE):
                continue

            add_address(address)
            self.names[f"{metadata.name}.{metadata.namespace}.svc"] = address
            own = [each for each in slices if _is_of(each.metadata, metadata)]
            for port in service.spec.ports:
                self._targets[address, port.port] = [target for each in own for target in _ready(each, port.name)]

    async def _listen(self, address: Target) -> asyncio.Server:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection(*random.choice(self._targets[address]))
            except (OSError, IndexError):  # no endpoint is ready
                writer.transport.abort()
                return
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))

        return await asyncio.start_server(accept, *address)


def _is_of(endpoint_slice: Any, service: Any) -> bool:
    labels = endpoint_slice.labels or {}
    return bool(endpoint_slice.namespace == service.namespace and labels.get(SERVICE_LABEL) == service.name)


def _ready(endpoint_slice: Any, name: str) -> list[Target]:
    ports = [port.port for port in endpoint_slice.ports or [] if port.name == name]
    ready = [each for each in endpoint_slice.endpoints or [] if each.conditions.ready]
    return [(address, port) for each in ready for address in each.addresses for port in ports]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()
    except asyncio.CancelledError:  # the end of the network
        writer.transport.abort()
        raise


class _NameServer(asyncio.DatagramProtocol):
    """Answers A questions (RFC 1035) from a table of names, with or without the cluster's domain; every other name
    does not exist."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        end, labels = 12, []
        while length := data[end]:
            labels.append(data[end + 1 : end + 1 + length].decode())
            end += length + 1
        kind = struct.unpack("!H", data[end + 1 : end + 3])[0]
        question = data[12 : end + 5]

        name = ".".join(labels).lower().removesuffix(".cluster.local")
        address = self._names.get(name)
        answer = b""
        if address and kind == 1:
            answer = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 1, 4) + bytes(map(int, address.split(".")))
        flags = 0x8580 if address else 0x8583
        header = data[:2] + struct.pack("!HHHHH", flags, 1, 1 if answer else 0, 0, 0)
        self._transport.sendto(header + question + answer, peer)


STORE_HOST = {"s3.example.internal": GATEWAY}
"""The samples' store."""
