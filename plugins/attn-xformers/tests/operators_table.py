"""The tables of docs/reference/xformers.md, made from the class attributes of the installed xFormers.

python plugins/attn-xformers/tests/operators_table.py           writes them into the page
python plugins/attn-xformers/tests/operators_table.py --check   says whether the page is in step, exit code 1 if not
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from attn_core import Backward
from attn_core.cli.declared import listed, sizes
from attn_xformers.kernels import read
from attn_xformers.kernels.operators import OPERATORS

sys.path.insert(0, str(Path(__file__).parent))
from a_gpu import a_gpu

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "xformers.md"
REGION = re.compile(r"(?P<head><!-- read from xFormers: (?P<name>[\w ]+) -->\n).*?(?=^<!-- end -->$)", re.M | re.S)
NO = "·"


def operators() -> list[list[str]]:
    """A row for each kernel."""
    rows = [["kernel", "operators", "devices", "dtypes", "head_dim", "also", "gradients"]]
    for operator, pair, declared in each():
        low, high = declared.min_compute_capability, declared.max_compute_capability
        assert low is not None
        words = {
            "GQA": declared.gqa,
            "another head_dim_v": declared.head_dims_v is not None,
            "any scale": pair.forward.SUPPORTS_CUSTOM_SCALE,
            "dropout": declared.dropout,
            "LSE": declared.return_lse,
            "deterministic": declared.deterministic,
        }
        backward = declared.backward
        gradients = []
        if isinstance(backward, Backward):
            own = "" if backward.head_dims is None else f" for head_dim {sizes(backward.head_dims)}"
            gradients = [f"q, k, v{own}"]
            gradients += ["bias"] if backward.bias_grad else []
            gradients += ["deterministic"] if backward.deterministic else []
        names = [pair.forward.NAME, *([] if pair.backward is None else [pair.backward.NAME])]
        rows.append(
            [
                f"`xformers/{operator.name}`",
                ", ".join(f"`{without_version(name)}`" for name in names),
                "ROCm" if operator.needs == "ROCm" else devices(low, high),
                listed(declared.dtypes),
                sizes(declared.head_dims),
                ", ".join(word for word, given in words.items() if given),
                ", ".join(gradients) or NO,
            ]
        )
    return rows


def classes() -> list[list[str]]:
    """A row for each bias class of xFormers, a column for each kernel: taken, and with gradients or without."""
    found = list(each())
    names = dict.fromkeys(
        name for _, pair, _ in found for name in (taken.__name__ for taken in pair.forward.SUPPORTED_ATTN_BIAS_TYPES)
    )
    rows = [["bias class", "said of", *(operator.name for operator, _, _ in found)]]
    for name in names:
        said = "no bias" if name == "NoneType" else listed(says(name)) or NO
        row = [f"`{name}`", said]
        for _, pair, _ in found:
            forward, backward = (lists(operator, name) for operator in (pair.forward, pair.backward))
            row.append("gradients" if forward and backward else "yes" if forward else NO)
        rows.append(row)
    return rows


def each():
    """(operator, its classes, what it declares) of every kernel, on sm_90, or its first device where that is newer."""
    for operator in OPERATORS:
        with a_gpu((9, 0)) as pairs:
            low = max((9, 0), tuple(pairs[operator.name].forward.CUDA_MINIMUM_COMPUTE_CAPABILITY))
        with a_gpu(low) as pairs:
            pair = pairs[operator.name]
            yield operator, pair, read.capabilities(pair, torch.float16, "cuda", low)


def devices(low, high):
    """Compute capabilities, in words."""
    return f"sm_{low[0]}{low[1]} " + ("and later" if high is None else f"to sm_{high[0]}{high[1]}")


def says(name):
    """The kinds of ours that a class says, to some operator at least."""
    return read.SAYS.get(name, frozenset()) | read.INSTEAD_OF_TENSOR.get(name, frozenset())


def lists(operator, name):
    return operator is not None and any(each.__name__ == name for each in operator.SUPPORTED_ATTN_BIAS_TYPES)


def without_version(name):
    """An operator's name without the release of FlashAttention that it found."""
    return re.sub(r"@[^-]*", "@…", name).removesuffix("-pt") if "@" in name else name


def written(text: str) -> str:
    """The page with its tables made anew."""
    tables = {"operators": operators, "bias classes": classes}

    def fill(match: re.Match[str]) -> str:
        head, *body = tables[match["name"]]()
        lines = [head, ["---"] * len(head), *body]
        return match["head"] + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    return REGION.sub(fill, text)


def main(arguments: list[str]) -> int:
    text = PAGE.read_text(encoding="utf-8")
    made = written(text)
    if arguments == ["--check"]:
        print("in step" if made == text else f"{PAGE} is out of step; run this without --check")  # noqa: T201
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
