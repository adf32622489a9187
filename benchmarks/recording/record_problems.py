"""Records the attention problems of timm's, transformers' and diffusers' models, for attn_core.testing.recorded.

Models get random weights, mostly on the meta device, where those of a 70B model are free: only the depth is reduced,
so every layer's heads, sizes, dtypes and biases are the named architecture's own. `scaled_dot_product_attention` is
replaced by a function that notes what it is asked and returns zeros; transformers calls it by an attention function of
its own registry, which also hears of softcaps, windows and padding.

A mask that is passed as a tensor is recorded as one. Where transformers says what its mask means (causal, a window,
padding), the same call is recorded once more with the bias that says so: its `form` is "meant", the other's "passed".

    python benchmarks/recording/record_problems.py --out core/src/attn_core/testing/recorded.json
        [--only LIBRARY] [--model TEXT]

Needs timm, torchvision, transformers and diffusers; the versions found are written into the file. Ends with status 1
where a library is missing or a model that is listed asks nothing; each of them is named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recorded_models as models
import torch
from attn_core import AttnBias, Causal, InputError, InputTypeError, KeyPadding, Problem, TensorBias, Window, explain
from attn_core.testing.recorded import described
from torch import Tensor, nn

LIBRARIES = ("timm", "transformers", "diffusers")
_sdpa = torch.nn.functional.scaled_dot_product_attention


@dataclass
class Notes:
    """What was asked, once per problem, and where it came from first."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    library: str = ""
    model: str = ""
    mode: str = ""
    modules: dict[int, str] = field(default_factory=dict)  #: name of a module in its model, by id
    asked: int = 0

    def begin(self, library: str, model: str, mode: str, module: nn.Module) -> None:
        self.library, self.model, self.mode, self.asked = library, model, mode, 0
        self.modules = {id(part): name for name, part in module.named_modules()}

    def add(self, module: nn.Module | None, problem: Problem, form: str) -> None:
        self.asked += 1
        what = described(problem)
        row = self.rows.setdefault(json.dumps(what, sort_keys=True), {})
        if not row:
            name = f"{self.modules.get(id(module), '?')} ({type(module).__name__})"
            row |= {"library": self.library, "model": self.model, "module": name, "mode": self.mode, "form": form}
            row |= {"also": []} | what
        elif self.model != row["model"] and self.model not in row["also"]:
            row["also"].append(self.model)

    def refuse(self, error: Exception) -> None:
        """A call that attn's door does not let in."""
        self.refused.append(f"{self.library} {self.model} {self.mode}: {error}")


NOTES = Notes()


def nearest_module() -> nn.Module | None:
    """The module in whose method the call is."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self", frame.f_locals.get("attn"))
        if isinstance(module, nn.Module) and id(module) in NOTES.modules:
            return module
        frame = frame.f_back  # type: ignore[assignment]
    return None


def recording_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention, which notes what it is asked and returns zeros."""
    bias = Causal("top-left") if is_causal else None if attn_mask is None else TensorBias(attn_mask)
    leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    try:
        problem = explain(
            query, key, value, bias, scale=scale, dropout_p=dropout_p, layout="heads-first", enable_gqa=enable_gqa
        ).problem
        NOTES.add(nearest_module(), problem, "passed")
    except (InputError, InputTypeError) as error:
        NOTES.refuse(error)
    return query.new_zeros(*leading, *query.shape[-3:-1], value.shape[-1])


def recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: key heads are not repeated, a softcap is there."""
    from transformers.integrations.sdpa_attention import create_position_bias_mask

    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(is_causal) and query.shape[2] > 1 and attention_mask is None
    meant = None if position_bias is not None else getattr(attention_mask, "meant", None)
    bias: AttnBias | Tensor | None = Causal("top-left") if causal else attention_mask
    if position_bias is not None:
        bias = create_position_bias_mask(position_bias, attention_mask, causal, query, key)
    for form, given in (("passed", bias), ("meant", meant)):
        if form == "meant" and given is None:
            continue
        problem = explain(
            *(x.transpose(1, 2) for x in (query, key, value)),
            given,
            scale=scaling,
            softcap=softcap,
            dropout_p=dropout,
        ).problem
        NOTES.add(module, problem, form)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def recording_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for SDPA; where one is made, it carries what it means.

    Whether padding is all there is cannot be read off a mask on the meta device, so where there is a padding mask,
    some of it counts as padded, on the right.
    """
    from transformers.masking_utils import sdpa_mask

    padded = kwargs.get("attention_mask")
    if padded is not None:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(*args, **kwargs)
    if mask is not None:
        mask.meant = meaning(mask, kwargs.get("mask_function"), kwargs.get("local_size"), padded)
    return mask


def meaning(mask: Tensor, rule: Any, window: int | None, padded: Tensor | None) -> AttnBias | None:
    """The bias that says what such a mask says; None where transformers' own words do not tell."""
    names = rule_names(rule)
    causal = "causal_mask_function" in names
    if "sliding_window_overlay" in names and causal and window:
        bias: AttnBias | None = Window(window - 1, 0, "bottom-right")
    elif "sliding_window_bidirectional_overlay" in names and window:
        bias = Window(window, window, "bottom-right")
    elif names <= {"causal_mask_function", "and_masks", "add_offsets_to_mask_function"} and causal:
        bias = Causal("bottom-right")
    elif names <= {"bidirectional_mask_function", "and_masks", "add_offsets_to_mask_function"}:
        bias = None
    else:
        return None
    if padded is None:
        return bias
    if causal and mask.shape[-2] != mask.shape[-1]:
        return None  # a cache is padded on the left
    padding = KeyPadding(torch.empty(mask.shape[0], dtype=torch.int64, device=mask.device))
    return padding if bias is None else padding & bias  # type: ignore[operator]


def rule_names(rule: Any) -> set[str]:
    """Names of the functions that a mask function of transformers is made of."""
    if not callable(rule):
        return set()
    names = {rule.__qualname__.partition(".")[0]}
    for cell in getattr(rule, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, tuple) else (held,):
            names |= rule_names(part)
    return names


@contextmanager
def replaced() -> Iterator[None]:
    """Within it, torch's attention is the one that records."""
    torch.nn.functional.scaled_dot_product_attention = recording_sdpa  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = _sdpa


def made(build: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """The model on a device; on "moved" it was built on the CPU, since its constructor reads numbers, and moved."""
    with torch.device("cpu" if device == "moved" else device):
        model = build()
    return model.to(dtype).to("meta" if device == "moved" else device)


def observe(library: str, name: str, entry: models.Entry) -> str | None:
    """Runs a model in every mode that is listed for it; answers why that failed, or None."""
    why = []
    for device in ("meta", "moved", "cpu") if not entry.only_meta else ("meta",):
        try:
            model = made(entry.build, entry.dtype, device)
            on = "meta" if device == "moved" else device
            for mode, run in entry.modes.items():
                training = mode.startswith("train")
                model.train(training)
                NOTES.begin(library, name, mode, model)
                with torch.set_grad_enabled(training), torch.device(on):
                    run(model, entry.dtype, on)
                if not NOTES.asked:
                    return f"{mode}: never calls scaled_dot_product_attention"
            return None
        except Exception as error:  # a model's own code, of a hundred kinds: what it raised is reported
            why.append(f"{device}: {type(error).__name__}: {str(error)[:120]}")
    return "; ".join(why)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--out", metavar="FILE", required=True)
    parser.add_argument("--only", choices=LIBRARIES, action="append")
    parser.add_argument("--model", default="", help="only models whose name has this in it")
    options = parser.parse_args()
    versions, lacking = {}, []
    models.define_torchvision_ops()
    for library in options.only or LIBRARIES:
        try:
            versions[library] = importlib.import_module(library).__version__
        except ImportError as error:
            lacking.append(f"{library} is missing ({error}); to install it: pip install {library}")
            continue
        if library == "transformers":
            models.register(recording_attention, recording_mask)
        with replaced():
            for name, entry in models.entries(library):
                if options.model in name and (why := observe(library, name, entry)):
                    lacking.append(f"{library} {name}: {why}")
        print(f"{library} {versions[library]}: {len(NOTES.rows)} problems so far", flush=True)
    rows = ",\n".join(json.dumps({k: v for k, v in row.items() if v != []}) for row in NOTES.rows.values())
    text = f'{{"torch": "{torch.__version__}", "libraries": {json.dumps(versions)}, "problems": [\n{rows}\n]}}\n'
    Path(options.out).write_text(text, encoding="utf-8")
    print(f"{options.out}: {len(NOTES.rows)} problems, {len(text.encode()) / 1000:.0f} kB")
    for line in dict.fromkeys(NOTES.refused):
        print(f"not let in: {line}")
    for line in lacking:
        print(f"missing: {line}")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
