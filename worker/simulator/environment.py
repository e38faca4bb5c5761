"""The settings a Postroom needs to talk to a simulator."""

from __future__ import annotations

from pathlib import Path

from worker.simulator.settings import Settings


def environment(url: str, directory: Path, settings: Settings) -> dict[str, str]:
    """Environment variables, by name."""
    return {
        "POSTROOM_TENANT_ID": settings.tenant_id,
        "POSTROOM_CLIENT_ID": settings.client_id,
        "POSTROOM_CLIENT_SECRET": settings.client_secret,
        "POSTROOM_AUTHORITY": url,
        "POSTROOM_GRAPH_URL": url,
        "POSTROOM_CA_BUNDLE": str(directory.absolute() / "ca.pem"),
    }
