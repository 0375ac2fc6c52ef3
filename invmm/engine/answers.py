"""Answers requests: those of a kind are packed together, in calls of a constant row count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition, guided, is_guided
from invmm.diffusion.sampling import draw
from invmm.diffusion.schedule import Prediction
from invmm.engine.accounting import Stopwatch, Tally
from invmm.engine.batching import (
    by_names,
    condition_values,
    conditions_in_calls,
    in_calls,
    needs_grad,
    num_rows,
    rows_like,
)
from invmm.engine.finiteness import Stage, are_finite, row_magnitudes
from invmm.engine.outcomes import NonFiniteError, Spent
from invmm.engine.protocols import Network, Similarity, TextNetwork
from invmm.engine.requests import Denoise, Embed, Embedding, EncodePrompt, Minimise, Sample
from invmm.engine.slots import Slot


class Answers:
    """Answers the requests of many images with the network and the similarity network.

    Args:
        network: the frozen model.
        similarity: the frozen similarity network.
        rows: type of request -> rows per call; the engine may lower them between calls.
        stopwatch: takes the time of each call.
    """

    def __init__(
        self,
        network: Network,
        similarity: Similarity,
        rows: dict[type, int],
        stopwatch: Stopwatch,
    ) -> None:
        self.network, self.similarity = network, similarity
        self.rows, self.stopwatch = rows, stopwatch

    def __call__(self, group: Sequence[Slot], slots: Sequence[Slot]) -> Sequence[Any]:
        """Answers a group from `next_group`: one answer or error per slot."""
        kind = type(group[0].request)
        if kind is Minimise:
            return self._minimise(group, slots)
        if kind is EncodePrompt:
            return self._encode_prompt(group)
        if kind is Denoise:
            return self._denoise(group)
        return self._sample(group) if kind is Sample else self._embed(group)

    def _minimise(self, group: Sequence[Slot], slots: Sequence[Slot]) -> list[Exception | None]:
        """Backpropagates the sum: rows do not mix, so each image gets exactly its own gradient."""
        requests: list[Minimise] = [slot.request for slot in group]  # pyright: ignore
        answers = [_refusal(request.loss) for request in requests]
        losses = [r.loss for r, refusal in zip(requests, answers, strict=True) if refusal is None]
        others_need_graph = any(slot.tally.holds_graph for slot in slots if slot not in group)
        shares: dict[Tally, float] = {slot.tally: slot.tally.graph_rows or 1 for slot in group}
        if losses:
            with self.stopwatch.time(Spent.NETWORK, shares):
                torch.autograd.backward(losses, retain_graph=others_need_graph)
        for slot in group:
            slot.tally.backpropagated()
        return answers

    def _encode_prompt(self, group: Sequence[Slot]) -> list[Condition]:
        network = self.network
        if not isinstance(network, TextNetwork):
            raise TypeError(f"a {type(network).__name__} encodes no prompts")
        requests: list[EncodePrompt] = [slot.request for slot in group]  # pyright: ignore
        keep_graph = needs_grad(requests[0])
        encoders, names = tuple(requests[0].embeddings), tuple(requests[0].tokens.fixed)
        columns = []
        for request in requests:
            tokens, count = request.tokens, num_rows(request)
            shared = (*tokens.ids.values(), *tokens.fixed.values())
            rows = [value.expand(count, *value.shape[1:]) for value in shared]
            columns.append([*request.embeddings.values(), *rows])

        def call(*inputs: Tensor) -> Condition:
            own = iter(inputs)
            embeddings = {name: next(own) for name in encoders}
            ids = {name: next(own) for name in encoders}
            return network.encode_prompt(embeddings, ids, dict(zip(names, own, strict=True)))

        per_call = self.rows[rows_like(EncodePrompt)]
        with torch.set_grad_enabled(keep_graph), self.stopwatch.time(Spent.NETWORK, _shares(group)):
            conditions = conditions_in_calls(call, columns, per_call)
        for slot, condition in zip(group, conditions, strict=True):
            slot.tally.holds_graph |= keep_graph
            slot.watch.see(Stage.PROMPT, *condition.values())
        return conditions

    def _denoise(self, group: Sequence[Slot]) -> list[Prediction]:
        requests: list[Denoise] = [slot.request for slot in group]  # pyright: ignore
        keep_graph = needs_grad(requests[0])
        columns = [[r.latents, r.timesteps, *condition_values(r)] for r in requests]
        names = tuple(requests[0].condition or ())

        def call(latents: Tensor, timesteps: Tensor, *condition: Tensor) -> Tensor:
            return self.network.predict(latents, timesteps, by_names(names, condition))

        with torch.set_grad_enabled(keep_graph), self.stopwatch.time(Spent.NETWORK, _shares(group)):
            outputs = in_calls(call, columns, self.rows[Denoise])
        for slot, output in zip(group, outputs, strict=True):
            slot.tally.evaluated(len(output), keep_graph=keep_graph)
            slot.watch.see(Stage.PREDICTION, output)
        schedule = self.network.schedule
        return [
            Prediction(output, request.latents, request.timesteps, schedule)
            for output, request in zip(outputs, requests, strict=True)
        ]

    def _sample(self, group: Sequence[Slot]) -> list[Tensor | NonFiniteError]:
        requests: list[Sample] = [slot.request for slot in group]  # pyright: ignore
        sampler, keep_graph = requests[0].sampler, needs_grad(requests[0])
        with_guidance = is_guided(requests[0].guidance_scale)
        names = tuple(requests[0].condition or ())
        columns = []
        for request in requests:
            count = len(request.noise)
            seeds = torch.tensor(request.seeds or [0] * count)
            column = [request.noise, seeds, *condition_values(request)]
            if with_guidance:
                negative = request.negative
                if negative is None or not names:
                    raise ValueError(
                        f"guidance at scale {request.guidance_scale} needs a condition and its "
                        "negative; use sampler.guidance_scales=[1] for an unconditional model"
                    )
                scales = torch.full((count,), request.guidance_scale)
                column += [scales, *(negative[name] for name in names)]
            columns.append(column)

        def call(noise: Tensor, seeds: Tensor, *conditions: Tensor) -> Tensor:
            condition = by_names(names, conditions[: len(names)])
            predict = self.network.predict

            def plain(latents: Tensor, timesteps: Tensor) -> Tensor:
                return predict(latents, timesteps, condition)

            if with_guidance and condition is not None:
                scales, *rest = conditions[len(names) :]
                negative = dict(zip(names, rest, strict=True))
                step = guided(predict, condition, negative, scales)
            else:
                step = plain
            largest = torch.zeros(len(noise), device=noise.device)

            def watched(latents: Tensor, timesteps: Tensor) -> Tensor:
                nonlocal largest
                output = step(latents, timesteps)
                largest = torch.maximum(largest, row_magnitudes(output))
                return output

            latents = draw(
                watched,
                noise,
                sampler=sampler,
                schedule=self.network.schedule,
                seeds=seeds.tolist(),
            )
            # A sampler that clips turns an infinite prediction into finite latents.
            broken = ~largest.isfinite().reshape(-1, 1, 1, 1)
            return latents.masked_fill(broken, float("nan"))

        with torch.set_grad_enabled(keep_graph), self.stopwatch.time(Spent.SAMPLER, _shares(group)):
            outputs = in_calls(call, columns, self.rows[Sample])
            finite = are_finite(outputs)
        evaluations = sampler.evaluations_at(requests[0].guidance_scale)
        for slot, output in zip(group, outputs, strict=True):
            rows = len(output) * evaluations
            slot.tally.evaluated(rows, keep_graph=keep_graph, in_sampler=True)
        return [
            output if is_finite else NonFiniteError(Stage.SAMPLE)
            for output, is_finite in zip(outputs, finite, strict=True)
        ]

    def _embed(self, group: Sequence[Slot]) -> list[Embedding | NonFiniteError]:
        requests: list[Embed] = [slot.request for slot in group]  # pyright: ignore
        columns = [[request.latents] for request in requests]
        with torch.no_grad(), self.stopwatch.time(Spent.SIMILARITY, _shares(group)):
            pixels = in_calls(self.network.decode, columns, self.rows[Embed])
            columns = [[own] for own in pixels]
            vectors = in_calls(self.similarity.embed, columns, self.rows[Embed])
            # Pixels too: a similarity network may embed non-finite pixels as finite numbers.
            finite = are_finite([*pixels, *vectors])
        answers = []
        rows = zip(pixels, vectors, finite[: len(group)], finite[len(group) :], strict=True)
        for own, vector, is_picture, is_embedding in rows:
            if is_picture and is_embedding:
                answers.append(Embedding(own, vector))
            else:
                answers.append(NonFiniteError(Stage.SIMILARITY if is_picture else Stage.DECODER))
        return answers


def _shares(group: Sequence[Slot]) -> dict[Tally, float]:
    return {slot.tally: num_rows(slot.request) for slot in group}


def _refusal(loss: Tensor) -> Exception | None:
    if loss.numel() != 1 or not loss.requires_grad:
        return ValueError(f"Minimise needs a scalar with gradients, not {tuple(loss.shape)}")
    return None
