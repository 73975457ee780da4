"""README.md of an export: what the model is, what it was trained on, how well it was doing, what loads it, its licence.

Everything in it is recorded somewhere: the architecture in the configuration, the data and its tokens in the history of
the run, losses in metrics.jsonl, agreement and loaders in the certificate. What is not recorded is said to be unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.folders import read_marker
from hunyuan_pretrain.checkpoint.history import history_of
from hunyuan_pretrain.config.history import Segment, schedule_of
from hunyuan_pretrain.config.schedule import Piece
from hunyuan_pretrain.config.schema import DataSource, ModelConfig, StageConfig
from hunyuan_pretrain.plan.counts import parameters

__all__ = ["CardFacts", "facts_of_run", "model_card"]

METRICS = "metrics.jsonl"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class StageFacts:
    """What was read in one stage, or in the part of it that one configuration was in force."""

    name: str
    sequence_length: int
    tokens: int
    """Trained in it, padding counted."""
    sources: tuple[tuple[str, float, int | None], ...]
    """Name, share of the tokens, and tokens in the packed dataset (None if they were not recorded)."""


@dataclass(frozen=True)
class CardFacts:
    """What README.md says of the training. The defaults say that it is unknown."""

    name: str = "Exported model"
    step: int | None = None
    stages: tuple[StageFacts, ...] = ()
    losses: tuple[tuple[str, int, float], ...] = ()
    """Kind, step and value of the newest losses up to the checkpoint, in nats per token unless the kind says so."""
    licence: str = UNKNOWN
    """An SPDX identifier in lower case, as Hugging Face lists them, or `unknown`."""


LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def facts_of_run(run_dir: Path, checkpoint: Path, licence: str | None = None) -> CardFacts:
    """What a run directory and one of its checkpoints record. Raises CheckpointError if the checkpoint has no history,
    or the licence is no identifier."""
    if licence is not None and not LICENCE.fullmatch(licence):
        raise CheckpointError(
            f"license {licence!r}: must be an identifier as Hugging Face lists them, in lower case, such as "
            "apache-2.0, mit or other"
        )
    marker = read_marker(checkpoint)
    step = int(marker["step"])
    history = history_of(checkpoint, marker, with_data=False)
    schedule = schedule_of(history)
    pieces = ((piece, min(piece.end_step, step) - piece.first_step) for piece in schedule.pieces)
    return CardFacts(
        name=history[-1].config.name,
        step=step,
        stages=tuple(_stage(piece, steps, history[piece.segment]) for piece, steps in pieces if steps > 0),
        losses=tuple(_losses(run_dir / METRICS, step)),
        licence=licence or UNKNOWN,
    )


def _stage(piece: Piece, steps: int, segment: Segment) -> StageFacts:
    stage = piece.stage
    sources = []
    for source in stage.data:
        found = next((facts for path, facts in segment.sources.items() if Path(path) == Path(source.path)), None)
        sources.append((Path(source.path).name, share_of(source, stage), found.tokens if found else None))
    return StageFacts(stage.name, stage.sequence_length, steps * stage.global_batch_tokens, tuple(sources))


def share_of(source: DataSource, stage: StageConfig) -> float:
    """The share of a stage's tokens that its configuration gives to a source."""
    if stage.tier_weights is None:
        return source.weight / sum(each.weight for each in stage.data)
    tier = sum(each.weight for each in stage.data if each.tier == source.tier)
    return stage.tier_weights[str(source.tier)] / sum(stage.tier_weights.values()) * source.weight / tier


LOSSES = {
    "loss": "training loss of the step",
    "validation_loss": "held-out loss",
    "validation_bits_per_byte": "held-out, bits per byte",
}
"""Fields of metrics.jsonl and what they are. Named held-out sets are added by name."""


def _losses(metrics: Path, step: int) -> Iterator[tuple[str, int, float]]:
    """The newest value of each loss up to a step. A damaged line, such as one that a crash cut, is left out."""
    newest: dict[str, tuple[int, float]] = {}
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
            if record["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):
            continue
        for field, value in record.items():
            is_named_set = field.startswith("validation/") and field.endswith("/loss")
            if (field in LOSSES or is_named_set) and isinstance(value, (int, float)):
                newest[field] = (record["step"], float(value))
    for field, (when, value) in newest.items():
        yield LOSSES.get(field, f"held-out loss, {field.split('/')[1]}" if "/" in field else field), when, value


def model_card(model: ModelConfig, config: Mapping[str, Any], certificate: Mapping[str, Any], facts: CardFacts) -> str:
    """README.md. config: config.json of the export."""
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: {facts.licence}\n"
        "tags:\n- hunyuan\n- mixture-of-experts\n---\n",
        f"# {facts.name}\n",
        f"A {'fine-tuned' if 'chat' in certificate else 'pretrained'} mixture-of-experts language model of the "
        "Hunyuan-Large architecture (arXiv 2411.02265), written by "
        f"hunyuan-pretrain {certificate['versions']['hunyuan-pretrain']}.\n",
        _architecture(model, config, certificate),
        _training(facts),
        *([_chat(certificate["chat"])] if "chat" in certificate else []),
        _figures(facts, certificate),
        _loading(certificate),
        _licence(facts.licence),
    ]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def _architecture(model: ModelConfig, config: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    counts = parameters(model)
    rows = [
        ("parameters", f"{counts.total:,}"),
        ("of them active for a token", f"{counts.active:,}"),
        ("layers, hidden size", f"{model.num_layers}, {model.hidden_size}"),
        (
            "heads: queries, keys and values, width",
            f"{model.num_attention_heads}, {model.num_query_groups}, {model.head_dim}",
        ),
        ("layers that share one set of keys and values (CLA)", model.cla_share_factor),
        ("experts: shared, routed, routed ones of a token", f"1, {model.num_moe_experts}, {model.moe_router_topk}"),
        ("width of the shared expert, of a routed one", f"{model.ffn_hidden_size}, {model.expert_ffn_size}"),
        ("QK norm after RoPE", "yes" if model.qk_layernorm else "no"),
        ("embedding and output layer", "one" if model.share_embeddings_and_output_weights else "two"),
        ("rows of the embedding", f"{model.padded_vocab_size:,}"),
        ("positions", f"{config['max_position_embeddings']:,}"),
        ("RoPE base, NTK alpha", f"{config['rope_theta']:g}, {certificate['rope_alpha']:g}"),
        ("weights", f"{certificate['dtype']}, the router in fp32{_average(certificate)}"),
    ]
    return "## Architecture\n\n" + _table(("", ""), rows)


def _average(certificate: Mapping[str, Any]) -> str:
    decay = certificate["source"].get("ema_decay")
    return "" if decay is None else f"; an exponential moving average of the trained ones, decay {decay:g}"


def _training(facts: CardFacts) -> str:
    if not facts.stages:
        return "## Training data\n\nNot recorded.\n"
    rows = []
    for stage in facts.stages:
        for name, share, tokens in stage.sources:
            size = UNKNOWN if tokens is None else f"{tokens:,}"
            rows.append((stage.name, f"{stage.tokens:,}", f"{stage.sequence_length:,}", name, f"{share:.1%}", size))
    total = sum(stage.tokens for stage in facts.stages)
    head = ("stage", "tokens trained", "sequence length", "source", "share", "tokens in the source")
    return f"## Training data\n\n{total:,} tokens in {facts.step:,} steps.\n\n" + _table(head, rows)


def _chat(chat: Mapping[str, Any]) -> str:
    prompt = chat["system_prompt"]
    said = "no system prompt" if not prompt else f"the system prompt {json.dumps(prompt, ensure_ascii=False)}"
    return (
        f"## Chat\n\nFine-tuned on conversations. Those without a system message had {said}; the chat template does "
        "the same. An answer ends with `<|eos|>`.\n"
    )


def _figures(facts: CardFacts, certificate: Mapping[str, Any]) -> str:
    losses = (
        _table(("figure", "after step", "value"), [(kind, step, f"{value:.4f}") for kind, step, value in facts.losses])
        + "\nLosses are in nats per token.\n"
        if facts.losses
        else "No loss is recorded. No benchmark was run.\n"
    )
    agreement = [
        (name.replace("_", " "), f"{certificate[name]:.2e}")
        for name in ("max_abs_difference", "mean_kl_nats", "median_relative_difference")
        if isinstance(certificate.get(name), float)
    ]
    return (
        f"## Figures\n\n{losses}\n## Agreement with the training model\n\n"
        "Before this folder got its name it was read back and compared with the model that was trained: tokens, logits "
        "and greedy text through the key/value cache. certificate.json has every check, the versions, and the SHA-256 "
        "of every file.\n\n" + _table(("logits", "difference"), agreement)
    )


def _loading(certificate: Mapping[str, Any]) -> str:
    needs_code = certificate["format"] == "hunyuan"
    verdicts = certificate["loads_in"]
    loading = [name for name, verdict in verdicts.items() if verdict["loads"]]
    others = [
        f"- {name}: " + "; ".join(reason.replace("\n  ", " ") for reason in verdict["reasons"])
        for name, verdict in verdicts.items()
        if not verdict["loads"]
    ]
    return f"""## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto"{", trust_remote_code=True" if needs_code else ""})
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=False)
```

transformers {verdicts["transformers"]["versions"]}{", with the model code in this folder" if needs_code else ""}. \
The tokenizer runs no code of this folder.

It loads in: {", ".join(loading)}.

It does not load, or would compute another model, in:

{chr(10).join(others) if others else "- none of the programs that were looked at"}
"""


def _licence(licence: str) -> str:
    if licence == UNKNOWN:
        return "## Licence\n\nUnknown: nobody stated one when this folder was written.\n"
    return f"## Licence\n\n{licence}\n"
