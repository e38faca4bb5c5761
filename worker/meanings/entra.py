"""Entra's refusals in plain words, each with the one thing to do.

The numbers are for people only; what the workers do hangs on Entra's `error`.
https://learn.microsoft.com/entra/identity-platform/reference-error-codes
"""

from __future__ import annotations

from collections.abc import Mapping

from worker.meanings.values import Meaning

_RENEW = "Make a new client secret (docs/entra-setup.md, step 4) and set POSTROOM_CLIENT_SECRET."
_LATER = Meaning("Entra is busy.", "Nothing to mend: run the doctor again in a minute.")

ENTRA: Mapping[str, Meaning] = {
    "AADSTS7000215": Meaning(
        "The client secret is wrong; often the secret's id was copied instead of its value.",
        "Set POSTROOM_CLIENT_SECRET to the secret's Value, or make a new one "
        "(docs/entra-setup.md, step 4).",
    ),
    "AADSTS7000222": Meaning("The client secret has expired.", _RENEW),
    "AADSTS7000218": Meaning("No client secret or certificate was sent.", _RENEW),
    "AADSTS700027": Meaning(
        "Entra does not know the certificate, or it has ended.",
        "Upload it (docs/entra-setup.md, step 4), and keep its key in the file named here.",
    ),
    "AADSTS700024": Meaning(
        "The signed assertion is not valid at this time: this machine's clock is wrong.",
        "Set the clock of this machine (NTP).",
    ),
    "AADSTS700016": Meaning(
        "The tenant does not know the application.",
        "Set POSTROOM_CLIENT_ID and POSTROOM_TENANT_ID to the ids on the application's Overview.",
    ),
    "AADSTS7000229": Meaning(
        "The application has no service principal in this tenant.",
        "Grant admin consent once (docs/entra-setup.md, step 3).",
    ),
    "AADSTS7000112": Meaning(
        "The application is disabled.",
        "In Entra: Enterprise applications, its Properties, Enabled for users to sign in: Yes.",
    ),
    "AADSTS90002": Meaning(
        "There is no such tenant.",
        "Set POSTROOM_TENANT_ID to the Directory (tenant) ID, and POSTROOM_AUTHORITY to its cloud.",
    ),
    "AADSTS900023": Meaning(
        "The tenant id is malformed.",
        "Set POSTROOM_TENANT_ID to the Directory (tenant) ID, a UUID, or to a verified domain.",
    ),
    "AADSTS500011": Meaning(
        "Entra of this cloud does not know this Graph.",
        "Make POSTROOM_GRAPH_URL and POSTROOM_AUTHORITY name the same cloud.",
    ),
    "AADSTS53003": Meaning(
        "Conditional Access blocks the application.",
        "Exclude its service principal in the policy, or add this machine to its named locations.",
    ),
    "AADSTS70021": Meaning(
        "No federated credential of the application fits the assertion.",
        "Give it the issuer, subject and audience of the assertion (docs/entra-setup.md, step 4).",
    ),
    **dict.fromkeys((f"AADSTS{n}" for n in (90006, 90012, 90024, 90033, 90090)), _LATER),
    "AADSTS50196": Meaning(
        "Entra takes us for a loop: too many token requests.",
        "Find what else asks for tokens with this client id; then wait a few minutes.",
    ),
    "AADSTS90055": Meaning(
        "The tenant makes too many token requests.",
        "Nothing to mend here: wait a few minutes.",
    ),
}
