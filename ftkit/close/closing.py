"""Train the numbers that a quantised file stores without loss, and the scales of its blocks, so that it answers as the trained model does.

Merging into the source and quantising both move the weights; norms and biases, which a GGUF keeps in float32, can take much of it
back. Each step goes towards the trained model's distribution at the tokens of answers and prompts; so that nothing is unlearnt elsewhere,
also towards the base's, without what it was taught, on text that has nothing to do with the task.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ftkit.close.scales import Scales
from ftkit.close.student import Lossless, learning, running
from ftkit.engines.logits import Forced
from ftkit.plan.cost import CLOSING_ROWS_A_STEP, LIKELIEST

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

ROWS_A_STEP = CLOSING_ROWS_A_STEP
RATE = 7e-3  # of the mean size of a vector's numbers, by AdamW a step
STRETCH_RATE = 1e-3  # of the logarithms by which scales are multiplied
WARM_UP = 5
PROMPT_WEIGHT = 0.2
OUTSIDE_ROWS_A_STEP = 2
CHECKED_EVERY = 10  # steps


@dataclass(frozen=True)
class Distribution:
    """What is likely at each of some places: (places, LIKELIEST) ids and log probabilities, and those of the rest (places,)."""

    ids: torch.Tensor
    likeliest: torch.Tensor
    rest: torch.Tensor

    def __getitem__(self, places: slice) -> Distribution:
        return Distribution(self.ids[places], self.likeliest[places], self.rest[places])


def distribution(logits: np.ndarray[Any, Any]) -> Distribution:
    """Of logits (places, vocabulary)."""
    import torch

    given = torch.tensor(logits)  # a copy: kept logits come from a file that is not written to
    likeliest, ids = given.topk(min(LIKELIEST, given.shape[1]), sorted=False)
    likeliest = (likeliest - given.logsumexp(-1, keepdim=True)).double()
    rest = (1 - likeliest.exp().sum(-1)).clamp_min(1e-12).log()
    return Distribution(ids.int(), likeliest.float(), rest.float())


def divergence(logits: torch.Tensor, towards: Distribution) -> torch.Tensor:
    """KL(towards ‖ logits) at each place, the tokens beyond the likeliest taken together: never more than the whole."""
    import torch

    known = logits.float().log_softmax(-1).gather(-1, towards.ids.to(logits.device).long())
    rest = torch.log1p(-known.exp().sum(-1).clamp_max(1 - 1e-6))
    likeliest, other = towards.likeliest.to(logits.device), towards.rest.to(logits.device)
    return (likeliest.exp() * (likeliest - known)).sum(-1) + other.exp() * (other - rest)


@dataclass(frozen=True)
class Lesson:
    """A row: what its answer's places should say, and, of training rows, what its prompt's places should."""

    answer: Forced
    answered: Distribution
    prompt: Forced | None = None
    prompted: Distribution | None = None


@dataclass(frozen=True)
class Trained:
    """A parameter, and by how much AdamW moves each of its numbers a step, at most."""

    parameter: torch.nn.Parameter
    rate: float


def to_train(vectors: Sequence[Lossless], stretched: Sequence[Scales]) -> list[Trained]:
    """What is trained of a file, at its rates."""
    return [
        *(Trained(vector.parameter, RATE * vector.scale) for vector in vectors),
        *(Trained(one.stretch, STRETCH_RATE) for one in stretched),
    ]


def mean_divergence(logits: Iterable[np.ndarray[Any, Any]], lessons: Sequence[Lesson]) -> float:
    """A token of the answers, of a form of the model that is given them."""
    import torch

    sums = [float(divergence(torch.from_numpy(found), lesson.answered).sum()) for found, lesson in zip(logits, lessons, strict=True)]
    return sum(sums) / sum(len(lesson.answer.places) for lesson in lessons)


@dataclass(frozen=True)
class Progress:
    """A closing at one of its checks: it goes on from here as if it had never ended."""

    step: int
    best: float  # what `measured` said of the best
    best_step: int
    worse: int  # checks since then
    values: list[torch.Tensor]  # of what is trained
    best_values: list[torch.Tensor]
    optimizer: dict[int, dict[str, torch.Tensor]]  # AdamW's state of each that had a gradient


def close(
    student: PreTrainedModel,
    trained: Sequence[Trained],
    lessons: Sequence[Lesson],
    outside: Sequence[Lesson],
    steps: int,
    measured: Callable[[], float],
    first: float,
    *,
    outside_weight: float,
    seed: int = 0,
    told: Callable[[int, float], None] = lambda *_: None,
    begun: Progress | None = None,
    keep: Callable[[Progress], None] = lambda _: None,
    recompute: bool = False,
) -> tuple[int, float]:
    """Train some parameters of a model; (steps of the best, what `measured` said of it), whose values they then have.

    `lessons`: of answers; `outside`: of text that has nothing to do with the task, or none, and its weight beside theirs.

    `measured`: how far the student is from where it should be, on rows that are not learnt; asked every few steps. `first`: what it
    said before. Closing ends early where two checks after one another are no better than the best.

    `keep` is given each check, `begun` is the last that was kept. `recompute`: of each layer only what goes into it is kept for the
    gradients, as with packed weights anyway.
    """
    import torch

    parameters = [one.parameter.requires_grad_() for one in trained]
    optimizer = torch.optim.AdamW([{"params": [parameter]} for parameter in parameters], weight_decay=0.0)
    now = begun or Progress(0, first, 0, 0, _copies(parameters), _copies(parameters), {})
    _set(parameters, now.values)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": now.optimizer})
    order = random.Random(seed)
    answers, others = _shuffled(lessons, order), _shuffled(outside, order)
    for step in range(1, steps + 1):
        learnt, beside = list(islice(answers, ROWS_A_STEP)), list(islice(others, OUTSIDE_ROWS_A_STEP))
        if step <= now.step:
            continue  # the rows of steps that were done
        if now.worse == 2:
            break
        with learning(student, recompute=recompute):
            for lesson in learnt:
                _loss(student, lesson).div(ROWS_A_STEP).backward()  # type: ignore[no-untyped-call]
            for lesson in beside:
                _loss(student, lesson).mul(outside_weight / OUTSIDE_ROWS_A_STEP).backward()  # type: ignore[no-untyped-call]
        for group, one in zip(optimizer.param_groups, trained, strict=True):
            group["lr"] = one.rate * _share(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % CHECKED_EVERY == 0 or step == steps:
            found, values = measured(), _copies(parameters)
            better = found < now.best
            now = Progress(
                step,
                found if better else now.best,
                step if better else now.best_step,
                0 if better else now.worse + 1,
                values,
                values if better else now.best_values,
                optimizer.state_dict()["state"],
            )
            keep(now)
            told(step, found)
    _set(parameters, now.best_values)
    return now.best_step, now.best


def _share(step: int, steps: int) -> float:
    """Of the rate: it rises for some steps, and falls to nothing along a cosine."""
    return min(1.0, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 1) / steps)))


def _copies(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _set(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    import torch

    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _shuffled(lessons: Sequence[Lesson], order: random.Random) -> Iterator[Lesson]:
    """All of them again and again, each time in another order."""
    while lessons:
        yield from order.sample(list(lessons), len(lessons))


def logits_at(student: PreTrainedModel, ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
    """Of a row, (places, vocabulary): what the student says that stands there."""
    import torch

    with running(student):
        asked = torch.tensor([list(ids)], device=student.device)
        logits: torch.Tensor = student(
            input_ids=asked, logits_to_keep=torch.tensor(places, device=student.device) - 1, use_cache=False
        ).logits[0]
    return logits


def _loss(student: PreTrainedModel, lesson: Lesson) -> torch.Tensor:
    places = [*lesson.answer.places, *(lesson.prompt.places if lesson.prompt else ())]
    logits = logits_at(student, lesson.answer.ids, places)
    answers = len(lesson.answer.places)
    loss = divergence(logits[:answers], lesson.answered).mean()
    if lesson.prompted is not None and len(places) > answers:
        loss = loss + PROMPT_WEIGHT * divergence(logits[answers:], lesson.prompted).mean()
    return loss
