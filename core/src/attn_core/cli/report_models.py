"""Models of timm and transformers by name, with random weights, and inputs to run them on. Nothing is fetched."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, suggestion
from ..integrations.missing import MissingPackageError, need

FIXES = {"timm": 'pip install "timm>=1.0.31,<1.1"', "transformers": 'pip install "transformers>=5.23,<6"'}
#: Of the memory that is free, what a model's parameters may take.
SHARE = 0.6
SEQLEN = 128


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A model, and what it is run on."""

    name: str
    batch: int = 1
    size: int | None = None  #: height and width of images; None: the model's own
    seqlen: int | None = None  #: of tokens; None: 128, or as many as the model takes
    dtype: torch.dtype = torch.float32
    device: torch.device
    settings: Mapping[str, Any]  #: further arguments of the model, or of its configuration


def library_of(name: str) -> str:
    """The library that has a model of that name; "timm:NAME" and "transformers:NAME" say which.

    Raises MissingPackageError where neither library is installed, InputError for an unknown name, with near ones.
    """
    given, colon, rest = name.partition(":")
    if colon and given in NAMES:
        names = _names(given)
        if rest not in names:
            raise InputError(f"{given} has no model {rest!r}.{suggestion(rest, names)}")
        return given
    known: dict[str, list[str]] = {}
    missing = []
    for library in NAMES:
        try:
            known[library] = _names(library)
        except MissingPackageError as error:
            missing.append(str(error))
    if not known:
        raise MissingPackageError("\n".join(missing))
    for library, those in known.items():
        if name in those:
            return library
    text = f"no model {name!r}.{suggestion(name, {each for those in known.values() for each in those})}"
    if "/" in name:
        text += " Weights are not fetched: say the kind of model, such as 'bert', or a name of timm."
    raise InputError("\n".join([text, *(f"not looked into: {reason}" for reason in missing)]))


def _names(library: str) -> list[str]:
    """The names of its models. Raises MissingPackageError where it cannot be imported, whatever it raises then."""
    try:
        return NAMES[library]()
    except MissingPackageError:
        raise
    except Exception as error:  # a stale extension module raises anything
        raise MissingPackageError(
            f"a model of {library} needs {library}, which cannot be imported ({_first_line(error)}).\n"
            f"To install it: {FIXES[library]}"
        ) from error


def _names_of_timm() -> list[str]:
    return list(need("timm", "a model of timm", FIXES["timm"]).list_models())


def _names_of_transformers() -> list[str]:
    auto = need("transformers.models.auto.modeling_auto", "a model of transformers", FIXES["transformers"])
    return sorted(auto.MODEL_MAPPING_NAMES)


#: Library -> the names of its models.
NAMES: dict[str, Callable[[], list[str]]] = {"timm": _names_of_timm, "transformers": _names_of_transformers}


def build(library: str, wanted: Wanted) -> nn.Module:
    """The model with random weights, in eval mode. Raises InputError where it cannot be made."""
    name = wanted.name.removeprefix(f"{library}:")
    torch.manual_seed(0)
    try:
        model = BUILDERS[library](name, wanted)
    except InputError:
        raise
    except Exception as error:  # the library's own checks of what was set
        raise InputError(f"{library} cannot make {name!r} {_told(wanted.settings)}: {_first_line(error)}") from error
    return model.to(device=wanted.device, dtype=wanted.dtype).eval()


def _build_timm(name: str, wanted: Wanted) -> nn.Module:
    timm = need("timm", "a model of timm", FIXES["timm"])
    sized: list[dict[str, Any]] = [{}] if wanted.size is None else [{"img_size": wanted.size}, {}]
    for options in sized:
        try:
            model: nn.Module = timm.create_model(name, pretrained=False, **{**options, **wanted.settings})
        except TypeError as error:
            if "img_size" in str(error) and options:  # takes images of any size
                continue
            raise
        return model
    raise AssertionError(sized)


def _build_transformers(name: str, wanted: Wanted) -> nn.Module:
    transformers = need("transformers", "a model of transformers", FIXES["transformers"])
    transformers.logging.set_verbosity_error()
    default = transformers.AutoConfig.for_model(name)
    for field in wanted.settings:  # a configuration keeps whatever it is given, and the model would not hear of it
        if not hasattr(default, field):
            near = suggestion(field, default.to_dict())
            raise InputError(f"the configuration of {name} has no field {field!r}.{near}")
    config = transformers.AutoConfig.for_model(name, **wanted.settings)
    _check_memory(lambda: transformers.AutoModel.from_config(config), name, wanted)
    model: nn.Module = transformers.AutoModel.from_config(config)
    return model


BUILDERS: dict[str, Callable[[str, Wanted], nn.Module]] = {"timm": _build_timm, "transformers": _build_transformers}


def _check_memory(make: Callable[[], nn.Module], name: str, wanted: Wanted) -> None:
    """Raises InputError for a model that the memory does not hold: the machine would swap, or kill us."""
    free = free_memory()
    if free is None:
        return
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in make().parameters())
    size = 4 * numbers  # made in float32
    if size > SHARE * free:
        raise InputError(
            f"{name}: {numbers / 1e9:.1f} billion parameters take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB"
            " are free. Its layers are alike; make fewer: --set num_hidden_layers=2"
        )


def free_memory() -> int | None:
    """Bytes of memory that are free on this machine; None where it does not say."""
    if sys.platform == "win32" or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def inputs_of(library: str, model: nn.Module, wanted: Wanted) -> dict[str, Tensor]:
    """Random inputs of its forward, by name. Raises InputError for a model that takes others than are known here."""
    made = {"timm": _images, "transformers": _of_config}[library](model, wanted)
    return {
        name: tensor.to(wanted.device, wanted.dtype if tensor.is_floating_point() else None)
        for name, tensor in made.items()
    }


def _images(model: nn.Module, wanted: Wanted) -> dict[str, Tensor]:
    given: Any = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = given.get("input_size", (3, 224, 224))
    if wanted.size is not None:
        height = width = wanted.size
    return {"x": torch.randn(wanted.batch, channels, height, width)}


def _of_config(model: nn.Module, wanted: Wanted) -> dict[str, Tensor]:
    config: Any = model.config
    taken = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    made: dict[str, Tensor] = {}
    if main == "input_ids" or "input_ids" in taken:
        text = getattr(config, "text_config", None) or config
        seqlen = wanted.seqlen or min(SEQLEN, _size(text, "max_position_embeddings", SEQLEN))
        tokens = torch.randint(0, _size(text, "vocab_size", 1000), (wanted.batch, seqlen))
        made["input_ids"] = tokens
        made["attention_mask"] = torch.ones_like(tokens)
        if "decoder_input_ids" in taken:
            made["decoder_input_ids"] = tokens
    of_images = getattr(config, "vision_config", None) or config
    if main == "pixel_values" or ("pixel_values" in taken and hasattr(config, "vision_config")):
        size = wanted.size or _size(of_images, "image_size", 224)
        made["pixel_values"] = torch.randn(wanted.batch, _size(of_images, "num_channels", 3), size, size)
    elif main == "input_values":
        made["input_values"] = torch.randn(wanted.batch, 16000)  # a second of sound
    elif main == "input_features":
        length = 2 * _size(config, "max_source_positions", 1500)
        made["input_features"] = torch.randn(wanted.batch, _size(config, "num_mel_bins", 80), length)
        if "decoder_input_ids" in taken:
            made["decoder_input_ids"] = torch.randint(0, _size(config, "vocab_size", 1000), (wanted.batch, 4))
    if main not in made:
        raise InputError(f"inputs are made of tokens, images and sound; {type(model).__name__} takes {main!r}")
    return {name: tensor for name, tensor in made.items() if name in taken or "kwargs" in taken}


def _size(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return default if value is None else int(value)


def _told(settings: Mapping[str, Any]) -> str:
    return f"with {', '.join(f'{name}={value!r}' for name, value in settings.items())}" if settings else "as it is"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
