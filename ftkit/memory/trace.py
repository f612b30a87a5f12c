"""Trace one training step on fake tensors: every allocation and free, in order, without a weight or a GPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

from ftkit import patches
from ftkit.errors import ModelError, UntracedError, first_line
from ftkit.memory import kernels
from ftkit.memory.events import Events
from ftkit.memory.fake import for_dora, make_fake, prepare, quantization_tensors
from ftkit.memory.model import Skeleton, decoder_layers
from ftkit.memory.recorder import Recorder
from ftkit.memory.settings import StepSettings, labelled_tokens

CHUNK_TOKENS = 128  # LitGPT's lm_head_chunk_size


class StepTracer:
    """A skeleton on fake tensors, ready to be traced at any batch and length."""

    def __init__(self, skeleton: Skeleton, settings: StepSettings) -> None:
        self.settings = settings
        patches.require(*self._when())
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.layers = skeleton.layers
        kernels.prepare_bitsandbytes()
        self.model = copy.deepcopy(skeleton.model)
        self.wrapped = prepare(self.model, settings)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            make_fake(self.model, settings)
        self._hooks()

    def _when(self) -> tuple[patches.When, ...]:
        return ("tracing", "running adapters", *for_dora(self.settings), *(("tracing for CUDA",) if self.settings.device == "cuda" else ()))

    def _hooks(self) -> None:
        """Tell the recorder where a layer begins, forward and backward, and what an allocation is for."""
        self._recorder: Recorder | None = None

        def named(module: Any, label: str) -> None:
            def enter(*_: Any) -> None:
                if self._recorder:
                    self._recorder.labels.append(label)

            def leave(*_: Any) -> None:
                if self._recorder and len(self._recorder.labels) > 1:
                    self._recorder.labels.pop()

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)

        def layer_begins(index: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if self._recorder and self._recorder.phase == "forward":
                    self._recorder.mark("forward", index)

            return hook

        def layer_ends(index: int) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                recorder = self._recorder
                if not recorder or recorder.phase != "forward":
                    return
                recorder.head_begins = index == self.layers - 1
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad:
                    hidden.register_hook(lambda gradient: recorder.backward_begins(index))

            return hook

        named(self.model.get_input_embeddings(), "embeddings")
        for index, layer in enumerate(decoder_layers(self.model)):
            named(layer, "layers")
            for name, child in layer.named_children():
                named(child, part_name(name))
            layer.register_forward_pre_hook(layer_begins(index))
            layer.register_forward_hook(layer_ends(index))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self._recorder and self._recorder.gradient(p))

    def record(self, batch: int, length: int) -> Events:
        """The events of one forward and backward pass over `batch` rows of `length` tokens."""
        settings = self.settings
        padded = settings.padded and batch > 1
        recorder = Recorder(kernels.workspaces() if settings.device == "cuda" else {})
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            recorder.ignore(tensor)
        for state in quantization_tensors(self.model):
            recorder.ignore(state)
        self._recorder = recorder
        attention = kernels.attention(settings.capability, settings.fused_qkv) if settings.device == "cuda" else None
        grouped = patches.takes_grouped_heads(settings.capability, half=settings.compute_dtype != "float32")
        traced = patches.Traced(attention, padded, settings.packed, settings.triton, grouped)
        try:
            with self._fake, patches.without_trainer(), patches.applied(*self._when(), to=traced), recorder:
                self._step(recorder, batch, length)
        except ModelError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, AttributeError, ImportError, ValueError) as error:
            raise UntracedError(
                f"A training step of {self.model.config.model_type} cannot be traced: {type(error).__name__}: {first_line(error)}",
                "on the machine that trains, ftkit measures two real steps instead; docs/plan.md names model types that are traced",
            ) from error
        finally:
            self._recorder = None
            self.model.zero_grad(set_to_none=True)
        recorder.events.sort_frees()
        return recorder.events

    def _step(self, recorder: Recorder, batch: int, length: int) -> None:
        import torch

        settings = self.settings
        recorder.phase, recorder.labels = "forward", ["inputs"]
        ids = torch.zeros(batch, length, dtype=torch.long)
        labels = torch.zeros(batch, length, dtype=torch.long)
        mask = None if settings.packed else torch.ones(batch, length, dtype=torch.long)
        positions = torch.zeros(batch, length, dtype=torch.long) if settings.packed else None
        recorder.labels = ["loss head"]
        compute = getattr(torch, settings.compute_dtype)
        autocast = torch.autocast("cpu", dtype=compute) if settings.autocast else contextlib.nullcontext()
        with autocast:
            loss, outputs = self._loss(ids, labels, mask, positions)
        if not settings.keep_outputs:
            del outputs
        recorder.phase = "backward"
        recorder.mark("loss backward", 0)
        loss.backward()
        recorder.mark("release", 0)
        del ids, labels, mask, positions, loss
        if settings.keep_outputs:
            del outputs

    def _loss(self, ids: Any, labels: Any, mask: Any, positions: Any) -> tuple[Any, Any]:
        """The loss, and what the training loop keeps of the model's output."""
        import torch

        settings = self.settings
        if settings.loss != "fused":
            counted = torch.ones((), dtype=torch.long)
            if settings.loss == "logits":
                outputs = self.wrapped(
                    input_ids=ids, attention_mask=mask, labels=labels, use_cache=settings.use_cache, num_items_in_batch=counted
                )
                return outputs.loss, outputs
            if settings.loss == "float32_chunks":
                return self._chunked_loss(ids, labels, mask)
            outputs = self.wrapped(input_ids=ids, attention_mask=mask, use_cache=settings.use_cache)
            logits = outputs.logits.float()
            return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)), (
                outputs,
                logits,
            )
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        # As in TRL's fused head: the hidden states of labelled tokens are gathered, scored and scattered back.
        if settings.objective == "dpo":  # what is an answer, and labels that are made of it
            answers, reference = torch.ones_like(ids), torch.zeros(ids.shape[0])
            labels = ids.masked_fill(answers == 0, -100)
        placed = {} if positions is None else {"position_ids": positions}
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **placed).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100
        count = labelled_tokens(batch=ids.shape[0], length=ids.shape[1], share=settings.labelled_share)
        rows, columns = (torch.zeros(count, dtype=torch.long) for _ in range(2))
        head = self.model.get_output_embeddings()
        text = self.model.config.get_text_config()
        softcap = getattr(text, "final_logit_softcapping", None)
        scored = ChunkedLogProbFunction.apply(
            hidden[rows, columns],
            head.weight,
            head.bias,
            labels[:, 1:][rows, columns],
            1.0,
            kernels.HEAD_TILE_VOCABULARY,
            softcap,
            1.0,
            ("log_probs", "entropy", *(("mean_logits",) if settings.objective == "dpo" else ()), "is_top1"),
        )
        del hidden, rows, columns
        if settings.objective == "dpo":
            log_probs, entropy, means, top1 = (x.new_zeros(wanted.shape).masked_scatter(wanted, x) for x in scored if x is not None)
            del scored
            chosen, rejected = (log_probs.sum(dim=1) - reference).chunk(2)
            return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean(), (log_probs, entropy, means, top1, wanted, answers)
        log_probs, entropy, top1 = (x.new_zeros(wanted.shape).masked_scatter(wanted, x) for x in (scored[0], scored[1], scored[4]))
        del scored
        loss = (-log_probs).sum() / wanted.sum()
        return loss, (log_probs, entropy, top1, wanted)

    def _chunked_loss(self, ids: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
        import torch
        from torch.nn.functional import cross_entropy

        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        chunks = [part.float() for part in [head(part) for part in hidden.split(CHUNK_TOKENS, dim=1)]]
        chunks[-1] = chunks[-1][:, :-1]
        wanted = labels[:, 1:]
        losses = [
            cross_entropy(part.reshape(-1, part.shape[-1]), goal.reshape(-1), reduction="none")
            for part, goal in zip(chunks, wanted.split(CHUNK_TOKENS, dim=1), strict=True)
        ]
        return torch.cat(losses).sum() / (wanted != -100).sum(), chunks


def part_name(child: str) -> str:
    """What a layer's child module is called in the explanation of a peak."""
    for part, words in {"norms": ("norm",), "attention": ("attn", "attention"), "MLP": ("mlp", "feed_forward", "experts", "moe")}.items():
        if any(word in child for word in words):
            return part
    return "layers"
