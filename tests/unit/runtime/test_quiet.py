"""Messages of libraries that a user cannot act on are not printed; all others are."""

import logging
import warnings

import pytest

from hunyuan_pretrain.runtime.quiet import QUIET_LOGS, quieten


@pytest.mark.parametrize("name", QUIET_LOGS)
def test_a_silenced_log_message_is_not_printed_and_others_of_the_logger_are(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    quieten()
    quieten()
    logger = logging.getLogger(name)
    with caplog.at_level(logging.WARNING, name):
        logger.propagate, before = True, logger.propagate
        logger.warning("Beware: %s in a later release", QUIET_LOGS[name])
        logger.warning("the disk is full")
        logger.propagate = before
    assert [record.getMessage() for record in caplog.records] == ["the disk is full"]


def test_silenced_warnings_are_not_shown_and_others_are() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quieten()
        warnings.warn("MimoModelConfig is experimental and still under active development.", stacklevel=1)
        warnings.warn("The argument order of load has been changed. Please check the document.", stacklevel=1)
        warnings.warn("The next bucket's parameter all-gather operation has already been dispatched.", stacklevel=1)
        warnings.warn("The next bucket's gradient reduction has already been dispatched.", stacklevel=1)
        warnings.warn("loss is nan", stacklevel=1)
    assert [str(warning.message) for warning in shown] == [
        "The next bucket's gradient reduction has already been dispatched.",
        "loss is nan",
    ]
