"""The way out: one proxy a session, on the host, which decides about every connection and keeps a record of it."""

from __future__ import annotations

from actbox.egress.dialling import Resolver
from actbox.egress.proxy import Proxy
from actbox.egress.verdicts import Reason, Record, Verdict

__all__ = ["Proxy", "Reason", "Record", "Resolver", "Verdict"]
