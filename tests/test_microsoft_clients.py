"""Clients by other hands, unmodified, against the simulator: proof that it speaks Graph."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from worker.simulator import Simulator

# Warnings about the clients' own insides are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MAILBOX = "notices@contoso.com"
PROPERTY = "String {5f1d9c0e-54a7-4d8e-9d0c-2b6a1f0c7e11} Name PostroomId"


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """One simulator for all: each test looks for its own subject."""
    with Simulator(tmp_path_factory.mktemp("simulator")) as running:
        yield running


def rows(simulator: Simulator, subject: str) -> list[dict[str, Any]]:
    """What the ledger holds under this subject."""
    return [row for row in simulator.ledger() if row["subject"] == subject]


def sdk_message(subject: str) -> Any:
    """A mail in the types of msgraph-sdk, with marker and header."""
    from msgraph.generated.models.body_type import BodyType
    from msgraph.generated.models.email_address import EmailAddress
    from msgraph.generated.models.internet_message_header import InternetMessageHeader
    from msgraph.generated.models.item_body import ItemBody
    from msgraph.generated.models.message import Message
    from msgraph.generated.models.recipient import Recipient
    from msgraph.generated.models.single_value_legacy_extended_property import (
        SingleValueLegacyExtendedProperty,
    )

    return Message(
        subject=subject,
        body=ItemBody(content_type=BodyType.Html, content="<p>Hello</p>"),
        to_recipients=[Recipient(email_address=EmailAddress(address="ann@example.org"))],
        internet_message_headers=[InternetMessageHeader(name="x-postroom-id", value="sdk-1")],
        single_value_extended_properties=[
            SingleValueLegacyExtendedProperty(id=PROPERTY, value="sdk-1")
        ],
    )


def sdk_client(simulator: Simulator, http: httpx.AsyncClient) -> Any:
    """msgraph-sdk with its default middleware and azure-identity, led to the simulator."""
    from azure.identity import ClientSecretCredential
    from kiota_authentication_azure.azure_identity_authentication_provider import (
        AzureIdentityAuthenticationProvider,
    )
    from msgraph.graph_request_adapter import GraphRequestAdapter
    from msgraph.graph_service_client import GraphServiceClient
    from msgraph_core import GraphClientFactory  # type: ignore[import-untyped]  # no py.typed

    credential = ClientSecretCredential(
        simulator.tenant_id,
        simulator.client_id,
        simulator.client_secret,
        authority=simulator.url,
        disable_instance_discovery=True,
        connection_verify=simulator.ca_bundle,
    )
    provider = AzureIdentityAuthenticationProvider(
        credential,
        scopes=["https://graph.microsoft.com/.default"],
        allowed_hosts=[str(http.base_url.host)],
    )
    client = GraphClientFactory.create_with_default_middleware(client=http)
    return GraphServiceClient(request_adapter=GraphRequestAdapter(provider, client))


async def send_and_look(simulator: Simulator, subject: str) -> list[Any]:
    """Send with the SDK, then look for the marker with it."""
    from kiota_abstractions.base_request_configuration import RequestConfiguration
    from msgraph.generated.users.item.messages.messages_request_builder import (
        MessagesRequestBuilder,
    )
    from msgraph.generated.users.item.send_mail.send_mail_post_request_body import (
        SendMailPostRequestBody,
    )

    trust = ssl.create_default_context(cafile=simulator.ca_bundle)
    # kiota wraps the client's transport and does not close it: the outer `async with` does.
    async with (
        httpx.AsyncHTTPTransport(verify=trust) as transport,
        httpx.AsyncClient(transport=transport, base_url=f"{simulator.url}/v1.0") as http,
    ):
        user = sdk_client(simulator, http).users.by_user_id(MAILBOX)
        await user.send_mail.post(
            SendMailPostRequestBody(message=sdk_message(subject), save_to_sent_items=True)
        )
        wanted = MessagesRequestBuilder.MessagesRequestBuilderGetQueryParameters(
            filter=f"singleValueExtendedProperties/Any(ep: ep/id eq '{PROPERTY}' "
            "and ep/value eq 'sdk-1')",
            select=["id", "isDraft", "subject", "internetMessageId"],
        )
        found = await user.messages.get(RequestConfiguration(query_parameters=wanted))
        return list(found.value)


def test_microsofts_sdk_sends_and_finds_its_mail_by_the_marker(simulator: Simulator) -> None:
    """Tokens by azure-identity, errors and paging by kiota: all of it must fit."""
    found = asyncio.run(send_and_look(simulator, "By the SDK"))

    (row,) = rows(simulator, "By the SDK")
    assert (row["marker"], row["mailbox"]) == ("sdk-1", MAILBOX)
    assert row["recipients"] == ["ann@example.org"]
    assert row["headers"] == {"x-postroom-id": "sdk-1"}
    assert [(mail.subject, mail.is_draft) for mail in found] == [("By the SDK", False)]
    assert found[0].internet_message_id == row["internet_message_id"]


def o365_account(simulator: Simulator) -> Any:
    """python-o365 led to the simulator by its own means.

    Its MSAL client is set from outside because O365 cannot switch off the instance discovery at
    login.microsoftonline.com.
    """
    from msal import ConfidentialClientApplication
    from O365 import Account, MSGraphProtocol
    from O365.utils.token import MemoryTokenBackend

    class Protocol(MSGraphProtocol):  # type: ignore[misc]  # O365 is untyped here
        _protocol_url = f"{simulator.url}/"

    backend = MemoryTokenBackend()
    account = Account(
        (simulator.client_id, simulator.client_secret),
        auth_flow_type="credentials",
        tenant_id=simulator.tenant_id,
        main_resource=MAILBOX,
        protocol=Protocol(timezone="UTC"),
        token_backend=backend,
        raise_http_errors=True,
    )
    account.con._msal_client = ConfidentialClientApplication(
        simulator.client_id,
        client_credential=simulator.client_secret,
        authority=f"{simulator.url}/{simulator.tenant_id}",
        instance_discovery=False,
        token_cache=backend,
    )
    return account


def test_python_o365_sends_and_finds_its_mail(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A client by other people than Microsoft, which builds its JSON in its own way."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", simulator.ca_bundle)
    monkeypatch.chdir(tmp_path)
    account = o365_account(simulator)
    assert account.authenticate()
    mail = account.mailbox().new_message()
    mail.to.add(["ann@example.org", "bob@example.org"])
    mail.subject = "By O365"
    mail.body = "<p>Hello</p>"

    assert mail.send(save_to_sent_folder=True)

    (row,) = rows(simulator, "By O365")
    number = row["internet_message_id"]
    (found,) = (
        account.mailbox().sent_folder().get_messages(query=f"internetMessageId eq '{number}'")
    )
    assert row["recipients"] == ["ann@example.org", "bob@example.org"]
    assert (found.subject, found.internet_message_id) == ("By O365", number)
    account.con.session.close()
