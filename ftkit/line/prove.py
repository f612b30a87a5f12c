"""The step `prove`: whether the file that ships is the model that was trained; and the judgement of its answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from ftkit.check import Check, failed, not_made, passed
from ftkit.data.mask import trained_turns
from ftkit.data.rows import Message, Row, any_has_tools, roles_text
from ftkit.data.template import render, renders, token_ids
from ftkit.data.turns import answer_reader
from ftkit.engines import llamacpp
from ftkit.engines.logits import Forced
from ftkit.errors import ProofError, ToolFailedError
from ftkit.line import behaviour
from ftkit.line.ask import ANSWERS, ASK, Answers, Asked, read_answers, read_questions
from ftkit.line.behaviour import MERGED, OUTSIDE, PAIRS, SHIPPED, TRAINED, measure_form
from ftkit.line.close import OF_FILE, Shipping, shipping
from ftkit.line.gguf import GGUF, Converted
from ftkit.line.job import Job, Onto, read_data, tokenizer_of
from ftkit.line.merge import MERGE, MODEL, Merged
from ftkit.line.reask import REASK, AskedMerged
from ftkit.line.step import Made, Step, find, write_json
from ftkit.line.strength import strength
from ftkit.model.source import open_gguf
from ftkit.plan.cost import of_proving
from ftkit.proof.behaviour import DISTANCE, GAIN, Behaviour, Kept, gain_kept, judge_distance, judge_gain, least_kept
from ftkit.proof.compare import same_ids
from ftkit.proof.gate import ANSWERS as ANSWERS_CHECK
from ftkit.proof.gate import judge_answers
from ftkit.proof.preference import NAME as PREFERENCES
from ftkit.proof.preference import judge_preference, margin_kept, preferred
from ftkit.proof.probes import CONTROL_WORDS, HARD_TEXTS, conversations, tool_conversations
from ftkit.proof.record import PROBES, GivenIds, Probes, Prompt, write_probes
from ftkit.proof.score import Score, same, score, words
from ftkit.proof.strength import BASE
from ftkit.proof.strength import NAME as STRENGTH
from ftkit.proof.verify import losses, this_engine
from ftkit.recipe import ASKED_MEANWHILE, Recipe

TOOL_PROMPTS = "prompts with tools"
ROWS_COMPARED = 1000  # training rows whose ids are compared, the first
PROOF, FAILED_PROOF = "proof.json", "failed-proof.json"
HINTS = {
    "token ids": "its pre-tokenizer is not what the file says: use the model's original safetensors as the base",
    "training ids": "train again with these library versions, or use the model's original safetensors as the base",
    "prompts": "its chat template renders differently in llama.cpp: report this with the model's name",
    TOOL_PROMPTS: "its chat template renders tools differently in llama.cpp: report this with the model's name",
    "stops": "an answer would not end: report this with the model's name",
    STRENGTH: "merge again into the base as it was: ftkit ship --from merge; and see that the base does not hold the adapter already",
    BASE: "see that `model` names what the adapter was trained on, and merge again: ftkit ship --from merge",
    "end of sequence": "an answer would end too early: report this with the model's name",
}
SCORE_NAMES: dict[Onto, str] = {"source": "merged", "dequantised": "merged onto the dequantised base"}


def proof_checks(
    tokenizer: Any,
    engine: llamacpp.Engine,
    rows: Sequence[Row],
    questions: Sequence[list[Message]],
    stops: Sequence[int],
    own: Sequence[Prompt],
) -> list[Check]:
    """Whether a loaded GGUF reads, is asked and ends as training did. `own`: `own_prompts`.

    BOS counts once: compared are the ids that the model reads, those that llama.cpp adds among them.
    """

    def training() -> Iterator[tuple[str, list[int], list[int]]]:
        for row in rows[:ROWS_COMPARED]:
            if row.is_text:
                text = row.messages[0]["content"]
                yield text, list(tokenizer(text)["input_ids"]), engine.tokenize(text, begins=True)
            for turn, seen, said in trained_turns(tokenizer, row):
                yield roles_text(turn.asked), seen, engine.prompt_ids(turn.asked)
                whole = turn.prompt + turn.said
                if token_ids(tokenizer, whole) == seen + said:  # else the two were not read at once, which a model never does
                    yield whole, seen + said, engine.tokenize(whole)

    def prompts() -> Iterator[tuple[str, list[int], list[int]]]:
        for messages in questions:
            text = render(tokenizer, messages, ask=True)
            yield text, token_ids(tokenizer, text), engine.prompt_ids(messages)
        for prompt in own:
            if prompt.messages is not None and not prompt.has_tools:
                yield prompt.text, prompt.ids, engine.prompt_ids(prompt.messages)

    with_tools = [prompt for prompt in own if prompt.has_tools]
    endless = [token for token in stops if not engine.stops_at(token)]
    names = tokenizer.convert_ids_to_tokens(list(stops))
    return [
        same_ids("token ids", ((p.text, p.ids, engine.tokenize(p.text)) for p in own if p.messages is None), "hard texts"),
        same_ids("training ids", training(), "prompts and answers of training rows"),
        same_ids("prompts", prompts(), "prompts"),
        *([_with_tools(with_tools, engine, rows)] if with_tools else []),
        *(
            not_made(f"prompts that hold {word}", "training reads it as text, llama.cpp as one control token, which is accepted")
            for word in _taken_for_control(tokenizer, engine)
        ),
        failed("stops", f"llama.cpp goes on after {', '.join(tokenizer.convert_ids_to_tokens(endless))}")
        if endless
        else passed("stops", f"answers end at {' '.join(names)}"),
    ]


def _with_tools(own: Sequence[Prompt], engine: llamacpp.Engine, rows: Sequence[Row]) -> Check:
    """Prompts with tools. Those of rows are compared with all others; where no row has any, nothing that was learnt hangs on these."""
    try:
        check = same_ids(TOOL_PROMPTS, ((p.text, p.ids, engine.prompt_ids(p.messages or [])) for p in own), "prompts with tools")
    except ToolFailedError as error:  # llama.cpp knows less of Jinja
        check = failed(TOOL_PROMPTS, error.message)
    if check.outcome == "failed" and not any_has_tools(rows):
        return not_made(TOOL_PROMPTS, f"llama.cpp writes tools otherwise, and no row is trained with any: {check.detail}")
    return check


def _taken_for_control(tokenizer: Any, engine: llamacpp.Engine) -> list[str]:
    """Words that llama.cpp reads as one token and training as text."""
    return [word for word in CONTROL_WORDS if token_ids(tokenizer, word) != engine.tokenize(word)]


def end_of_sequence(path: Path, tokenizer: Any, stops: Sequence[int]) -> Check:
    """Whether the token that ends a sequence, by the file's own words, is one that ends an answer: llama.cpp stops at it."""
    name, field = "end of sequence", open_gguf(path).get_field("tokenizer.ggml.eos_token_id")
    if field is None:
        return not_made(name, "the file names none")
    token = int(field.contents())
    words = tokenizer.convert_ids_to_tokens([token, *stops])
    if token not in stops:
        return failed(name, f"the file ends at {words[0]} ({token}), training at {' '.join(words[1:])}")
    return passed(name, words[0])


def own_prompts(tokenizer: Any, engine: llamacpp.Engine) -> list[Prompt]:
    """Texts and conversations of ftkit's own, as training reads them: what the file is held against once it is elsewhere."""
    prompts = [Prompt(None, text, token_ids(tokenizer, text)) for text in HARD_TEXTS]
    for messages in [*conversations(renders(tokenizer), _taken_for_control(tokenizer, engine)), *tool_conversations(tokenizer)]:
        text = render(tokenizer, messages, ask=True)
        prompts.append(Prompt(messages, text, token_ids(tokenizer, text)))
    return prompts


def _losses(job: Job, path: Path, rows: Sequence[Forced]) -> list[GivenIds]:
    """What the file thinks of given ids; none where that cannot be looked at."""
    try:
        return losses(path, rows)
    except ToolFailedError as error:
        job.reporter.warn(f"{path.name} cannot be held against its losses later: {error.message}")
        return []


@dataclass(frozen=True)
class Proven:
    """What was looked at of the file that ships; its answers are beside, and judged by `judge`."""

    checks: tuple[Check, ...]


def _make(job: Job, folder: Path, merged: Made[Merged], asked: Made[Asked], converted: Made[Converted], *later: Made[Any]) -> Proven:
    """Raises ProofError where a check fails."""
    path, ship = shipping(job, converted, *later).path, job.recipe.ship
    job.reporter.step(f"proving {path.name} against the trained model")
    questions, tokenizer = read_questions(asked).questions, tokenizer_of(job, merged.folder / MODEL)
    with llamacpp.load(path, ship.num_ctx) as engine:
        prompts = own_prompts(tokenizer, engine)
        rows = read_data(job).train
        checks = proof_checks(tokenizer, engine, rows, questions, merged.result.stops, prompts)
        checks.append(end_of_sequence(path, tokenizer, merged.result.stops))
        checks += strength(job, converted.folder / converted.result.files[0].path, path)
        for check in checks:
            if check.outcome == "failed":
                raise ProofError(f"{path.name} is not the model that was trained. {check.words}", HINTS[check.name])
        answers = engine.answer(
            questions, ship.max_new_tokens, answer_reader(tokenizer), label=f"asking {path.name}", reporter=job.reporter
        )
        texts = [engine.tokenize(text, begins=True) for text in HARD_TEXTS]
    measure_form(job, folder, SHIPPED, path, asked.folder)
    if not any_has_tools(rows):  # then another llama.cpp may write them otherwise
        prompts = [prompt for prompt in prompts if not prompt.has_tools]
    given = _losses(job, path, [Forced(ids, list(range(1, len(ids)))) for ids in texts])
    held_out = _losses(job, path, behaviour.read_rows(asked.folder)[: ship.record_rows])
    write_probes(folder / PROBES, Probes(this_engine(), prompts, list(merged.result.stops), given, held_out))
    write_json(folder / ANSWERS, asdict(Answers({"shipped": answers})))
    return Proven(tuple(checks))


PROVE = Step(
    name="prove",
    does="ids, prompts, stops and answers of what ships",
    command="ftkit ship",
    result=Proven,
    after=(MERGE, ASK, GGUF, *OF_FILE),
    follows_from=lambda job: [job.recipe.ship.quantization, *filter(None, [job.recipe.ship.record_rows])],
    costs=of_proving,
    make=_make,
)


def loses_gain(job: Job, asked: Made[Asked], told: Made[AskedMerged]) -> str | None:
    """What the merged model loses of the training beyond what the recipe allows, in words; None: no more than that, or not seen."""
    lost = _lost_points(job, asked, told)
    if lost is not None and lost > job.recipe.ship.max_loss_points:
        return f"{lost:.1f} points"
    keep, (forms, pairs) = (
        job.recipe.ship.keep,
        ({**behaviour.read(asked.folder / inside), **behaviour.read(told.folder / inside)} for inside in ("", PAIRS)),
    )
    check = judge_preference(pairs, MERGED, keep) if pairs else _judge_gain(job, forms, MERGED)
    return f"too much of the {'margin' if pairs else 'gain'} ({check.detail})" if check.outcome == "failed" else None


def _judge_gain(job: Job, forms: Mapping[str, Behaviour], shipped: str) -> Check:
    """By the loss of the held-out answers: which DPO does not lower, and may raise, while it prefers them to others."""
    if job.recipe.training.objective == "dpo" and not job.given:
        return not_made(GAIN, f"trained was to prefer answers to others, which is judged by `{PREFERENCES}`")
    return judge_gain(forms, shipped, job.recipe.ship.keep)


def _lost_points(job: Job, asked: Made[Asked], told: Made[AskedMerged]) -> float | None:
    """Points that the merged model answers less than the trained one; None where one of them could not be asked."""
    first, merged = read_questions(asked), read_answers(told).get("merged")
    trained = first.answers.get("trained")
    if trained is None or merged is None or not first.questions:
        return None
    before, after = (score(first.expected, given, job.recipe.evaluate).percent for given in (trained, merged))
    return before - after


@dataclass(frozen=True)
class Form:
    """A form of the model on the held-out answers, token by token, in nats."""

    loss: float
    kept: Kept | None  # of what training gained; None: of the base, of the trained model, or where nothing was gained
    divergence: float | None  # KL(trained ‖ this); None: of the trained model
    agreed_percent: float | None  # of the tokens, at which the likeliest is the trained model's
    outside: float | None  # perplexity of text that has nothing to do with the task
    margin: float | None = None  # of held-out preferences: by how much the chosen answer is likelier than the rejected one
    preferred_percent: float | None = None  # pairs in which it is the likelier one


@dataclass(frozen=True)
class Proof:
    """The checks of the shipped file, and the figures behind that of its answers."""

    checks: list[Check]
    right_by: str  # what of an answer is compared with the expected one
    scores: dict[str, Score]
    forms: dict[str, Form]
    same_answers: Score | None  # of the trained model and the shipped file; None where the trained model could not be asked
    examples: list[dict[str, str]]
    would_pass: dict[str, int] = field(default_factory=dict)  # limits at which what failed would pass, by key; below 0: at none


def judged(job: Job, asked: Made[Asked], proven: Made[Proven], shipped: Shipping) -> Proof:
    """Score the recorded answers by `evaluate` and hold them against the recipe's limits: nothing is loaded, asked again or written."""
    ship, rule, quantization = job.recipe.ship, job.recipe.evaluate, shipped.file.quantization
    first, after = read_questions(asked), read_answers(proven)["shipped"]
    given: dict[str, list[str]] = {name: first.answers[name] for name in ("before", "trained") if name in first.answers}
    looked_at = {inside: behaviour.read(asked.folder / inside) for inside in ("", OUTSIDE, PAIRS)}
    forms, outside, pairs = looked_at.values()
    for onto in get_args(Onto):  # each merge of this training that was asked
        if told := find(replace(job, onto=onto), REASK):
            if answers := read_answers(told).get("merged"):
                given[SCORE_NAMES[onto]] = answers
            for inside, found in looked_at.items():
                if form := behaviour.read(told.folder / inside).get(MERGED):
                    found[SCORE_NAMES[onto]] = form
    given[quantization] = after
    for inside, found in looked_at.items():
        if form := behaviour.read(proven.folder / inside).get(SHIPPED):
            found[quantization] = form
    scores = {name: score(first.expected, answers, rule) for name, answers in given.items()} if first.questions else {}
    alike = same(given["trained"], after, rule) if "trained" in given and scores else None
    answers_check = judge_answers(scores, quantization, alike or Score(0, len(after)), ship.max_loss_points)
    checks = [answers_check, _judge_gain(job, forms, quantization), judge_distance(forms, quantization, ship.keep)]
    if pairs:
        checks.append(judge_preference(pairs, quantization, ship.keep))
    elif job.recipe.training.objective == "dpo" and not job.given:
        checks.append(not_made(PREFERENCES, "no held-out row is a preference: name some in data.test, or ftkit ship --from ask"))
    if job.given and not job.data:
        checks = [not_made(check.name, "behaviour was not looked at, since no rows were given: --data FILE") for check in checks]
    elif not job.has_base:
        checks = [answers_check, *(not_made(check.name, _without_a_base(forms.get(quantization))) for check in checks[1:])]
    before = given.get("before", [""] * len(after))
    examples = [
        {"question": q[-1]["content"], "expected": e, "before": b, "after": a}
        for q, e, b, a in zip(first.questions, first.expected, before, after, strict=True)
    ]
    known = _forms(forms, outside, pairs)
    allowed = _would_pass(checks, quantization, scores, forms, pairs, by_loss=job.recipe.training.objective == "sft")
    return Proof([*proven.result.checks, *checks], words(rule), scores, known, alike, examples, allowed)


def _would_pass(
    checks: Sequence[Check],
    shipped: str,
    scores: Mapping[str, Score],
    forms: Mapping[str, Behaviour],
    pairs: Mapping[str, Behaviour],
    *,
    by_loss: bool,
) -> dict[str, int]:
    """The limits at which all that failed would pass."""
    failing, limits, kept = {check.name for check in checks if check.outcome == "failed"}, {}, []
    if ANSWERS_CHECK in failing:
        limits["ship.max_loss_points"] = math.ceil(scores["trained"].percent - scores[shipped].percent)
    if failing & {GAIN, DISTANCE}:
        kept.append(least_kept(forms, shipped, by_loss=by_loss))
    if PREFERENCES in failing:
        kept.append(margin_kept(pairs, shipped) or 0)
    if kept:
        limits["ship.keep"] = math.floor(min(kept))
    return limits


def how_to_pass(proof: Proof) -> str:
    """What to do about checks that failed: for a hint."""
    settings = " ".join(f"--set {key}={value}" for key, value in proof.would_pass.items() if min(proof.would_pass.values()) >= 0)
    finer = "a finer type loses less: --set ship.quantization=Q8_0"
    return f"{finer}; or allow it: {settings}" if settings else finer


def limits_of(recipe: Recipe) -> dict[str, Any]:
    """What recorded figures are judged by."""
    rule = recipe.evaluate.model_dump(exclude=ASKED_MEANWHILE, exclude_none=True)
    return {"evaluate": rule, **recipe.ship.model_dump(include={"max_loss_points", "keep"})}


def judge(job: Job, asked: Made[Asked], proven: Made[Proven], shipped: Shipping) -> Proof:
    """What `judged` says; written to proof.json, or where it fails to failed-proof.json, and then ProofError is raised."""
    run = job.run
    proof = judged(job, asked, proven, shipped)
    failing = next((check for check in proof.checks if check.outcome == "failed"), None)
    path = run.folder / FAILED_PROOF if failing else proven.folder / PROOF
    for old in (run.folder / FAILED_PROOF, proven.folder / PROOF):
        old.unlink(missing_ok=True)
    write_json(path, {"file": shipped.path.name, **limits_of(job.recipe), **asdict(proof)})
    run.record(proof={"step": proven.fingerprint, "checks": [asdict(check) for check in proof.checks]})
    if failing:
        raise ProofError(
            f"{shipped.path.name} answers worse than the trained model: {failing.detail}. All answers: {path}", how_to_pass(proof)
        )
    return proof


def _without_a_base(form: Behaviour | None) -> str:
    """How far the shipped file is from what was given, where nothing says how much that is."""
    known = form and form.divergence_a_token is not None
    figures = f"KL a token {form.divergence_a_token:.2g}, {form.agreed_percent:.1f} % the same token; " if form and known else ""
    return f"{figures}there is no base to measure that by: --base REF"


def _forms(forms: Mapping[str, Behaviour], outside: Mapping[str, Behaviour], pairs: Mapping[str, Behaviour]) -> dict[str, Form]:
    before, trained = forms.get("before"), forms.get(TRAINED)
    chose = {name: preferred(form) for name, form in pairs.items()}
    return {
        name: Form(
            form.loss_a_token,
            gain_kept(before, trained, form) if before and trained and form not in (before, trained) else None,
            form.divergence_a_token,
            form.agreed_percent,
            math.exp(min(700, outside[name].loss_a_token)) if name in outside else None,
            chose[name].margin if name in chose else None,
            100 * chose[name].right / len(chose[name].margins) if name in chose else None,
        )
        for name, form in forms.items()
    }
