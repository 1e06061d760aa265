"""What the routers of a table's rows chose: how many experts a token had, and how evenly their weight was spread."""

from __future__ import annotations

import pandas as pd

from mode.compiled import Compiled

ROUTING_NOTE = (
    "Routers on the scored text, means over layers and seeds: experts that a token's router gave any weight, and the "
    "entropy of its weights over that of equal ones."
)


def routing_frame(compiled: Compiled) -> pd.DataFrame | None:
    """Return experts in use and evenness by domain, of every row whose records say so; None without any."""
    rows = []
    for line in compiled.lines:
        if line.routing:
            told = {
                f"{domain.capitalize()}: {what}": value
                for domain, (active, even) in line.routing.items()
                for what, value in (("in use", f"{active:.2f}"), ("evenness", f"{even:.2f}"))
            }
            rows.append({"Routers": line.label, "Of": str(len(line.branches)), **told})
    return pd.DataFrame(rows) if rows else None
