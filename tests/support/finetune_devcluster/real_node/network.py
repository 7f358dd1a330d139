"""The network of a real node: one bridge of this machine, on which pods, Services and the store are reached.

Nothing leaves the machine: pods have the bridge as their gateway, and it forwards nothing. The bridge goes at the end,
with every address.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

BRIDGE = "finetune0"
GATEWAY = "10.203.77.1"
PODS = "10.203.77.0/24"
DNS = "10.96.0.10"
API_SERVICE = "10.96.0.1"


def ip(*arguments: str, check: bool = True) -> None:
    """Runs `ip`."""
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@contextmanager
def bridge() -> Iterator[None]:
    """Makes the bridge with the addresses of the gateway, of DNS and of the API server's Service."""
    ip("link", "delete", BRIDGE, check=False)  # of a run that was killed
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("address", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        for address in (DNS, API_SERVICE):
            add_address(address)
        ip("link", "set", BRIDGE, "up")
        yield
    finally:
        ip("link", "delete", BRIDGE)


def add_address(address: str) -> None:
    """Lets this machine answer for the address of a Service."""
    ip("address", "replace", f"{address}/32", "dev", BRIDGE)


def cni_configuration(folder: str) -> dict[str, object]:
    """The CNI configuration: pods on the bridge, without a way out. `folder` keeps which addresses are taken."""
    addresses = {
        "type": "host-local",
        "dataDir": folder,
        "ranges": [[{"subnet": PODS, "gateway": GATEWAY}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    plugin = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipMasq": False, "ipam": addresses}
    return {"cniVersion": "0.4.0", "name": "finetune", "plugins": [plugin]}
