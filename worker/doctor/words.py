"""Entra's refusals in plain words, each with the one thing to do.

The numbers are for people only; what the workers do hangs on Entra's `error`.
https://learn.microsoft.com/entra/identity-platform/reference-error-codes
"""

from __future__ import annotations

from collections.abc import Mapping

_RENEW = "make a new client secret (docs/entra-setup.md, step 4) and set POSTROOM_CLIENT_SECRET"
_LATER = ("Entra is busy", "nothing to mend: run the doctor again in a minute")

#: AADSTS number → what is wrong, what to do.
ENTRA: Mapping[int, tuple[str, str]] = {
    7000215: (
        "the client secret is wrong; often the secret's id was copied instead of its value",
        "set POSTROOM_CLIENT_SECRET to the column Value of the secret, which is shown only once; "
        "else make a new one (docs/entra-setup.md, step 4)",
    ),
    7000222: ("the client secret has expired", _RENEW),
    7000218: ("no credential was sent", _RENEW),
    700027: (
        "Entra does not know the certificate, or it has ended",
        "upload the public certificate to the application (docs/entra-setup.md, step 4) and set "
        "POSTROOM_CLIENT_CERTIFICATE_FILE to the key that belongs to it",
    ),
    700024: (
        "the signed assertion is not valid at this time: this machine's clock is wrong",
        "set the clock of this machine (NTP)",
    ),
    700016: (
        "the tenant does not know the application",
        "set POSTROOM_CLIENT_ID to the Application (client) ID on the application's Overview, and "
        "POSTROOM_TENANT_ID to the tenant in which it was registered",
    ),
    7000229: (
        "the application has no service principal in this tenant",
        "grant admin consent once (docs/entra-setup.md, step 3)",
    ),
    7000112: (
        "the application is disabled",
        "in Entra: Enterprise applications → the application → Properties → Enabled for users to "
        "sign in → Yes",
    ),
    90002: (
        "there is no such tenant",
        "set POSTROOM_TENANT_ID to the Directory (tenant) ID on the application's Overview, and "
        "POSTROOM_AUTHORITY to the cloud it lives in",
    ),
    900023: (
        "the tenant id is malformed",
        "set POSTROOM_TENANT_ID to the Directory (tenant) ID, a UUID, or to a verified domain",
    ),
    500011: (
        "Entra of this cloud does not know this Graph",
        "make POSTROOM_GRAPH_URL and POSTROOM_AUTHORITY name the same cloud "
        "(docs/entra-setup.md, national clouds)",
    ),
    53003: (
        "Conditional Access blocks the application",
        "exclude its service principal in the policy for workload identities, or add this "
        "machine's address to the policy's named locations",
    ),
    70021: (
        "no federated credential of the application fits the assertion",
        "make its issuer, subject and audience equal to those of the assertion "
        "(docs/entra-setup.md, step 4)",
    ),
    **dict.fromkeys((90006, 90012, 90024, 90033, 90090), _LATER),
    50196: (
        "Entra takes us for a loop: too many token requests",
        "find what else asks for tokens with this client id; then wait a few minutes",
    ),
    90055: (
        "the tenant makes too many token requests",
        "nothing to mend here: wait a few minutes",
    ),
}

_NETWORK = "check name resolution, firewall and proxy (HTTPS_PROXY) from this machine to {host}"


def explain(code: str, detail: str, host: str) -> tuple[str, str]:
    """What a refused token request means, and what to do; `code` as in `TokenRefused`."""
    number = code.removeprefix("AADSTS")
    if number.isdecimal() and int(number) in ENTRA:
        return ENTRA[int(number)]
    if "CERTIFICATE_VERIFY_FAILED" in detail:
        return (
            f"the certificate of {host} is not trusted here",
            "set POSTROOM_CA_BUNDLE to the CA file of your proxy or inspection device",
        )
    if code.startswith("AADSTS"):
        return detail, f"look the number up: https://login.microsoftonline.com/error?code={number}"
    if code.startswith("HTTP"):
        return f"{host} answered {code.removeprefix('HTTP')}", "run the doctor again in a minute"
    if code == "ValueError":
        return (
            detail,
            "check POSTROOM_AUTHORITY, and that the certificate's PEM holds key and chain",
        )
    return f"{host} cannot be reached: {detail or code}", _NETWORK.format(host=host)
