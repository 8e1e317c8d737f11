"""Opens the registry that the configuration names."""

from __future__ import annotations

from runtime.contract.config import Config
from runtime.registry.consul import ConsulRegistry
from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import Registry


def open_registry(config: Config) -> Registry:
    """Consul where `registry.consul_url` is set, else the embedded file.

    Nothing is contacted yet. Raises RegistryError for an invalid URL.
    """
    if config.registry.consul_url:
        return ConsulRegistry(config.registry.consul_url, config.registry.consul_token)
    return EmbeddedRegistry(config.registry_file())
