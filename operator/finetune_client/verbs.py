"""The commands that talk to a cluster, with options and examples. `--help` imports nothing of Kubernetes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_client.complete import SCRIPTS
from finetune_client.verb import Verb, add_cluster_options, add_result_options

if TYPE_CHECKING:
    from rich.console import Console

    from finetune_client.connection import Cluster

Work = Callable[["Cluster", "Console", argparse.Namespace], int | None]
"""Carries out a command; returns its exit code, None for 0."""
INTERRUPTED = 130
PIPE_WIDTH = 1000
"""Columns where no terminal bounds them."""


def _call(work: Work) -> Callable[[argparse.Namespace, Sequence[str]], int]:
    """Open the cluster, do the work, and print what goes wrong as one sentence."""

    def call(options: argparse.Namespace, _: Sequence[str]) -> int:
        try:
            from rich.console import Console

            from finetune_client.connection import Cluster
        except ModuleNotFoundError as error:
            sys.stderr.write(f"package {error.name} is missing: pip install 'finetune-operator[client]'\n")
            return 2
        from finetune_client.errors import ClientError

        try:
            cluster = Cluster.open(options.kubeconfig, options.context, options.namespace)
            out = Console(highlight=False)
            # In a file or a pipe a line is as long as it is: nothing is cut to the width of a terminal.
            out.width = out.width if out.is_terminal else PIPE_WIDTH
            return int(work(cluster, out, options) or 0)
        except ClientError as error:
            sys.stderr.write(f"{error.message}\n")
            return int(error.code)
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:  # the reader, such as `head`, has gone
            sys.stderr.close()
            return 0

    return call


def _options(*adders: Callable[[argparse.ArgumentParser], object]) -> Callable[[argparse.ArgumentParser], None]:
    """Join the options of a command with those that every command has."""

    def add(parser: argparse.ArgumentParser) -> None:
        for adder in adders:
            adder(parser)
        add_cluster_options(parser)

    return add


def _one_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the job")


def _many_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these jobs")


def _everywhere(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-A", "--all-namespaces", action="store_true", help="jobs of all namespaces")


def _form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", choices=("wide", "name", "json", "yaml"), default="", help="form of the output"
    )


def _manifest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, help="job.yaml")
    parser.add_argument("--dry-run", action="store_true", help="only ask the API server whether it would take the job")
    parser.add_argument(
        "--wait", action="store_true", help="wait until the job has ended; the exit code is 7 if it failed"
    )
    parser.add_argument("--follow", action="store_true", help="the same as --wait")


def _resources(parser: argparse.ArgumentParser) -> None:
    for field in ("gpus", "nodes"):
        parser.add_argument(
            f"--{field}",
            type=int,
            metavar="N",
            help=f"another spec.resources.{field}: the job is created again with it",
        )


def _interval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="seconds between two looks (default: 2)"
    )


def _log_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on")
    parser.add_argument("--tail", type=int, metavar="LINES", help="only the last lines")
    parser.add_argument(
        "--attempt", type=int, metavar="N", help="the Nth pod of the job, counted from 1 (default: the latest)"
    )
    parser.add_argument("--preflight", action="store_true", help="the log of the checks before the GPU")


def _follow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on with the events to come")


def _new_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--as", dest="new_name", metavar="NAME", help="keep the failed job, and begin anew beside it under this name"
    )


def _submit(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> int | None:
    from finetune_client.change import read_manifest, submit_job
    from finetune_client.watch import watch_jobs

    manifest = read_manifest(options.manifest, options.namespace)
    cluster.namespace = manifest["metadata"].get("namespace") or cluster.namespace
    name = submit_job(cluster, out, manifest, dry_run=options.dry_run)
    return watch_jobs(cluster, out, [name]) if (options.wait or options.follow) and not options.dry_run else None


def _list(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> None:
    from finetune_client.show import list_jobs

    list_jobs(cluster, out, options.names, everywhere=options.all_namespaces, form=options.output)


def _watch(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> int:
    from finetune_client.watch import watch_jobs

    return watch_jobs(
        cluster, out, options.names, everywhere=options.all_namespaces, interval=max(0.2, options.interval)
    )


def _describe(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> None:
    from finetune_client.show import describe_job

    describe_job(cluster, out, options.name)


def _logs(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> None:
    from finetune_client.pods import print_logs

    print_logs(cluster, out, options.name, options)


def _events(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> None:
    from finetune_client.pods import print_events

    print_events(cluster, out, options.name, follow=options.follow)


def _suspend(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> None:
    if options.verb == "resume" and (options.gpus, options.nodes) != (None, None):
        from finetune_client.again import OtherGpus, resume_job_on

        resume_job_on(cluster, out, options.name, OtherGpus(options.gpus, options.nodes))
        return
    from finetune_client.change import set_suspended

    set_suspended(cluster, out, options.name, suspended=options.verb == "suspend")


def _cancel(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> None:
    from finetune_client.change import cancel_job

    cancel_job(cluster, out, options.name)


def _retry(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> None:
    from finetune_client.again import OtherGpus, retry_job

    retry_job(cluster, out, options.name, options.new_name, OtherGpus(options.gpus, options.nodes))


def _estimate(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> int:
    from finetune_client.show import estimate_job

    return estimate_job(cluster, out, options.name)


def _top(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> None:
    from finetune_client.show import show_top

    show_top(cluster, out, everywhere=options.all_namespaces)


def _result(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="[NAMESPACE/]NAME", help="name of the job")


def _artifacts(cluster: "Cluster", out: "Console", options: argparse.Namespace) -> int:
    from finetune_client.artifacts import show_artifacts

    return show_artifacts(cluster, out, options)


def _shell(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell to complete in")


def _completion(options: argparse.Namespace, _: Sequence[str]) -> int:
    sys.stdout.write(SCRIPTS[options.shell])
    return 0


VERBS = {
    "submit": Verb(
        "create a job in the cluster", ("finetune submit job.yaml --wait",), _options(_manifest), _call(_submit)
    ),
    "list": Verb(
        "list the jobs of a namespace or of all",
        ("finetune list -A -o wide",),
        _options(_many_jobs, _everywhere, _form),
        _call(_list),
    ),
    "watch": Verb(
        "watch jobs: bars, losses, what they wait for",
        ("finetune watch", "finetune watch support-bot"),
        _options(_many_jobs, _everywhere, _interval),
        _call(_watch),
    ),
    "describe": Verb(
        "show how a job is and why, with attempts and events",
        ("finetune describe support-bot",),
        _options(_one_job),
        _call(_describe),
    ),
    "logs": Verb(
        "show the log of a job's pod",
        ("finetune logs support-bot -f", "finetune logs support-bot --preflight"),
        _options(_one_job, _log_options),
        _call(_logs),
    ),
    "events": Verb(
        "show the events of a job", ("finetune events support-bot",), _options(_one_job, _follow), _call(_events)
    ),
    "suspend": Verb(
        "stop a job with a checkpoint, and keep it",
        ("finetune suspend support-bot",),
        _options(_one_job),
        _call(_suspend),
    ),
    "resume": Verb(
        "let a suspended job go on, on other GPUs if you like",
        ("finetune resume support-bot", "finetune resume support-bot --gpus 2"),
        _options(_one_job, _resources),
        _call(_suspend),
    ),
    "cancel": Verb(
        "stop and delete a job; what lies in S3 stays",
        ("finetune cancel support-bot",),
        _options(_one_job),
        _call(_cancel),
    ),
    "retry": Verb(
        "run a failed job again",
        ("finetune retry support-bot --gpus 2", "finetune retry support-bot --as support-bot-2"),
        _options(_one_job, _new_name, _resources),
        _call(_retry),
    ),
    "estimate": Verb(
        "show GPU memory and hours, as the checks estimate them",
        ("finetune estimate support-bot",),
        _options(_one_job),
        _call(_estimate),
    ),
    "top": Verb("show GPUs by job and by queue", ("finetune top -A",), _options(_everywhere), _call(_top)),
    "artifacts": Verb(
        "list what a job made, from its status, or download it",
        ("finetune artifacts support-bot", "finetune artifacts support-bot --download out/"),
        _options(_result, add_result_options),
        _call(_artifacts),
    ),
    "completion": Verb("print the completion script of a shell", ("finetune completion bash",), _shell, _completion),
}
"""Commands by name."""
