"""Whether the Hugging Face hub is reached: asked once, so that nothing waits half a minute for a hub that is not there."""

from __future__ import annotations

import os
import ssl
import threading
import urllib.error
import urllib.request
from functools import cache
from http.client import HTTPException

_PROBE_SECONDS = 5.0


@cache
def hub_is_reached() -> bool:
    """Probe the hub once; out of reach, the hub libraries go offline at once instead of retrying for half a minute."""
    import huggingface_hub.constants

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on") or huggingface_hub.constants.HF_HUB_OFFLINE
    if not offline and _answers(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    import datasets

    datasets.config.HF_HUB_OFFLINE = True
    return False


def no_hub(key: str, name: str) -> str:
    """What to say when a hub id is neither local nor cached and the hub is not reached."""
    return (
        f"{key}: {name}: no such file or folder here, and the Hugging Face hub is not reached. "
        "Write the path of a local folder, or connect to the hub (HF_ENDPOINT, proxy)"
    )


def _answers(address: str) -> bool:
    """Whether anything answers an HTTP request there, through the environment's proxies, within 5 s, name look-up included."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PROBE_SECONDS).close()
            answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
        except (OSError, HTTPException, ValueError) as error:  # a refused certificate is for the hub library to report
            answers.append(isinstance(getattr(error, "reason", None), ssl.SSLError))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PROBE_SECONDS)
    return answers == [True]
