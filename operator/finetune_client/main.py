"""`kubectl finetune`: the commands of a cluster as a plugin of kubectl, and the parser they share with `finetune`."""

import argparse
import sys

from finetune_client.complete import print_candidates
from finetune_client.verbs import VERBS


def main() -> None:
    """Console script `kubectl-finetune`."""
    words = sys.argv[1:]
    parser = argparse.ArgumentParser(
        prog="kubectl finetune",
        description="See and steer the FineTuneJobs of a cluster.",
        epilog="Exit codes: 0 done, 1 refused, 2 wrong usage, 3 not found, 4 no right, 5 no cluster, 6 not installed, "
        "7 the job failed, 10 invalid manifest.",
    )

    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, verb in VERBS.items():
        subparser = verbs.add_parser(name, help=verb.help, description=f"{verb.help[0].upper()}{verb.help[1:]}.")
        if name in words:
            verb.add_options(subparser)

    options = parser.parse_args(words)
    sys.exit(VERBS[options.verb].call(options, ()))


def kubectl_complete() -> None:
    """Console script `kubectl_complete-finetune`, which kubectl calls with the words after `kubectl finetune`."""
    print_candidates(sys.argv[1:], VERBS)
