"""What others are told: messages about jobs that ended and places that rest, kept until their receiver has them.

A message is written in the transaction of what it tells, one row for each receiver that has subscribed to its kind. It
keeps one id through all tries, so that a receiver can tell what it has had.
"""

import json
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Connection, delete, insert, select, update

from jobs.ledger.database import Database
from jobs.ledger.rows import JobRow
from jobs.ledger.schema import deliveries, subscriptions
from jobs.states import JobState


class MessageKind(StrEnum):
    """What a message tells."""

    JOB_AWAITING_APPROVAL = "job.awaiting_approval"
    JOB_PUBLISHED = "job.published"
    JOB_FAILED = "job.failed"
    JOB_QUARANTINED = "job.quarantined"
    JOB_CANCELLED = "job.cancelled"
    PLACE_PAUSED = "place.paused"
    PLACE_RESUMED = "place.resumed"


JOB_MESSAGES: Mapping[JobState, MessageKind] = {
    JobState.AWAITING_APPROVAL: MessageKind.JOB_AWAITING_APPROVAL,
    JobState.PUBLISHED: MessageKind.JOB_PUBLISHED,
    JobState.FAILED: MessageKind.JOB_FAILED,
    JobState.QUARANTINED: MessageKind.JOB_QUARANTINED,
    JobState.CANCELLED: MessageKind.JOB_CANCELLED,
}
"""The final states, and that in which a person is asked; and what tells them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Something to tell."""

    kind: MessageKind
    data: Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One message on its way to one receiver."""

    number: int
    webhook: str
    message_id: str
    """The same in every try, and for every receiver."""
    body: str
    """JSON."""
    created_at: float
    num_tries: int
    """Tries that have failed so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookRecord:
    """How deliveries to one receiver stand. Times are seconds since 1970 on the store's clock."""

    name: str
    num_waiting: int
    num_given_up: int
    last_failure: str | None
    """Of the oldest message that waits."""


class Deliveries:
    """The side of the ledger that tells others."""

    _database: Database

    def subscribe(self, webhooks: Mapping[str, Collection[MessageKind]]) -> None:
        """Let these receivers, and no others, be told from now on. What waits for one that is gone is dropped.

        Args:
            webhooks: by name, what each is told.
        """
        with self._database.write() as connection:
            self._database.lock_admission(connection)
            now = self._database.now(connection)
            since = {row.name: row.since for row in connection.execute(select(subscriptions))}
            connection.execute(delete(subscriptions))
            rows = [
                {"name": name, "kinds": ",".join(sorted(kinds)), "since": since.get(name, now)}
                for name, kinds in webhooks.items()
            ]
            if rows:
                connection.execute(insert(subscriptions), rows)
            connection.execute(delete(deliveries).where(deliveries.c.webhook.not_in(webhooks)))

    def take_deliveries(self, webhook: str, limit: int, lease_seconds: float) -> tuple[Delivery, ...]:
        """Return messages that are due for a receiver, oldest first; no one else is given them for a while.

        Args:
            webhook: name of the receiver.
            limit: how many at most.
            lease_seconds: how long the sender has them for itself; one that died leaves them due again.
        """
        with self._database.write() as connection:
            now = self._database.now(connection)
            query = (
                select(deliveries)
                .where(deliveries.c.webhook == webhook, deliveries.c.due_at <= now)
                .order_by(deliveries.c.number)
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            rows = connection.execute(query).all()
            numbers = [row.number for row in rows]
            taken = update(deliveries).where(deliveries.c.number.in_(numbers)).values(due_at=now + lease_seconds)
            if rows:
                connection.execute(taken)
        return tuple(
            Delivery(
                number=row.number,
                webhook=row.webhook,
                message_id=row.message_id,
                body=row.body,
                created_at=row.created_at,
                num_tries=row.num_tries,
            )
            for row in rows
        )

    def delivered(self, number: int) -> None:
        """Note that a receiver has a message."""
        self._end(number, None)

    def give_up(self, number: int, failure: str) -> None:
        """Note that a message will not be sent again."""
        self._end(number, failure)

    def not_delivered(self, number: int, failure: str, delay_seconds: float) -> None:
        """Note that a try has failed, and when the next one is due."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            values = {"num_tries": deliveries.c.num_tries + 1, "failure": failure, "due_at": now + delay_seconds}
            connection.execute(update(deliveries).where(deliveries.c.number == number).values(values))

    def webhooks(self) -> tuple[WebhookRecord, ...]:
        """Return how deliveries to each receiver stand, by name."""
        ended = deliveries.c.ended_at
        with self._database.read() as connection:
            names = connection.scalars(select(subscriptions.c.name).order_by(subscriptions.c.name)).all()
            found = []
            for name in names:
                mine = select(deliveries.c.number, deliveries.c.failure).where(deliveries.c.webhook == name)
                waiting = connection.execute(mine.where(ended.is_(None)).order_by(deliveries.c.number)).all()
                lost = connection.execute(mine.where(ended.is_not(None), deliveries.c.failure.is_not(None))).all()
                found.append(
                    WebhookRecord(
                        name=name,
                        num_waiting=len(waiting),
                        num_given_up=len(lost),
                        last_failure=waiting[0].failure if waiting else None,
                    )
                )
        return tuple(found)

    def _end(self, number: int, failure: str | None) -> None:
        with self._database.write() as connection:
            values = {"ended_at": self._database.now(connection), "due_at": None, "failure": failure}
            connection.execute(update(deliveries).where(deliveries.c.number == number).values(values))


def job_message(row: JobRow, sequence: int, state: JobState, detail: Mapping[str, JsonValue]) -> Message:
    """Return what is told of a job that entered a final state."""
    data = {
        "job": row.id,
        "batch": row.batch,
        "state": state.value,
        "sequence": sequence,
        "base": row.base,
        "destination": row.destination,
        "detail": dict(detail),
    }
    return Message(kind=JOB_MESSAGES[state], data=data)


def tell(connection: Connection, messages: Iterable[Message], now: float) -> None:
    """Write messages for those who have subscribed to them.

    Args:
        connection: in the transaction that does what they tell.
        messages: in order.
        now: the time, seconds.
    """
    to_tell = list(messages)
    if not to_tell:
        return
    wanted = {row.name: row.kinds.split(",") for row in connection.execute(select(subscriptions))}
    at = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    rows: list[dict[str, Any]] = []
    for message in to_tell:
        message_id = f"msg_{secrets.token_hex(16)}"
        body = json.dumps({"type": message.kind.value, "timestamp": at, "data": dict(message.data)}, sort_keys=True)
        rows += [
            {"webhook": name, "message_id": message_id, "body": body, "created_at": now, "due_at": now}
            for name, kinds in wanted.items()
            if message.kind.value in kinds
        ]
    if rows:
        connection.execute(insert(deliveries), rows)
