"""What a refused token request means here, and the one thing to do."""

from __future__ import annotations

from worker.meanings import MEANINGS

_NETWORK = "Check name resolution, firewall and proxy (HTTPS_PROXY) from this machine to {host}."


def explain(code: str, detail: str, host: str) -> tuple[str, str]:
    """What is wrong, and what to do; `code` as in `TokenRefused`, `host` is Entra's."""
    if code.startswith("AADSTS"):
        if known := MEANINGS.get(code):
            return known.text, known.advice
        number = code.removeprefix("AADSTS")
        return detail, f"Look the number up: https://login.microsoftonline.com/error?code={number}"
    if "CERTIFICATE_VERIFY_FAILED" in detail:
        return (
            f"The certificate of {host} is not trusted here.",
            "Set POSTROOM_CA_BUNDLE to the CA file of your proxy or inspection device.",
        )
    if code.startswith("HTTP"):
        return f"{host} answered {code.removeprefix('HTTP')}.", "Run the doctor again in a minute."
    if code == "ValueError":
        return detail, "Check POSTROOM_AUTHORITY, and that the certificate's file holds its key."
    return f"{host} cannot be reached: {detail or code}.", _NETWORK.format(host=host)
