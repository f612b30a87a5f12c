"""Choose batch × accumulation, and look for the smallest changes where nothing fits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ftkit.beside import card_has_triton
from ftkit.data.lengths import PASS_TOKENS, RIDGE_TOKENS, batching, grouped_batch_tokens, padded_tokens
from ftkit.data.mask import KINDS
from ftkit.errors import ModelError, RecipeError, UntracedError
from ftkit.gguf.types import gguf_model
from ftkit.machine.cards import speed_of
from ftkit.machine.device import Device
from ftkit.machine.ranks import one_process_alone, why_not_shared, world_size
from ftkit.memory.kernels import CONTEXT_BYTES
from ftkit.memory.model import EXPERTS, Inventory, Skeleton
from ftkit.memory.polynomial import StepMemory
from ftkit.memory.replay import Peak, Timeline
from ftkit.memory.settings import StepSettings
from ftkit.memory.shared import shared_out
from ftkit.plan import measured
from ftkit.plan.by_measuring import Measure, choose_by_measuring, timeline_of
from ftkit.plan.cost import TRAINING_BYTES
from ftkit.plan.plan import METHODS, Candidate, MemoryPlan, Remedy, Together, Workload, without_margin
from ftkit.plan.speed import UNTOLD_TOKENS, Estimate, of_training
from ftkit.recipe import Dtype, Recipe

CHECKPOINTING_COST = 4 / 3  # one more forward pass beside one forward and a backward pass of twice its work
MOST_CARDS = 8  # of one machine, that are looked at for sharing the weights out
SHORTER_BY = 64  # tokens: the step in which a shorter length is looked for
Shape = tuple[int, int, bool]  # of a micro-batch: rows, tokens of each with padding, and whether it is rows end to end in one


def batch_sizes(effective: int) -> list[int]:
    """The divisors of the effective batch size, largest first: batch × accumulation is then always exactly it."""
    return [size for size in range(effective, 0, -1) if effective % size == 0]


class Planner:
    """Answers what one recipe's training step needs on one device, for rows of up to `length` tokens."""

    def __init__(
        self,
        config: Any,
        recipe: Recipe,
        device: Device,
        length: int,
        lengths: Sequence[int],
        *,
        dtype: Dtype,
        extra_bytes: int = 0,
        labelled_share: float = 1.0,
        shares: int = 1,
    ) -> None:
        """`shares`: processes that share the weights out; what is planned is what each holds."""
        self.labelled_share, self.shares = labelled_share, shares
        self.process_bytes = 0 if device.kind == "cuda" else TRAINING_BYTES
        self.extra_bytes = self.process_bytes + extra_bytes
        self.recipe, self.device, self.length, self.lengths = recipe, device, length, lengths
        self.sequences = KINDS[recipe.training.objective].sequences
        self.dtype = dtype
        attention = recipe.training.attention
        traced = "sdpa" if attention == "flash_attention_2" else attention  # which keeps as much: its output, and a number a row and head
        self.skeleton = Skeleton(config, self.dtype, traced, trust_remote_code=recipe.trust_remote_code)
        self.skeleton.narrow_tables = shares == 1
        self.skeleton.shorten()
        self._memories: dict[str, StepMemory] = {}  # by the settings in words: a list of target modules has no hash
        self._peaks: dict[tuple[object, ...], Peak] = {}
        self._shared_peaks: dict[tuple[str, int, int, int], Peak] = {}  # by shares
        self._counted: dict[str, Inventory] = {}
        self._passes: dict[tuple[int, int], list[int]] = {}  # by batch and cards
        self.rows_alone = False  # whether the memory of micro-batches other than of the longest rows is not known

    def on(self, device: Device) -> Planner:
        """The same for another card that steps are traced alike for (kernels.traced_alike): what was traced and replayed is shared."""
        planner = copy.copy(self)
        planner.device = replace(device, capability=self.device.capability)
        return planner

    def settings(self, recipe: Recipe, checkpointing: bool) -> StepSettings:
        """The step that `ftkit train` runs for this recipe; a dataset whose rows have one length is never padded."""
        return StepSettings(
            method=recipe.training.method,
            lora=recipe.lora,
            optim=recipe.training.optim,
            neftune_noise_alpha=recipe.training.neftune_noise_alpha,
            gradient_checkpointing=checkpointing,
            base_dtype=self.dtype,
            compute_dtype=self.dtype,
            autocast=self.dtype != "float32",
            objective=recipe.training.objective,
            padded=len({*self.lengths}) != 1 or self.sequences > 1,
            labelled_share=self.labelled_share,
            triton=card_has_triton(),
            device=self.device.kind,
            capability=self.device.capability,
        )

    def peak(self, recipe: Recipe, batch: int, checkpointing: bool, length: int | None = None) -> Peak:
        """The highest of all micro-batches'; where one does not fit, its own."""
        return self._highest(recipe, batch, checkpointing, length or self.length)[0]

    def _highest(self, recipe: Recipe, batch: int, checkpointing: bool, length: int) -> tuple[Peak, Shape]:
        looked_at = []
        for shape in self.shapes(recipe, batch, length):
            looked_at.append((self._peak(recipe, batch, checkpointing, shape), shape))
            if looked_at[-1][0].device_bytes > self.limit_bytes:
                break
        return max(looked_at, key=lambda found: found[0].device_bytes)

    def _peak(self, recipe: Recipe, batch: int, checkpointing: bool, shape: Shape) -> Peak:
        rows, length, packed = shape
        settings = replace(self.settings(recipe, checkpointing), packed=packed)
        accumulates = recipe.training.effective_batch_size > batch or world_size() > 1  # whose gradients are always there
        extra = self.extra_of(recipe)
        if self.shares > 1:
            peak = self._shared(settings, rows, length, self.count(recipe), self.shares)
            return replace(peak, device_bytes=peak.device_bytes + extra)
        peak = self._replayed(settings, rows, length, accumulates, None)
        room = self.limit_bytes - extra
        if peak.device_bytes > room >= sum(part.bytes for part in peak.parts) + CONTEXT_BYTES:  # the allocator may yet make it fit
            peak = self._replayed(settings, rows, length, accumulates, room)
        return replace(peak, device_bytes=peak.device_bytes + extra)

    def _shared(self, settings: StepSettings, batch: int, length: int, counted: Inventory, shares: int) -> Peak:
        """Of each of so many cards that share the weights out."""
        key = (repr(settings), batch, length, shares)
        if key not in self._shared_peaks:
            step = self.memory(settings).step(self.sequences * batch, length, accumulates=True)
            whole = self._replayed(settings, batch, length, True, None)
            self._shared_peaks[key] = shared_out(step, whole, self.skeleton, counted, settings, shares)
        return self._shared_peaks[key]

    def _replayed(self, settings: StepSettings, batch: int, length: int, accumulates: bool, room: int | None) -> Peak:
        key = (repr(settings), batch, length, accumulates, room)
        if key not in self._peaks:
            self._peaks[key] = self.memory(settings).step(self.sequences * batch, length, accumulates=accumulates).peak(room)
        return self._peaks[key]

    def max_tokens(self, recipe: Recipe, batch: int, length: int | None = None) -> int | None:
        """Tokens that a micro-batch may hold, padding included, as `batch` of the longest rows do; None: it is `batch` rows always."""
        fixed = recipe.training.per_device_train_batch_size or not self.lengths
        return None if self.rows_alone or self.sequences > 1 or (fixed and not recipe.training.packing) else batch * (length or self.length)

    def shapes(self, recipe: Recipe, batch: int, length: int) -> list[Shape]:
        """Those of the micro-batches that bound the memory of all others, the likely highest first.

        With as many tokens in all, what a step holds is convex in the length – a + b rows + c length + d length² – and a row alone
        has no mask: the highest is the longest, the shortest, or the longest two. More learnt tokens than in the longest rows go
        together in none.
        """
        tokens = self.max_tokens(recipe, batch, length)
        found = [(batch, length, False)]
        if tokens is None:
            return found
        if recipe.training.packing:
            found.insert(0, (1, tokens, True))
        most = min(recipe.training.effective_batch_size, tokens // min(self.lengths, default=length))
        more = {rows for rows in ((2 if batch == 1 else batch), most) if batch < rows <= most}
        return found + [(rows, tokens // rows, False) for rows in sorted(more)]

    def extra_of(self, recipe: Recipe) -> int:
        """What is added to a step's peak: a probe's difference only where that very step is planned, not for another method."""
        same = measured.subject(recipe, "") == measured.subject(self.recipe, "")
        return self.extra_bytes if same else self.process_bytes

    def memory(self, settings: StepSettings) -> StepMemory:
        key = repr(settings)
        if key not in self._memories:
            self._memories[key] = StepMemory(self.skeleton, settings)
        return self._memories[key]

    @property
    def limit_bytes(self) -> int:
        """What the step may take on the device, the margin left out."""
        return without_margin(self.device.free_bytes)

    def candidate(self, recipe: Recipe, batch: int, checkpointing: bool, measured: Peak | None = None) -> Candidate:
        return Candidate(
            inventory=self.count(recipe),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=-(-recipe.training.effective_batch_size // batch),
            gradient_checkpointing=checkpointing,
            peak=measured or self.peak(recipe, batch, checkpointing),
            budget_bytes=self.device.free_bytes,
            max_tokens=self.max_tokens(recipe, batch),
            packing=recipe.training.packing and not self.rows_alone,
        )

    def count(self, recipe: Recipe) -> Inventory:
        settings = self.settings(recipe, False)
        if (key := repr(settings)) not in self._counted:
            self._counted[key] = self.skeleton.count(
                settings.method, settings.lora, settings.optim, settings.base_dtype, settings.trained_dtype, settings.double_quant
            )
        return self._counted[key]

    def timeline(self, recipe: Recipe, fit: Candidate) -> Timeline:
        """Of the micro-batch with the highest peak."""
        on, batch = fit.gradient_checkpointing, fit.per_device_train_batch_size
        rows, length, packed = self._highest(recipe, batch, on, self.length)[1]
        memory = self.memory(replace(self.settings(recipe, on), packed=packed))
        return memory.step(self.sequences * rows, length, accumulates=recipe.training.effective_batch_size > batch).timeline()

    def choices(self, recipe: Recipe) -> list[tuple[int, bool]]:
        """(batch, checkpointing) that the recipe allows, the fastest first; among equals the one without checkpointing."""
        training = recipe.training
        sizes = (
            [training.per_device_train_batch_size] if training.per_device_train_batch_size else batch_sizes(training.effective_batch_size)
        )
        checkpointings = [False, True] if training.gradient_checkpointing is None else [training.gradient_checkpointing]
        return sorted(
            ((size, on) for size in sizes for on in checkpointings), key=lambda choice: (self.work(*choice), choice[1], choice[0])
        )

    def work(self, batch: int, checkpointing: bool) -> float:
        """Relative time of an epoch, of rows whose lengths are not known that of a row: tokens computed, padding included, at least
        RIDGE_TOKENS a pass. On a CPU what a pass costs beside them counts too; on a GPU that is not measured."""
        beside = PASS_TOKENS if self.device.kind == "cpu" else 0
        rows = len(self.lengths) if self.lengths else batch
        tokens = sum(max(tokens, RIDGE_TOKENS) + beside for tokens in self._micro_batches(batch)) / rows
        return tokens * (CHECKPOINTING_COST if checkpointing else 1.0)

    def _micro_batches(self, batch: int, cards: int = 1) -> list[int]:
        """Tokens of each micro-batch of an epoch, padding included; without a dataset, of one with full rows.

        On several cards those of the one that has most to do; without a dataset, of one step.
        """
        if (batch, cards) not in self._passes:
            training, most = self.recipe.training, self.max_tokens(self.recipe, batch)
            if self.lengths:
                passes = grouped_batch_tokens(self.lengths, batch, training.effective_batch_size, training.seed, most, cards)
            else:
                rows = batch if cards == 1 else -(-training.effective_batch_size // cards)
                passes = padded_tokens([self.length] * rows, batch)
            self._passes[batch, cards] = [self.sequences * tokens for tokens in passes]
        return self._passes[batch, cards]

    def together(self, recipe: Recipe, fit: Candidate, cards: int) -> Iterator[Together]:
        """This choice on several cards of the kind: each holding all weights, whose gradients have their place all the time, and,
        where that is possible, sharing them out, on as many as that takes."""
        batch, checkpointing = fit.per_device_train_batch_size, fit.gradient_checkpointing
        effective = recipe.training.effective_batch_size
        cards = min(cards, effective)  # each wants a row
        rows = -(-effective // cards)
        shapes = self.shapes(recipe, batch, self.length)
        settings = self.settings(recipe, checkpointing)

        def held(shares: int) -> int:
            found = (
                self._replayed(replace(settings, packed=packed), most, length, True, None)
                if shares == 1
                else self._shared(replace(settings, packed=packed), most, length, fit.inventory, shares)
                for most, length, packed in shapes
            )
            return max(each.device_bytes for each in found) + self.extra_of(recipe)

        time = self.estimate(recipe, fit, cards)
        whole, seconds = held(1), (time.seconds_low, time.seconds_high) if time else (None, None)
        exchanged = 2 * fit.inventory.gradient_bytes * (cards - 1) // cards  # in a ring: summed on the way there, told on the way back
        yield Together(cards, False, rows, whole, whole <= self.limit_bytes, exchanged, *seconds)
        if not why_not_shared(recipe) and self.dtype != "float16":
            looked_at = {count: held(count) for count in range(cards, max(cards, min(MOST_CARDS, effective)) + 1)}
            enough = next((count for count, size in looked_at.items() if size <= self.limit_bytes), cards)
            size = looked_at[enough]
            yield Together(enough, True, -(-effective // enough), size, size <= self.limit_bytes, None)

    def estimate(self, recipe: Recipe, fit: Candidate, cards: int = 1) -> Estimate | None:
        """How long the training takes by this choice; None where the device's speed is not known. The step is traced.

        On several cards, without what they send to each other.
        """
        speed = speed_of(self.device.name) if self.device.kind == "cuda" else None
        if not speed:
            return None
        batch = self.sequences * fit.per_device_train_batch_size
        counted = self.memory(self.settings(recipe, fit.gradient_checkpointing)).work(batch, self.length)
        micro_batches = self._micro_batches(fit.per_device_train_batch_size, cards)
        if self.lengths:
            todo = work(recipe, self.lengths)
            tokens, repeats, steps = todo.tokens, todo.epochs, float(todo.steps)
        else:
            steps = UNTOLD_TOKENS / (self.sequences * recipe.training.effective_batch_size * self.length)
            tokens, repeats = UNTOLD_TOKENS, steps * (1 if cards > 1 else fit.gradient_accumulation_steps)
        return of_training(speed, counted, batch * self.length, micro_batches, repeats, steps, fit.inventory, tokens)

    def choose(self, recipe: Recipe) -> tuple[Candidate, list[tuple[int, bool, int, bool]]]:
        """The fastest choice that fits, and all that were looked at; where none fits, the smallest."""
        seen = []
        smallest: Candidate | None = None
        too_large: dict[bool, int] = {}  # by checkpointing, the smallest batch that does not fit; larger ones need no look
        for batch, checkpointing in self.choices(recipe):
            if batch > too_large.get(checkpointing, batch):
                continue
            fit = self.candidate(recipe, batch, checkpointing)
            seen.append((batch, checkpointing, fit.peak.device_bytes, fit.fits))
            if fit.fits:
                return fit, seen
            too_large[checkpointing] = min(batch, too_large.get(checkpointing, batch))
            if smallest is None or fit.peak.device_bytes < smallest.peak.device_bytes:
                smallest = fit
        assert smallest
        return smallest, seen

    def changes(self, fit: Candidate) -> tuple[Remedy, ...]:
        """What would make it fit, the smallest change first, each computed; shorter rows, which lose text, come last."""
        singles = list(self._single_changes(fit))
        found = [self._change(settings, words) for settings, words in singles]
        if not any(change.fits for change in found if not _shortens(change)):
            together: dict[str, str] = {}  # the last of two changes of one key goes furthest
            for settings, _ in singles:
                together |= {key: value for key, _, value in (entry.partition("=") for entry in settings) if key != "training.max_length"}
            if len(together) > 1:
                all_of_them = tuple(f"{key}={value}" for key, value in together.items())
                change = self._change(all_of_them, "all of these together")
                if not change.fits:
                    change = self._shorter(all_of_them, "all of these together, with shorter rows") or change
                found.append(change)
        smaller = (change for change in found if change.peak_bytes < fit.peak.device_bytes)
        return tuple(sorted(smaller, key=lambda change: (not change.fits, _shortens(change))))

    def _single_changes(self, fit: Candidate) -> Iterator[tuple[tuple[str, ...], str]]:
        training, method = self.recipe.training, self.recipe.training.method
        if not fit.gradient_checkpointing:
            yield ("training.gradient_checkpointing=true",), "gradient checkpointing: a third more work, nothing lost"
        if fit.per_device_train_batch_size > 1:
            yield ("training.per_device_train_batch_size=1",), "one row at a time; the effective batch stays"
        if training.optim == "adamw_torch" and self.shares == 1:  # FSDP takes no other
            yield ("training.optim=adamw_8bit",), "8-bit optimizer states"
        if method == "full" and training.optim != "adafactor" and self.shares == 1:
            yield ("training.optim=adafactor",), "Adafactor: a mean a row and a column, in place of states as large as the weights"
        if method == "full":
            yield ("training.method=lora",), "LoRA: adapters on frozen 16-bit weights"
        if method != "qlora":
            yield ("training.method=qlora",), "QLoRA: adapters on 4-bit weights"
        if method != "full" and self.recipe.lora.r > 8:
            yield ("lora.r=8",), "a smaller rank"
        shorter = self._shorter((), "shorter rows")
        if shorter:
            yield shorter.settings, shorter.words

    def _shorter(self, settings: tuple[str, ...], words: str) -> Remedy | None:
        """With these settings, the longest rows that fit, in steps of SHORTER_BY tokens."""
        recipe = apply(self.recipe, settings)
        low, high = 0, (self.length - 1) // SHORTER_BY
        while low < high:  # low fits (0: nothing is known to), high + 1 does not
            middle = (low + high + 1) // 2
            if self._least(recipe, middle * SHORTER_BY).device_bytes <= self.limit_bytes:
                low = middle
            else:
                high = middle - 1
        if not low:
            return None
        peak = self._least(recipe, low * SHORTER_BY)
        return Remedy((*settings, f"training.max_length={low * SHORTER_BY}"), words, peak.device_bytes, True)

    def _change(self, settings: tuple[str, ...], words: str) -> Remedy:
        last = settings[-1] if settings else ""
        length = int(last.partition("=")[2]) if last.startswith("training.max_length") else self.length
        peak = self._least(apply(self.recipe, settings), length)
        return Remedy(settings, words, peak.device_bytes, peak.device_bytes <= self.limit_bytes)

    def _least(self, recipe: Recipe, length: int) -> Peak:
        """The peak of the smallest choice that the recipe allows."""
        batch, checkpointing = min(self.choices(recipe), key=lambda choice: (choice[0], not choice[1]))
        return self.peak(recipe, batch, checkpointing, length)


def _shortens(change: Remedy) -> bool:
    return any(setting.startswith("training.max_length=") for setting in change.settings)


def apply(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with `group.key=value` settings applied."""
    import yaml

    changed = recipe.model_dump()
    for entry in settings:
        key, _, value = entry.partition("=")
        group, _, name = key.partition(".")
        changed[group][name] = yaml.safe_load(value)
    return Recipe.model_validate(changed)


def make_plan(
    config: Any,
    recipe: Recipe,
    device: Device,
    length: int,
    lengths: Sequence[int] = (),
    *,
    dtype: Dtype,
    extra_bytes: int = 0,
    labelled_share: float = 1.0,
    measure: Measure | None = None,
    shares: int = 1,
    cards: int = 2,
) -> MemoryPlan:
    """Plan a run for rows of up to `length` tokens; `lengths` are those of the training rows, where there is a dataset.

    `labelled_share` is the largest share of a batch's tokens that is learnt, `extra_bytes` what an earlier probe of this
    model by this method on this device found beyond the trace.
    `shares` as in `Planner`; it is told what `cards` of the kind would do together.
    Counts are of the model on the meta device, peaks of traced steps; of a step that cannot be traced they are measured, by
    `measure`, and nothing is said of other methods and lengths. Raises UntracedError where there is none, ModelError and
    RecipeError where the adapter's targets are wrong.
    """
    planner = Planner(
        config, recipe, device, length, lengths, dtype=dtype, extra_bytes=extra_bytes, labelled_share=labelled_share, shares=shares
    )
    training = recipe.training
    together: tuple[Together, ...] = ()
    alone = why_alone(recipe, planner) if device.kind == "cuda" else None
    try:
        chosen, seen = planner.choose(recipe)
        timeline = planner.timeline(recipe, chosen)
        estimate = planner.estimate(recipe, chosen) if chosen.fits and shares == 1 else None
        unknown = None if estimate else not_known(device, shares) if chosen.fits else "it does not fit"
        if device.kind == "cuda" and not alone and training.objective == "sft":  # of preferences it is not modelled, and nothing is said
            together = tuple(planner.together(recipe, chosen, cards))
    except UntracedError:
        if not measure:
            raise
        planner.rows_alone, planner._passes = True, {}
        chosen, seen = choose_by_measuring(planner, measure)
        timeline, estimate, unknown = timeline_of(chosen), None, "its step cannot be traced"
    batch, checkpointing = chosen.per_device_train_batch_size, chosen.gradient_checkpointing
    methods, untraced = [], {}
    for method in METHODS:
        try:
            other = method != recipe.training.method
            methods.append(planner.candidate(apply(recipe, (f"training.method={method}",)), batch, checkpointing) if other else chosen)
        except (ModelError, RecipeError) as error:  # as of a module that is trained whole, and that QLoRA keeps in 4 bits
            untraced[method] = error.message
    settings = planner.settings(recipe, checkpointing)
    return MemoryPlan(
        device=device,
        max_length=length,
        labelled_share=labelled_share,
        compute_dtype=settings.compute_dtype,
        attention=planner.skeleton.model.config._attn_implementation,
        chosen=chosen,
        methods=tuple(methods),
        untraced=untraced,
        batches=tuple(seen),
        changes=() if chosen.fits else planner.changes(chosen),
        batching=batching(lengths, batch, training.effective_batch_size, training.max_length, training.seed, chosen.max_tokens)
        if lengths
        else None,
        work=work(recipe, lengths) if lengths else None,
        extra_bytes=planner.extra_bytes,
        timeline=timeline,
        gguf=gguf_model({tensor.name: tensor.shape for tensor in planner.skeleton.tensors}, config),
        estimate=estimate,
        not_estimated_because=unknown,
        together=together,
        alone_because=alone,
        shares=shares,
    )


def why_alone(recipe: Recipe, planner: Planner) -> str | None:
    """Why a second card would bring nothing."""
    if recipe.training.effective_batch_size == 1:
        return "a step has one row, which one card computes (training.effective_batch_size)"
    if name := one_process_alone(recipe):
        return f"{name} is learnt in one process"
    return "a mixture of experts is trained in one process" if any(t.role == EXPERTS for t in planner.skeleton.tensors) else None


def not_known(device: Device, shares: int = 1) -> str:
    """Why no time can be told before a training has run here."""
    if shares > 1:
        return "how fast cards send weights to each other is not estimated"
    if device.kind == "cpu":
        return "a processor's speed is not estimated"
    return f"the speed of {device.name} is not known"


def work(recipe: Recipe, lengths: Sequence[int]) -> Workload:
    """Steps, epochs and tokens of the training that the recipe asks for."""
    training = recipe.training
    an_epoch = math.ceil(len(lengths) / training.effective_batch_size)
    steps = training.max_steps or math.ceil(an_epoch * training.num_train_epochs)
    tokens = KINDS[training.objective].sequences * sum(lengths)
    return Workload(steps, round(steps / an_epoch, 3), round(tokens * steps / an_epoch))
