"""Whether the model hub can be reached."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def hub_answers(name: str) -> bool:
    """Asks the hub for a model, without retries: in a closed network the libraries' own retries take a minute.

    A refusal (no such model, no permission) is an answer. `HF_HUB_OFFLINE` and `HF_ENDPOINT` are honoured.

    Args:
        name: a model's name on the hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(name, timeout=5)
    except HfHubHTTPError:
        return True
    except Exception as error:
        # No common base class: connection errors come from whichever HTTP library the installed version uses.
        logger.debug("hub: %s", error)
        return False
    return True
