"""Everything that a FineTuneJob needs, on real parts: control plane, S3, and a real node that runs the two images."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.platform import Platform
from finetune_devcluster.real_node.network import GATEWAY, bridge
from finetune_devcluster.real_node.node import RealNode
from finetune_devcluster.real_node.services import STORE_HOST, ServiceNetwork
from finetune_images.build import IMAGES
from finetune_images.local_store import CACHE
from finetune_test_programs.binaries import locked
from finetune_test_servers.s3_server import S3Server

STORE_PORT = 9000  # the samples' endpointURL is http://s3.example.internal:9000


@dataclass(frozen=True)
class RealPlatform(Platform):
    """A running platform; made by `RealPlatform.start_real`. The chart is not installed yet."""

    node: RealNode  # type: ignore[assignment]  # both nodes are lost and come back; tests of this one use no other

    @classmethod
    @contextmanager
    def start_real(cls) -> Iterator[Self]:
        """Start control plane, network, S3 and the node, and stop everything at the end."""
        with ExitStack() as stack:
            stack.enter_context(locked(CACHE / "node.lock"))  # a machine has one bridge of that name
            stack.enter_context(bridge())
            cluster = stack.enter_context(DevCluster.start())
            port = urlsplit(cluster.api_url).port
            assert port is not None
            stack.enter_context(ServiceNetwork.run(cluster.api_client(), port, STORE_HOST))
            store = stack.enter_context(S3Server.start(GATEWAY, STORE_PORT))
            node = stack.enter_context(RealNode.start(cluster, [image.tag for image in IMAGES.values()]))
            yield cls(cluster, store, node)
