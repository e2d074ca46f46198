"""What routes take from the request: the tenant and the services that the lifespan opened."""

from __future__ import annotations

from fastapi import Request

from app.bootstrap import Services
from app.registry.registry import DEFAULT_TENANT

__all__ = ["Services", "services_of", "tenant_of"]


def tenant_of(request: Request) -> str:
    """Whose data the request is about: `default` until there is authentication."""
    return DEFAULT_TENANT


def services_of(request: Request) -> Services:
    """The services of this process."""
    services: Services = request.app.state.services
    return services
