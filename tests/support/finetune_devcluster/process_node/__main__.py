"""`python -m finetune_devcluster.process_node CONFIG`: the node program; CONFIG is a KubeletConfig as JSON."""

import asyncio
import json
import logging
import sys
from pathlib import Path

from finetune_devcluster.process_node.api import Api
from finetune_devcluster.process_node.kubelet import Kubelet, KubeletConfig


async def run(config: KubeletConfig) -> None:
    """Run the node until its stdin closes."""
    async with Api(Path(config.kubeconfig)) as api:
        await Kubelet(config, api).run()


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    asyncio.run(run(KubeletConfig(**json.loads(sys.argv[1]))))
