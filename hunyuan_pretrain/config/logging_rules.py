"""Rules of what a run logs and reports."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.schema import Experiment


def webhook_is_named_by_a_variable(experiment: Experiment) -> Iterator[Problem]:
    """The value is not shown: it may be the address itself, with a secret."""
    name = experiment.logging.webhook_url_env
    if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        rule = "is not the name of an environment variable; the address itself belongs in no configuration"
        hint = "put the address in a variable, and its name here, such as ALARM_WEBHOOK"
        yield Problem("logging.webhook_url_env", Problem.NO_VALUE, rule, hint)


def alarm_limits_can_be_exceeded(experiment: Experiment) -> Iterator[Problem]:
    alarms, experts = experiment.logging.alarms, experiment.model.num_moe_experts
    top = experts / experiment.model.moe_router_topk
    limit = alarms.expert_load_above
    if limit is not None and (limit < 1 or limit >= top):
        rule = "some expert always has an even share" if limit < 1 else f"no load is above {experts} experts / top-k"
        yield Problem("logging.alarms.expert_load_above", limit, rule, f"from 1 to below {top:g}, or null")
    if (share := alarms.data_wait_share_above) is not None and share >= 1:
        rule = "a share of the time of a step"
        yield Problem("logging.alarms.data_wait_share_above", share, rule, "below 1, such as 0.1, or null")
    if (factor := alarms.slow_rank_above) is not None and factor <= 1:
        rule = "times the median of all ranks, which half of them exceed"
        yield Problem("logging.alarms.slow_rank_above", factor, rule, "above 1, such as 2, or null")


LOGGING_RULES = (webhook_is_named_by_a_variable, alarm_limits_can_be_exceeded)
