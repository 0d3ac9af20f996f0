"""Commands for those who run the queue: pauses, policy, leases, upkeep of the ledger."""

import getpass
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.opening import open_service, open_store
from cluster.console.arguments import AsJson, Debug
from cluster.console.terminal import terminal
from jobs.errors import BadInputError

if TYPE_CHECKING:
    from jobs.ledger.pauses import Scope

commands = typer.Typer()
store_commands = typer.Typer(no_args_is_help=True, help="The ledger itself.")
commands.add_typer(store_commands, name="store")

What = Annotated[str, typer.Argument(metavar="queue|batch|base|place", help="What is kept back.")]
Name = Annotated[
    str,
    typer.Argument(
        metavar="[NAME]",
        help="Of the batch, the base (as requests have it) or the place: s3://bucket, hf://, a directory, node:NAME.",
    ),
]


@commands.command()
def pause(
    what: What,
    name: Name = "",
    *,
    reason: Annotated[str, typer.Option(help="Shown to those who wonder.")] = "",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Keep jobs from being started: all, or those of a batch, base or place. Those at work go on."""
    with terminal(as_json=as_json, debug=debug) as output:
        scope, name = _scope(what, name)
        with open_service() as service:
            changed = service.pause(scope, name, getpass.getuser(), reason)
        output.document({"scope": scope.value, "name": name, "changed": changed})
        output.show(f"{f'{scope} {name}'.rstrip()} {'is paused' if changed else 'was paused already'}")


@commands.command()
def resume(what: What, name: Name = "", *, as_json: AsJson = False, debug: Debug = False) -> None:
    """Let jobs be started again; also those of a place that was paused for a fault, before it is tried by itself."""
    with terminal(as_json=as_json, debug=debug) as output:
        scope, name = _scope(what, name)
        with open_service() as service:
            ended = service.resume(scope, name)
        output.document({"scope": scope.value, "name": name, "changed": bool(ended)})
        output.show(f"{f'{scope} {name}'.rstrip()} {'goes on' if ended else 'was not paused'}")


@commands.command()
def policy(*, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show what follows each class of failure, as the settings have it; those of the server, where one is set."""
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.console.queue_views import policy_table

        with open_service() as service:
            table = service.policy()
        output.document({"policy": table.model_dump(mode="json")["by_class"]})
        output.show(policy_table(table))


@commands.command("release-leases")
def release_leases(
    driver: Annotated[str, typer.Argument(metavar="DRIVER", help="As `mergefleet status` names it.")],
    *,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Take the jobs of a driver that is lost or hangs, without waiting for its leases; nothing it still does counts."""
    with terminal(as_json=as_json, debug=debug) as output, open_service() as service:
        count = service.release_leases(driver)
        output.document({"driver": driver, "released": count})
        output.show(f"{count} leases of {driver} released")


@commands.command()
def purge(
    *,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Since they ended: 12h, 30d, 8w.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Forget jobs that ended long ago: rows, events, reports; and old logs of this machine. Releases stay."""
    with terminal(as_json=as_json, debug=debug) as output, open_store() as store:
        from cluster.commands.purge import purge_jobs, purge_logs
        from cluster.settings import load_settings
        from jobs.durations import parse_duration

        age = parse_duration(older_than)
        num_jobs, num_reports = purge_jobs(store, age, dry_run=dry_run)
        num_logs = purge_logs(store, load_settings().logs, age, dry_run=dry_run)
        output.document({"jobs": num_jobs, "reports": num_reports, "logs": num_logs, "dry_run": dry_run})
        done = "would be" if dry_run else "were"
        output.show(f"{num_jobs} jobs, {num_reports} reports and {num_logs} log files {done} removed")


@store_commands.command("upgrade")
def upgrade(*, as_json: AsJson = False, debug: Debug = False) -> None:
    """Bring the tables of the ledger up to this version. Stop its drivers, and back it up, before."""
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.settings import load_settings
        from jobs.ledger.store import upgrade_store

        settings = load_settings()
        if settings.server is not None:
            raise BadInputError("the ledger is upgraded where it is: run this there, without MERGEFLEET_SERVER")
        before, after = upgrade_store(settings.store)
        output.document({"from": before, "to": after})
        output.show(f"schema {after}: nothing to do" if before == after else f"schema {before} is {after} now")


def _scope(what: str, name: str) -> "tuple[Scope, str]":
    """Return what is meant, with the name that the ledger has for it.

    Raises:
        BadInputError: it is nothing that can be paused.
    """
    from jobs.ledger.pauses import Scope, check_scope
    from jobs.locations import parse_location
    from jobs.places import parse_place

    try:
        scope = Scope(what)
    except ValueError:
        raise BadInputError(f"expected queue, batch, base or place, found {what!r}") from None
    check_scope(scope, name)
    if scope is Scope.BASE:
        name = str(parse_location(name))
    if scope is Scope.PLACE:
        name = parse_place(name)
    return scope, name
