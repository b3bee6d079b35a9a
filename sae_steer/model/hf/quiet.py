"""`transformers` without its progress bars and remarks, and the errors by which it refuses a folder."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError

REFUSALS = (
    OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ImportError, StrictDataclassError
)  # fmt: skip


@contextmanager
def quietly() -> Iterator[None]:
    """Errors alone are printed while it lasts."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
