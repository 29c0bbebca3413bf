"""The only access to Prefect's API: a client whose failures are Sora's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sora.core.errors import ServiceError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


@contextmanager
def prefect_client() -> Iterator[SyncPrefectClient]:
    """A client of the server that PREFECT_API_URL names.

    Raises:
        ServiceError: the server does not answer, or refuses.
    """
    import httpx
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        try:
            yield client
        except httpx.HTTPError as error:
            raise ServiceError(
                f"the Prefect server at {client.api_url.copy_with(userinfo=b'')} did not do what it was asked to: "
                f"{type(error).__name__}: {error}",
                fix="check that it is up (`sora doctor`), and that PREFECT_API_AUTH_STRING is set if it asks for one",
            ) from error
