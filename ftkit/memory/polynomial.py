"""From a few traces to every batch and length: unroll the layers, fit the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ftkit.errors import UntracedError
from ftkit.memory.events import WORK
from ftkit.memory.kernels import MASK_ALIGNMENT
from ftkit.memory.model import Adapters, Skeleton
from ftkit.memory.optimizer import optimizer_events
from ftkit.memory.replay import Order, Part, TrainingStep
from ftkit.memory.settings import HEAD_TILE_TOKENS, StepSettings, labelled_tokens
from ftkit.memory.sizes import DTYPE_BYTES
from ftkit.memory.trace import StepTracer
from ftkit.memory.unroll import Ints, Layout, NotRepeating, unroll
from ftkit.memory.work import COUNTED, HALF, SINGLE, Work

Bools = NDArray[np.bool_]


class Sizes:
    """Each event's bytes as a polynomial of batch B and length S, from traces at a few points.

    The monomials are 1, B, S, BS, S² and BS² – a training step's tensors have no others – or, at one length, 1 and B.
    """

    def __init__(
        self, points: Sequence[tuple[int, int]], sizes: Sequence[Sequence[int]], tiled: Sequence[bool], labelled_share: float
    ) -> None:
        self._share = labelled_share
        self._batches = len({batch for batch, _ in points})
        self._lengths = len({length for _, length in points})
        matrix = np.array([self._monomials(batch, length) for batch, length in points], dtype=np.float64)
        self._coefficients = np.linalg.solve(matrix, np.array(sizes, dtype=np.float64))
        self._tiled = np.array(tiled)

    def _monomials(self, batch: int, length: int) -> list[int]:
        return [b * s for s in [1, length, length**2][: self._lengths] for b in [1, batch][: self._batches]]

    def at(self, batch: int, length: int) -> Ints:
        """Bytes of every event."""
        found: Ints = np.rint(np.array(self._monomials(batch, length)) @ self._coefficients).astype(np.int64)
        tokens = labelled_tokens(batch, length, self._share)
        if tokens > HEAD_TILE_TOKENS:
            found[self._tiled] = found[self._tiled] * HEAD_TILE_TOKENS // tokens
        return found


@dataclass(frozen=True)
class Fitted:
    """What a few traces tell about all batches and lengths that are like them, or, with `length`, of that length alone."""

    layout: Layout
    sizes: Sizes
    counts: Bools  # of the sizes, those that are counts of what was computed, and no bytes
    length: int | None
    orders: dict[bool, Order] = field(default_factory=dict)  # those asked for, by whether micro-batches are accumulated


class StepMemory:
    """One kind of training step at any batch and length; traces only what it is asked for.

    A first length is traced at its batches alone; from the second length on, sizes are fitted over both. Where lengths differ in their
    operations, each is traced.
    """

    def __init__(self, skeleton: Skeleton, settings: StepSettings) -> None:
        self.skeleton = skeleton
        self.settings = settings
        adapters = Adapters() if settings.method == "full" else skeleton.adapters(settings.lora)
        trained = skeleton.trained(settings.method, adapters)
        self._optimizer = optimizer_events(trained, settings)
        width = DTYPE_BYTES[settings.trained_dtype]
        self._fixed = (
            *(
                Part(*entry)
                for entry in skeleton.storages(settings.method, settings.base_dtype, settings.trained_dtype, settings.double_quant)
            ),
            *(Part("adapter", width * tensor.elements) for tensor in adapters.trained),
        )
        self._tracer = StepTracer(skeleton, settings)
        self._optimizer_bytes = np.array([size for _, _, size in self._optimizer.events], dtype=np.int64)
        self._fits: dict[tuple[int | bool, ...], list[Fitted]] = {}  # of a regime one, or one a length where these differ in operations

    def step(self, batch: int, length: int, *, accumulates: bool = False) -> TrainingStep:
        """The step for `batch` rows of `length` tokens. Raises ModelError where it cannot be traced."""
        fitted = self._fitted(batch, length)
        return TrainingStep(
            fixed=self._fixed,
            order=self._order(fitted, accumulates),
            sizes=np.concatenate([self._optimizer_bytes, np.where(fitted.counts, 0, fitted.sizes.at(batch, length))]),
            on_cuda=self.settings.device == "cuda",
            capability=self.settings.capability,
        )

    def work(self, batch: int, length: int) -> Work:
        """What a micro-batch of `batch` rows of `length` tokens computes. Raises ModelError where it cannot be traced."""
        fitted = self._fitted(batch, length)
        layout, counts = fitted.layout, dict.fromkeys(COUNTED, 0)
        sizes = fitted.sizes.at(batch, length)[layout.source]
        for index in np.flatnonzero(layout.kinds == WORK).tolist():
            counts[layout.labels[index]] += int(sizes[index])
        counts[HALF if DTYPE_BYTES[self.settings.compute_dtype] == 2 else SINGLE] += self._head_gradients(batch, length)
        return Work(*counts.values())

    def _head_gradients(self, batch: int, length: int) -> int:
        """Operations of TRL's head that a trace for CUDA leaves out: the products that are added up in float32 (patches, _addmm_fp32)."""
        if self.settings.loss != "fused" or self.settings.device != "cuda":
            return 0
        vocabulary, hidden = self.skeleton.model.get_output_embeddings().weight.shape
        gradients = 2 if self.settings.method == "full" else 1  # of the hidden states, and of a trained head's weights
        return gradients * 2 * labelled_tokens(batch, length, self.settings.labelled_share) * int(vocabulary * hidden)

    def _order(self, fitted: Fitted, accumulates: bool) -> Order:
        if accumulates not in fitted.orders:
            fitted.orders[accumulates] = Order(
                fitted.layout,
                self._optimizer,
                accumulates=accumulates,
                keep_outputs=self.settings.keep_outputs,
                longest_first=self.settings.longest_first,
            )
        return fitted.orders[accumulates]

    def _regime(self, batch: int, length: int) -> tuple[bool, bool, bool]:
        """Within one regime the order of events is the same: alone or in a batch, within a sliding window or beyond, aligned or not."""
        return batch == 1, bool(self._window) and length >= self._window, length % MASK_ALIGNMENT == 0

    @property
    def _window(self) -> int:
        """Tokens of the model's sliding window, 0 without one."""
        return getattr(self.skeleton.model.config.get_text_config(), "sliding_window", None) or 0

    def _fitted(self, batch: int, length: int) -> Fitted:
        if self.settings.device == "cpu":  # whose loss head works in as many tiles as the tokens need: no two points are alike
            if (batch, length) not in self._fits:
                self._fits[batch, length] = [self._fit([(batch, length)], length)]
            return self._fits[batch, length][0]
        regime = self._regime(batch, length)
        fits = self._fits.setdefault(regime, [])
        if known := next((fitted for fitted in fits if fitted.length in (None, length)), None):
            return known
        batches = (1,) if batch == 1 else (2, 4) if self.settings.objective == "dpo" else (2, 3)  # a pair is two rows
        if len(fits) == 1:  # a second length
            window = self._window
            start = -(-window // 128) * 128 if regime[1] else 0
            steps = (
                (256, 512, 768)
                if not window or regime[1]
                else tuple(max(MASK_ALIGNMENT, window // 4 * n // MASK_ALIGNMENT * MASK_ALIGNMENT) for n in (1, 2, 3))
            )
            points = [(b, start + s + (0 if regime[2] else MASK_ALIGNMENT // 2)) for s in steps for b in batches]
            try:
                fits[:] = [self._fit(points)]
                return fits[0]
            except UntracedError:  # a layer that has a state works in as many chunks as the tokens need: it is one a length
                pass
        fits.append(self._fit([(b, length) for b in batches], length))
        return fits[-1]

    def _fit(self, points: list[tuple[int, int]], length: int | None = None) -> Fitted:
        recorded = [self._tracer.record(*point) for point in points]
        first = recorded[0]
        if any((other.kinds, other.storages) != (first.kinds, first.storages) for other in recorded):
            raise UntracedError("Traces at different batches or lengths differ in their operations; their memory cannot be fitted.")
        try:
            layout = unroll(first, self.skeleton.unit_layers, self.skeleton.layers, self.skeleton.total_layers)
        except NotRepeating:  # layers that look alike do not behave alike: trace them all
            self.skeleton = self.skeleton.whole()
            self._tracer = StepTracer(self.skeleton, self.settings)
            return self._fit(points, length)
        sizes = Sizes(points, [events.sizes for events in recorded], first.tiled, self.settings.labelled_share)
        return Fitted(layout, sizes, np.array(first.kinds) == WORK, length)
