"""`python -m finetune_devcluster up`: the whole platform for trying things by hand, until Ctrl-C."""

import signal
import sys

from finetune_devcluster.inputs import BUCKET
from finetune_devcluster.platform import Platform

NAMESPACE = "dev"


def up() -> None:
    """Start the platform, say how to reach it, and wait for Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Platform.start(lambda line: print(f"{line} ...", flush=True)) as platform:
            platform.create_namespace(NAMESPACE)
            platform.store.create_bucket(BUCKET)
            print(f"\nexport KUBECONFIG={platform.cluster.kubeconfig}")
            print(f"S3: {platform.store.endpoint_url}, bucket {BUCKET}; Secret s3-credentials in namespace {NAMESPACE}")
            print("Ctrl-C stops everything", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    if sys.argv[1:] != ["up"]:
        sys.exit("usage: python -m finetune_devcluster up")
    up()
