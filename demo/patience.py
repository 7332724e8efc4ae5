"""How long a login has to wait: longer after every wrong password from the same address.

What it does not know: passwords, browsers or cookies.
"""

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

FREE, LONGEST = 3, 30.0
"""Wrong passwords without any wait, and the longest wait in seconds."""
MAX_IN_LINE = 4
_MAX_ADDRESSES = 10_000


@dataclass
class _Record:
    wrong: int = 0
    in_line: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Crowded(Exception):
    """Too many logins of one address are waiting already."""


class Patience:
    """Wrong passwords per address; logins of one address go one at a time."""

    def __init__(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Start without any memory.

        Args:
            sleep: Waits that many seconds.
        """
        self._sleep = sleep
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def seconds(self, address: str) -> float:
        """Return what the next login of an address waits: 0, 0, 0, 1, 2, 4 ... 30."""
        record = self._records.get(_who(address))
        over = -1 if record is None else record.wrong - FREE
        return 0.0 if over < 0 else min(LONGEST, 2.0 ** min(over, 10))

    @asynccontextmanager
    async def turn(self, address: str) -> AsyncIterator[None]:
        """Wait for this address's turn and then as long as it has to.

        Raises:
            Crowded: Others of the same address wait already.
        """
        record = self._record(address)
        if record.in_line >= MAX_IN_LINE:
            raise Crowded
        record.in_line += 1
        try:
            async with record.lock:
                await self._sleep(self.seconds(address))
                yield
        finally:
            record.in_line -= 1

    def note(self, address: str, *, was_right: bool) -> None:
        """Remember how a login ended; a right password forgives the wrong ones."""
        record = self._record(address)
        record.wrong = 0 if was_right else record.wrong + 1

    def _record(self, address: str) -> _Record:
        who = _who(address)
        record = self._records.setdefault(who, _Record())
        self._records.move_to_end(who)
        if len(self._records) > _MAX_ADDRESSES:
            self._records.popitem(last=False)
        return record


def _who(address: str) -> str:
    """Name who stands behind an address: a household has a whole IPv6 /64 to itself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return str(parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
