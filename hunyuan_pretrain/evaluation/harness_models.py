"""Models as lm-eval wants them: an export through transformers with its cache, and any scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from hunyuan_pretrain.evaluation import EvaluationError
from hunyuan_pretrain.evaluation.scoring import Item, Scorer, sequence_item

MAX_GEN_TOKS = 256
"""New tokens if a task does not say; lm-eval's own models use the same."""


def of_export(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's own HFLM on a loaded export. Every text begins with the beginning-of-document token, as in training;
    log-probabilities are computed in fp32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer,
        add_bos_token=True,
        batch_size=batch_size,
        softmax_dtype="float32",
        max_length=model.config.max_position_embeddings,
    )


class ScorerLM(TemplateLM):
    """A scorer as a model of lm-eval. It computes what HFLM does on the export of the same weights.

    Texts are generated greedily and without a cache: each new token is another pass over the whole text.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        """tokenizer: of transformers. stop_ids: end a generated text."""
        super().__init__()
        self._scorer, self.tokenizer, self._stop_ids = scorer, tokenizer, frozenset(stop_ids)
        self._device = scorer.device

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The beginning-of-document token."""
        return int(self.tokenizer.bos_token_id)

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self._scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of lm-eval's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with None, they begin with the beginning-of-document token once, even if the text does."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text of the tokenizer's template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether each token is the likeliest) of continuations. Those of the same input,
        such as the letters of a multiple choice, are read from one pass."""
        places: dict[tuple[int, ...], int] = {}
        items: list[Item] = []
        where: list[tuple[int, slice]] = []
        for _texts, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            one = sequence_item(tokens, len(tokens) - len(continuation))
            place = places.setdefault(tuple(one.tokens), len(items))
            if place == len(items):
                items.append(Item(one.tokens, [], []))
            begin = len(items[place].positions)
            items[place].positions.extend(one.positions)
            items[place].targets.extend(one.targets)
            where.append((place, slice(begin, begin + len(continuation))))
        reads = self._scorer.score(items)
        answers = []
        for place, part in where:
            targets = torch.tensor(items[place].targets[part])
            is_greedy = bool((reads[place].best_n[part] == targets).all())
            answers.append((float(reads[place].logprob_n[part].sum()), is_greedy))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the model's length."""
        windows = [
            [utils.make_disjoint_window(window) for window in self._windows(request.args[0])] for request in requests
        ]
        flat = [(None, *window) for of_one in windows for window in of_one]
        found = iter(self._loglikelihood_tokens(flat))
        return [sum(next(found)[0] for _ in of_one) for of_one in windows]

    def _windows(self, text: str) -> Any:
        return utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation of each text, up to a stop sequence."""
        texts = [_Growing(self, *request.args) for request in requests]
        while growing := [text for text in texts if not text.is_done]:
            items = [Item(text.tokens, [len(text.tokens) - 1], [0]) for text in growing]
            # ids beyond the tokenizer's are rows that only pad the embedding
            for text, read in zip(growing, self._scorer.score(items, len(self.tokenizer)), strict=True):
                text.add(int(read.best_n[0]), self._stop_ids)
        return [text.result() for text in texts]


class _Growing:
    """A text that is being generated."""

    def __init__(self, model: ScorerLM, context: str, arguments: dict[str, Any]) -> None:
        options = normalize_gen_kwargs(arguments, MAX_GEN_TOKS)
        if options.get("do_sample"):
            raise EvaluationError(
                "the task samples; a checkpoint only gives its likeliest text: export it, and evaluate the export"
            )
        self._tokenizer = model.tokenizer
        self._until = handle_stop_sequences(
            options["until"], eos=self._tokenizer.decode(model.eot_token_id, skip_special_tokens=False)
        )
        self._left = int(options["max_gen_toks"])
        room = model.max_length - self._left
        if room <= 0:
            raise EvaluationError(
                f"the task generates up to {self._left} tokens, and the model has {model.max_length} positions: "
                "a prompt would not fit"
            )
        self.tokens = model.tok_encode(context)[-room:]
        self._begin = len(self.tokens)
        self.is_done = False

    def add(self, token: int, stop_ids: frozenset[int]) -> None:
        """The next token."""
        self.tokens.append(token)
        self._left -= 1
        self.is_done = self._left == 0 or token in stop_ids or any(stop in self._text() for stop in self._until if stop)

    def _text(self) -> str:
        return str(self._tokenizer.decode(self.tokens[self._begin :], skip_special_tokens=True))

    def result(self) -> str:
        """The text before the first stop sequence."""
        return str(postprocess_generated_text(self._text(), self._until, None))
