"""Which jobs a pause holds: the mark that keeps them from being claimed, set and taken away."""

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select, update

from jobs.ledger.schema import jobs
from jobs.states import CLAIMABLE_STATES


def key_of(scope: str, name: str) -> str:
    """Return what jobs held by a pause name: the same for two pauses of one thing, by a person and by a driver."""
    return f"{scope} {name}".rstrip()


def hold(connection: Connection, scope: str, name: str) -> None:
    """Mark the jobs that wait and are covered, as far as columns tell; claims mark the others when they meet them."""
    if scope == "queue":
        return  # looked at before anything is claimed
    if scope == "batch":
        covered: ColumnElement[bool] = jobs.c.batch == name
    elif scope == "base":
        covered = jobs.c.base == name
    else:
        below = name.removeprefix("file://").rstrip("/") + "/"
        # Not LIKE, for which SQLite takes capitals and small letters as the same.
        covered = or_(*(func.substr(column, 1, len(below)) == below for column in (jobs.c.destination, jobs.c.base)))
    waiting = and_(jobs.c.state.in_(CLAIMABLE_STATES), jobs.c.held_by == "")
    _mark(connection, and_(waiting, covered), key_of(scope, name))


def let_go(connection: Connection, key: str) -> None:
    """Let jobs be claimed that a pause held; claims hold them again where another one does."""
    _mark(connection, and_(jobs.c.state.in_(CLAIMABLE_STATES), jobs.c.held_by == key), "")


def _mark(connection: Connection, where: ColumnElement[bool], key: str) -> None:
    """Mark jobs; locked in the order of all who lock several, else two would wait for each other."""
    numbers = select(jobs.c.number).where(where).order_by(jobs.c.number).with_for_update()
    connection.execute(update(jobs).where(jobs.c.number.in_(numbers)).values(held_by=key))
