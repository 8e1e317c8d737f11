"""Where others reach this agent and its engines."""

from __future__ import annotations

from runtime.contract.config import Config


class Address:
    """The agent's own URL; "" until its server listens."""

    def __init__(self) -> None:
        self.url = ""

    def get(self) -> str:
        """The URL as it is now."""
        return self.url


def advertised_host(config: Config) -> str:
    """The host name or address that others reach this node by."""
    return config.agent.advertise_host or config.agent.host
