"""Whether the Hugging Face hub answers: asked once, so that a machine that can't reach it doesn't wait for retries."""

import os
from functools import cache

import datasets.config
from huggingface_hub import constants
from huggingface_hub.utils import get_session


@cache
def offline_reason() -> str | None:
    """Why nothing can be had from the hub, None where it answers. Copies in the cache are used then without asking, as
    with HF_HUB_OFFLINE=1."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the HTTP library's own, which changes with huggingface_hub's version
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are started here
        return f"{constants.ENDPOINT} can't be reached: {' '.join(str(error).split()) or type(error).__name__}"
    return None
