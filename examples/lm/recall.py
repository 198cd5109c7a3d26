"""Recall over a long context: a key and its value are hidden in a text, and the end of the text asks for the key.

The text is real (bytes below 128). A needle is three bytes, (needle mark, key, value), a question two, (question
mark, key); the byte after a question is the value. Marks, keys and values are bytes from 128 on, so that a needle
is never part of the text, and every text holds several needles: finding one is not enough, the keys must agree.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import ByteModel
from .train import autocast

NEEDLE, QUESTION = 128, 129
KEYS = torch.arange(130, 194)
VALUES = torch.arange(194, 256)
NEEDLE_BYTES = 3


@dataclass(frozen=True)
class Texts:
    """Where the texts come from."""

    source: Tensor  # uint8 [bytes]
    generator: torch.Generator
    device: torch.device

    def plain(self, count: int, length: int) -> Tensor:
        """int64 [count, length] without needles."""
        starts = torch.randint(self.source.numel() - length, (count, 1), generator=self.generator)
        return self.source[starts + torch.arange(length)].long().clamp_max(127)

    def needles(self, count: int, number: int) -> Tensor:
        """int64 [count, number, 3]; the keys of a text are all different."""
        keys = KEYS[torch.rand(count, len(KEYS), generator=self.generator).argsort(-1)[:, :number]]
        values = VALUES[torch.randint(len(VALUES), (count, number), generator=self.generator)]
        marks = torch.full_like(keys, NEEDLE)
        return torch.stack((marks, keys, values), -1)

    def training(self, count: int, length: int, needles: int, questions: int) -> tuple[Tensor, Tensor]:
        """Texts int64 [count, length] that end with questions and answers, and where the answers stand, [questions]."""
        tail = questions * NEEDLE_BYTES
        text = self.plain(count, length - tail)
        hidden = self.needles(count, needles)
        slots = text.shape[1] // NEEDLE_BYTES  # needles stand in slots, so that none covers another
        places = torch.rand(count, slots, generator=self.generator).argsort(-1)[:, :needles]
        _hide(text, hidden, places * NEEDLE_BYTES)
        asked = hidden[:, torch.randperm(needles, generator=self.generator)[:questions]].clone()
        asked[..., 0] = QUESTION
        answers = length - tail + NEEDLE_BYTES * torch.arange(1, questions + 1) - 1
        return torch.cat((text, asked.flatten(1)), 1).to(self.device), answers.to(self.device)

    def test(self, count: int, length: int, depth: float, others: int) -> tuple[Tensor, Tensor]:
        """Texts [count, length] that end with one question, whose needle stands at a depth in [0, 1]; and answers."""
        text = self.plain(count, length - NEEDLE_BYTES + 1)
        hidden = self.needles(count, 1 + others)
        slots = text.shape[1] // NEEDLE_BYTES
        own = round(depth * (slots - 1))
        places = torch.rand(count, slots - 1, generator=self.generator).argsort(-1)[:, :others]
        places = torch.cat((torch.full((count, 1), own), places + (places >= own)), 1)
        _hide(text, hidden, places * NEEDLE_BYTES)
        question = hidden[:, 0, :2].clone()
        question[:, 0] = QUESTION
        return torch.cat((text, question), 1).to(self.device), hidden[:, 0, 2].to(self.device)


def _hide(text: Tensor, needles: Tensor, places: Tensor) -> None:
    """Writes needles [count, number, 3] into text [count, length] from places [count, number] on."""
    positions = places.unsqueeze(-1) + torch.arange(NEEDLE_BYTES)
    text.scatter_(1, positions.flatten(1), needles.flatten(1))


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: texts of one length."""

    length: int
    batch: int
    steps: int


@dataclass
class Learner:
    name: str
    model: ByteModel
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)  # nats per answer


def make_learner(name: str, model: ByteModel, learning_rate: float) -> Learner:
    return Learner(name, model, torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98)))


def learn(learner: Learner, text: Tensor, answers: Tensor, learning_rate: float) -> float:
    """One step on texts [B, T], scored at the bytes `answers` [questions]; returns the share of right answers."""
    start = time.perf_counter()
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate
    with autocast(text.device):
        logits = learner.model(text[:, :-1], at=answers - 1)
    goals = text[:, answers]
    loss = F.cross_entropy(logits.float().flatten(0, 1), goals.flatten())
    learner.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
    learner.optimizer.step()
    right = (logits.argmax(-1) == goals).float().mean().item()  # waits for the device: the time is the whole step's
    learner.losses.append(loss.item())
    learner.seconds += time.perf_counter() - start
    learner.tokens += text.numel()
    return right


@torch.no_grad()
def recall(model: ByteModel, texts: Texts, length: int, depth: float, trials: int, batch: int, others: int) -> float:
    """Share of right answers over `trials` texts of one length with the needle at one depth."""
    right = 0
    for first in range(0, trials, batch):
        text, answers = texts.test(min(batch, trials - first), length, depth, others)
        with autocast(text.device):
            logits = model(text, at=torch.tensor([length - 1], device=text.device))
        right += int((logits[:, 0].argmax(-1) == answers).sum())
    return right / trials
