"""How many tokens of each source a run has read, in closed form from its history: no data is opened."""

from __future__ import annotations

from collections.abc import Sequence

from hunyuan_pretrain.config.history import Segment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.mixture import Mixture, SourceSize
from hunyuan_pretrain.data.sample_order import data_segments


def tokens_by_source(segments: Sequence[Segment], num_steps: int) -> dict[str, dict[str, float]]:
    """Stage -> source -> its tokens in the first `num_steps` steps, without padding; {} if the history does not say
    what the sources hold. Raises DataFormatError or ConfigError if it contradicts itself."""
    if not segments or not all(segment.sources for segment in segments):
        return {}
    mixture = mixture_of(segments)
    found: dict[str, dict[str, float]] = {}
    for piece in mixture.schedule.pieces:
        steps = min(num_steps, piece.end_step) - piece.first_step
        if steps <= 0:
            continue
        begin, end = piece.first_position, piece.next_position(steps)
        ranges = [(end, 1), (begin, -1)]
        for first, last in piece.skipped:
            if min(last, end) > max(first, begin):
                ranges += [(min(last, end), -1), (max(first, begin), 1)]
        of_stage = found.setdefault(piece.stage.name, {})
        for position, sign in ranges:
            for number, count in mixture.counts_before(piece.lane, position).items():
                size, name = mixture.sizes[number], mixture.sources[number]
                of_stage[name] = of_stage.get(name, 0.0) + sign * count * size.tokens / size.sequences
    return {stage: {name: tokens for name, tokens in of.items() if tokens > 0} for stage, of in found.items()}


def mixture_of(segments: Sequence[Segment]) -> Mixture:
    """The order of a run's data, which knows how many sequences a source has but not which. Raises DataFormatError."""
    experiments = [_without_limits(segment.config) for segment in segments]
    ran = [
        (one.first_step, experiment, one.sources, one.left_out)
        for one, experiment in zip(segments, experiments, strict=True)
    ]
    of_data = data_segments(ran)
    sizes = {
        names.name(path): SourceSize(facts.sequences, facts.tokens)
        for names, segment in zip(of_data, segments, strict=True)
        for path, facts in segment.sources.items()
    }
    return Mixture(experiments[-1].stages, sizes, experiments[-1].seed, of_data)


def _without_limits(experiment: Experiment) -> Experiment:
    """max_epochs refuses a run, which this one passed, and changes nothing of its order."""
    stages = [
        stage.model_copy(update={"data": tuple(one.model_copy(update={"max_epochs": None}) for one in stage.data)})
        for stage in experiment.stages
    ]
    return experiment.model_copy(update={"stages": tuple(stages)})
