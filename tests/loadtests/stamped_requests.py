# SPDX-License-Identifier: Apache-2.0
"""A second locustfile: each request carries, in the header X-Asked, the time at which locust's client began it.

So a test knows how long a request was under way, and a machine that wakes slowly does not fail it.
"""

import time
from typing import Any

from locust.clients import HttpSession

_request = HttpSession.request


def _stamped(self: HttpSession, *args: Any, headers: dict[str, str], **options: Any) -> Any:
    return _request(self, *args, headers={**headers, "X-Asked": repr(time.perf_counter())}, **options)


HttpSession.request = _stamped
