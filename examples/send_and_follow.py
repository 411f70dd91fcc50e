"""Send the bank a few commands, and follow what becomes of them.

With CQRS_ES_BROKER_URL set to the same Redis in both places, `cqrs-es init && cqrs-es run` in
one terminal, and in another: `python examples/send_and_follow.py`.
"""

import asyncio
import os

from cqrs_es.client import Client

BROKER_URL = os.environ.get("CQRS_ES_BROKER_URL", "redis://localhost:6379/0")
ACCOUNT = "ACCT-001"


async def main() -> None:
    """Listen first, then send: every event is seen."""
    async with (
        Client(BROKER_URL, service="bank") as bank,
        bank.subscribe("send_and_follow", from_="end") as events,
    ):
        await bank.send("account", ACCOUNT, "OpenAccount", {"account_id": ACCOUNT})
        await bank.send("account", ACCOUNT, "DepositMoney", {"amount": "200.00"})
        outcome = await bank.execute("account", ACCOUNT, "DepositMoney", {"amount": "0"})
        print(outcome.status, outcome.error and outcome.error.message)

        async for event in events:
            print(event.offset, event.event_type, event.data)
            if event.event_type == "CustomerDepositedMoney":
                break


if __name__ == "__main__":
    asyncio.run(main())
