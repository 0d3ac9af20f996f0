"""Sends messages to webhooks: each until its receiver has it, under one id, signed (Standard Webhooks)."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import httpx2
import standardwebhooks

from cluster.setting_types import Webhook
from jobs.errors import MergefleetError
from jobs.ledger.deliveries import Delivery
from jobs.ledger.store import JobStore
from jobs.text import shown

logger = logging.getLogger(__name__)

GIVE_UP_SECONDS = 3 * 24 * 3600.0
"""A message that a receiver has not taken for so long is not sent again."""
_TIMEOUT = httpx2.Timeout(10.0, connect=5.0)
_STOP_SECONDS = 40.0
_LEASE_SECONDS = 45.0
"""How long a sender has a message for itself, longer than a try takes: one that died in between leaves it due again."""
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 300.0
_IDLE_SECONDS = 1.0
_MAX_FAILURE = 500


class Sender:
    """Sends what is due, with one thread for each receiver: one that is slow or down keeps no other waiting.

    Args:
        store: the ledger.
        webhooks: the receivers, by name. Others get no messages any more.
        clock: seconds since 1970; what is signed.
    """

    def __init__(
        self, store: JobStore, webhooks: Mapping[str, Webhook], clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._webhooks = webhooks
        self._clock = clock
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_all, args=(name, webhook), name=f"webhook-{name}", daemon=True)
            for name, webhook in webhooks.items()
        ]

    def start(self) -> None:
        """Begin to send."""
        self._store.subscribe({name: each.kinds for name, each in self._webhooks.items()})
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, once what is being sent has been answered."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_STOP_SECONDS)

    def _send_all(self, name: str, webhook: Webhook) -> None:
        signer = standardwebhooks.Webhook(webhook.secret.get_secret_value())
        num_failures = 0
        with httpx2.Client(timeout=_TIMEOUT, follow_redirects=False, trust_env=False) as client:
            while not self._stopping.is_set():
                try:
                    taken = self._store.take_deliveries(name, 1, _LEASE_SECONDS)
                    for delivery in taken:
                        num_failures = 0 if self._send(client, signer, webhook, delivery) else num_failures + 1
                except MergefleetError as error:
                    logger.warning("messages wait: the ledger does not answer", extra={"error": str(error)})
                    taken = ()
                except Exception:
                    # The thread's edge: a fault of ours must not end the messages of this receiver for good.
                    logger.exception("messages wait: a fault of mergefleet", extra={"webhook": name})
                    taken, num_failures = (), num_failures + 1
                if num_failures:
                    self._stopping.wait(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(num_failures - 1, 20)))
                elif not taken:
                    self._stopping.wait(_IDLE_SECONDS)

    def _send(
        self, client: httpx2.Client, signer: standardwebhooks.Webhook, webhook: Webhook, delivery: Delivery
    ) -> bool:
        """Send one message once; return whether its receiver has it."""
        failure = _post(client, webhook.url, self._headers(signer, delivery), delivery.body)
        about = {"webhook": delivery.webhook, "message_id": delivery.message_id}
        if failure is None:
            self._store.delivered(delivery.number)
            return True
        if self._store.now() - delivery.created_at > GIVE_UP_SECONDS:
            logger.error("a message is given up", extra={**about, "error": failure})
            self._store.give_up(delivery.number, failure)
            return False
        delay = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(delivery.num_tries, 20))
        if delivery.num_tries == 0:
            logger.warning("a message waits for its receiver", extra={**about, "error": failure})
        self._store.not_delivered(delivery.number, failure, delay)
        return False

    def _headers(self, signer: standardwebhooks.Webhook, delivery: Delivery) -> dict[str, str]:
        at = datetime.fromtimestamp(int(self._clock()), UTC)
        return {
            "Content-Type": "application/json",
            "webhook-id": delivery.message_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": signer.sign(delivery.message_id, at, delivery.body),
        }


def _post(client: httpx2.Client, url: str, headers: Mapping[str, str], body: str) -> str | None:
    """Send a body; return why it was not taken, or None when it was."""
    try:
        # What a receiver answers beside its status is not read: it may be without end.
        with client.stream("POST", url, headers=headers, content=body.encode()) as response:
            if response.is_success:
                return None
            return f"status {response.status_code}"
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return shown(str(error) or type(error).__name__, _MAX_FAILURE)
