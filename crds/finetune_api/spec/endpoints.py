"""Addresses that a trainer may connect to: the administrator's policy for the endpoint that a user writes.

The operator checks what is written, without asking DNS. The trainer checks the address that a name has at the moment of
the connection. Addresses that lead to credentials or into the node are refused whatever the policy says.
"""

import ipaddress
import socket
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from finetune_api.base import ApiModel

_METADATA = (
    "fd00:ec2::/32",  # AWS, over IPv6
    "fd20:ce::254/128",  # Google, over IPv6
    "100.100.100.200/32",  # Alibaba
    "168.63.129.16/32",  # Azure's host
    "192.0.0.192/32",  # Oracle
)
_METADATA_NETWORKS = tuple(map(ipaddress.ip_network, _METADATA))
_THIS_HOST = (ipaddress.ip_network("0.0.0.0/8"), ipaddress.ip_network("::/128"))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REFUSED_NAMES = ("metadata.google.internal", "metadata", "kubernetes", "kubernetes.default", "kubernetes.default.svc*")

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class EndpointPolicy(ApiModel):
    """Endpoints that an installation allows. Link-local and metadata addresses are never allowed."""

    hosts: tuple[str, ...] = ()
    """Patterns of host names, such as *.example.com; empty allows every host."""

    private: bool = True
    """True if addresses of private networks are allowed, such as that of a MinIO in the cluster."""

    loopback: bool = False
    """True only where pods are processes of one machine, as on the development cluster."""

    api_server: str | None = None
    """Address and port of the cluster's API server, which is refused."""

    def refuse_url(self, url: str) -> str | None:
        """Say why a URL is refused, as far as its text shows; None if it may be tried."""
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")

        if self.hosts and not any(fnmatchcase(host, pattern.lower()) for pattern in self.hosts):
            return f"{host} is none of the hosts that the administrator allows: {', '.join(self.hosts)}"
        if any(fnmatchcase(host, name) for name in _REFUSED_NAMES):
            return f"{host} is the name of a metadata service or of the cluster's API server"
        if not self.loopback and (host == "localhost" or host.endswith(".localhost")):
            return f"{host} is the pod itself"

        literal = _read_literal(host)
        try:
            port = parts.port or (80 if parts.scheme == "http" else 443)
        except ValueError:
            return f"{url} has no port that exists"
        return self.refuse_address(literal, port) if literal is not None else None

    def refuse_address(self, address: str, port: int) -> str | None:
        """Say why a connection to an IP address is refused; None if it is allowed."""
        ip = _unwrap(ipaddress.ip_address(address.partition("%")[0]))
        if ip.is_link_local or any(ip in network for network in _METADATA_NETWORKS):
            return f"{ip} belongs to the node or the cloud, which gives out credentials there"
        if ip.is_multicast or ip.is_reserved or any(ip in network for network in _THIS_HOST):
            return f"{ip} is no address of a server"
        if f"{ip}:{port}" == self.api_server:
            return f"{ip}:{port} is the cluster's API server"
        if ip.is_loopback:
            return None if self.loopback else f"{ip} is the pod itself"
        if not ip.is_global and not self.private:
            return f"{ip} is in a private network, and the administrator allows public addresses only"
        return None


def _read_literal(host: str) -> str | None:
    """Read an IP address in any form that connects: also one number, and parts in octal or hexadecimal."""
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None


def _unwrap(ip: IpAddress) -> IpAddress:
    """Return the IPv4 address that an IPv6 address carries: mapped, 6to4 or NAT64; else the address itself."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip
