"""A two-block model learns to copy through its fast weights: ``python examples/copy_task.py``.

Random tokens are read, and then read again: the second time, each next token can be known only from what
the first reading wrote. Under a minute on two cores; prints the loss and the accuracy of the second half.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwpkm_bench.layers.fwpkm import FwPKM, Settings

VOCABULARY, HALF, BATCH = 64, 32, 16
CHUNK = 8  # tokens between two writes: much shorter than the distance to be remembered


class Block(nn.Module):
    """A fast-weight memory and an MLP, each behind a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        settings = Settings(
            width=width, key_dim=width, value_dim=width, n_subkeys=32, topk=4, chunk_size=CHUNK
        )
        self.memory = FwPKM(settings)
        self.mlp = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.memory(x)  # the state is dropped: every sequence starts from the learned memory
        x = x + y
        return x + self.mlp(x)


class Model(nn.Module):
    """Embedding, two blocks, and a prediction of the next token."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens [B, T]`` to logits ``[B, T, VOCABULARY]``."""
        return self.head(self.blocks(self.embedding(tokens)))


def draw(generator: torch.Generator, half: int = HALF) -> Tensor:
    """``[B, 2 * half]``: a random permutation's beginning, twice."""
    noise = torch.rand(BATCH, VOCABULARY, generator=generator)
    once = noise.argsort(dim=1)[:, :half]
    return torch.cat((once, once), 1)


def second_half(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and answers where the answer has been read before: ``[B, half - 1]`` of them."""
    half = tokens.shape[1] // 2
    return logits[:, half:-1], tokens[:, half + 1 :]


def train(steps: int, seed: int = 0) -> float:
    """The accuracy on unseen sequences after ``steps`` steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    started = time.perf_counter()
    for step in range(steps):
        tokens = draw(generator)
        logits, answers = second_half(model(tokens), tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            right = (logits.argmax(-1) == answers).float().mean()
            elapsed = time.perf_counter() - started
            print(f"step {step + 1:4d}  loss {loss:.3f}  accuracy {right:.3f}  {elapsed:.0f} s", flush=True)
    with torch.no_grad():
        tokens = draw(generator)
        logits, answers = second_half(model(tokens), tokens)
        return float((logits.argmax(-1) == answers).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    print(
        f"accuracy on unseen sequences: {train(parser.parse_args().steps):.3f} (chance {1 / VOCABULARY:.3f})"
    )
