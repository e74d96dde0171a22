"""A model for EleutherAI's lm-evaluation-harness, which brings hundreds of tasks.

Needs the package `lm_eval` (the extra "harness") and, for a task, its files: the harness downloads
them where there is a network, or finds them where its YAML file names local ones. Contexts are not
cut off: they are read in chunks, however long. Every text begins a document. Answers are greedy.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swr_jax.data import Tokenizer
from swr_jax.eval.errors import TaskError
from swr_jax.eval.streaming import Streamer
from swr_jax.eval.suite import Case

try:
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        "the tasks of lm-evaluation-harness need the package 'lm_eval': "
        "pip install 'swr_jax[harness]'"
    ) from error

# Tokens of an answer where the task does not say; bytes need more than subwords.
_ANSWER_TOKENS = 256
# The harness's standard errors become intervals by the normal distribution.
_Z = 1.959963984540054


class HarnessModel(LM):
    """Answers the harness's three kinds of requests.

    Args:
        streamer: the model.
        tokenizer: its own.
    """

    def __init__(self, streamer: Streamer, tokenizer: Tokenizer):
        super().__init__()
        self._streamer = streamer
        self._tokenizer = tokenizer

    def _encode(self, text: str) -> list[int]:
        return [self._tokenizer.bos_id, *self._tokenizer.encode(text).tolist()]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it."""
        rows, starts = [], []
        for context, continuation in (request.args for request in requests):
            # Spaces at the end belong to the word that follows, for most tokenizers.
            stripped = context.rstrip()
            rows.append(self._encode(context + continuation))
            starts.append(len(self._encode(stripped)))
        answers = []
        for row, start, scores in zip(rows, starts, self._streamer.score(rows), strict=True):
            # Scores begin with the second token of a row.
            log_probs, predicted = scores.log_probs[start - 1 :], scores.predicted[start - 1 :]
            answers.append((float(log_probs.sum()), predicted.tolist() == row[start:]))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each text, each a document of its own."""
        rows = [self._encode(request.args[0]) for request in requests]
        told = [row for row in rows if len(row) > 1]
        found = iter(self._streamer.score(told))
        return [float(next(found).log_probs.sum()) if len(row) > 1 else 0.0 for row in rows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy continuation of each context up to the first of its stop strings.

        Raises:
            TaskError: a task asks for samples at a temperature.
        """
        answers = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise TaskError(
                    f"the task's generation_kwargs={options} ask for samples; answers here are "
                    "greedy: set do_sample: false"
                )
            until = options.get("until") or []
            until = (until,) if isinstance(until, str) else tuple(until)
            budget = options.get("max_gen_toks", _ANSWER_TOKENS)
            groups.setdefault((budget, until), []).append(number)
        for (budget, until), members in groups.items():
            prompts = [self._encode(requests[number].args[0]) for number in members]
            found = self._streamer.generate(
                prompts,
                max_tokens=budget,
                is_over=lambda ids, until=until: self._is_over(ids, until),
            )
            for number, ids in zip(members, found, strict=True):
                answers[number] = self._cut(ids, until)
        return answers

    def _text(self, ids: Sequence[int]) -> str:
        end = self._tokenizer.eos_id
        ids = list(ids)
        return self._tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

    def _is_over(self, ids: Sequence[int], until: Sequence[str]) -> bool:
        text = self._text(ids)
        return self._tokenizer.eos_id in ids or any(stop in text for stop in until)

    def _cut(self, ids: Sequence[int], until: Sequence[str]) -> str:
        text = self._text(ids)
        return text[: min((text.find(stop) for stop in until if stop in text), default=None)]


def cases(
    model: HarnessModel,
    names: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    allow_code: bool = False,
) -> Iterator[Case]:
    """Yield a case for each task or group of tasks of the harness.

    Args:
        model: to test.
        names: of tasks.
        include_path: folder of tasks besides those that come with the harness.
        limit: the first so many examples of each task; None: all.
        allow_code: whether programs that the model writes may be run, as HumanEval and MBPP do.
    """
    manager = TaskManager(include_path=include_path)
    for name in names:

        def run(_: Any, name=name) -> dict:
            found = simple_evaluate(
                model=model,
                tasks=[name],
                task_manager=manager,
                limit=limit,
                confirm_run_unsafe_code=allow_code,
                log_samples=False,
            )
            return {"metrics": _metrics(found["results"])}

        # How much there is to read is not known before the harness has opened the task.
        yield Case(f"harness/{name}", {"limit": limit}, 1, run)


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict]:
    """Values with 95 % intervals, by "metric" and, where it is not "none", "metric,filter"."""
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not filtered:
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, (int, float)) and math.isfinite(error)
            label = metric if filtered == "none" else key
            if len(results) > 1:
                label = f"{task}: {label}"
            found[label] = {
                "value": value,
                "interval": [value - _Z * error, value + _Z * error] if known else None,
            }
    return found
