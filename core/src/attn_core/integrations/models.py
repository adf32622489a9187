"""build_model(): a model of timm or transformers by its name, with random weights, and inputs to run it on.

Nothing is downloaded for a name that a library knows by itself; for the name of a repository on a hub, its
configuration is, never its weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError, suggestion
from .missing import MissingPackageError, need

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The libraries whose models can be built, and the line that installs each.
FIXES = {"timm": 'pip install "timm>=1.0.31"', "transformers": 'pip install "transformers>=5.23"'}
SEED = 20261121
#: Of a sequence, where nothing is said, and where the model takes as many.
SEQLEN = 512


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A model in eval mode, on its device, and what to call it with; `host` is the library that it is of."""

    name: str
    host: str
    model: nn.Module
    inputs: Mapping[str, Tensor]  #: by the names of the model's arguments
    options: Mapping[str, Any] = field(default_factory=dict)  #: further arguments, that are no tensors

    def __call__(self) -> Any:
        """What the model gives for the inputs."""
        return self.model(**self.inputs, **self.options)

    @property
    def parameters(self) -> int:
        """How many numbers its parameters are."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def shapes(self) -> str:
        """The inputs in words, such as "pixel_values [1, 3, 224, 224]"."""
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.inputs.items())


def build_model(
    name: str,
    *,
    batch: int = 1,
    size: int | None = None,
    seqlen: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    settings: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    seed: int = SEED,
) -> BuiltModel:
    """The model of that name, with random weights, and random inputs; both follow from `seed`.

    Args:
        name: a model of timm (`vit_base_patch16_224`); a kind of model of transformers (`llama`), in the size that is
            the default of its configuration; a folder or file with such a configuration; or the name of a repository
            on the hub (`org/model`), from which its configuration is fetched. `timm/` or `transformers/` before the
            name says which library.
        batch: images or sequences.
        size: pixels of a side of an image; None: what the model is for.
        seqlen: tokens of a sequence; None: 512, or what the model takes at most.
        settings: for timm, arguments of the model (`{"depth": 2}`); for transformers, fields of its configuration.
        attn_implementation: of transformers; None: its default.

    Raises:
        InputError: a name that no library knows (with near names), a setting or size that the model does not take.
        MissingPackageError: the library is not installed; the message has the line to type.
    """
    if batch < 1:
        raise InputError(f"a batch has at least 1 entry, got {batch}")
    host, bare = _host_of(name)
    torch.manual_seed(seed)
    asked = _Asked(batch=batch, size=size, seqlen=seqlen, settings=dict(settings or {}), name=name)
    with _named(name):
        if host == "timm":
            model, inputs = _timm(bare, asked)
            options: dict[str, Any] = {}
        else:
            model, inputs, options = _transformers(bare, asked, dtype, attn_implementation)
        model = model.to(device=device, dtype=dtype).eval()
    inputs = {key: x.to(device, dtype if x.is_floating_point() else None) for key, x in inputs.items()}
    return BuiltModel(name=name, host=host, model=model, inputs=inputs, options=options)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    batch: int
    size: int | None
    seqlen: int | None
    settings: dict[str, Any]
    name: str


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What a library raises for a size or setting that its model does not take, as an error that names the model."""
    try:
        yield
    except (InputError, MissingPackageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's constructor raises
        raise InputError(f"{name} cannot be built like that: {type(error).__name__}: {error}") from error


def _host_of(name: str) -> tuple[str, str]:
    """(library, name there)."""
    prefix, _, rest = name.partition("/")
    if prefix in FIXES and rest:
        library(prefix)
        if not _knows(prefix, rest):
            raise InputError(f"{prefix} has no model {rest!r}.{suggestion(rest, names(prefix))}")
        return prefix, rest
    missing, known = [], []
    for host in FIXES:
        try:
            library(host)
        except MissingPackageError as error:
            missing.append(error)
            continue
        if _knows(host, name):
            return host, name
        known += names(host)
    if len(missing) == len(FIXES):
        lines = "\n".join(f"  {fix}" for fix in FIXES.values())
        raise MissingPackageError(f"{name}: neither timm nor transformers can be imported. To install one:\n{lines}")
    text = f"no model {name!r}.{suggestion(name, known)}"
    raise InputError("\n".join([text, *(f"It may be one of a library that is not here: {each}" for each in missing)]))


def library(host: str) -> Any:
    """The library, imported. Raises MissingPackageError, also where one that it needs does not fit this torch."""
    try:
        return need(host, f"a model of {host}", FIXES[host])
    except RuntimeError as error:  # torchvision of another torch: operators that it registers are not there
        raise MissingPackageError(
            f"{host} cannot be imported: {error}.\nA torchvision that fits this torch: pip install -U torch torchvision"
        ) from error


def names(host: str) -> list[str]:
    """The models that the library builds by name."""
    if host == "timm":
        return list(library(host).list_models())
    library(host)
    auto = need("transformers.models.auto.modeling_auto", "a model of transformers", FIXES["transformers"])
    return list(auto.MODEL_MAPPING_NAMES)


def _knows(host: str, name: str) -> bool:
    if host == "timm":
        return bool(library(host).is_model(name))
    if name in names(host) or Path(name).exists():
        return True
    return name.count("/") == 1 and not name.startswith(".")  # of the hub


# timm


def _timm(name: str, asked: _Asked) -> tuple[nn.Module, dict[str, Tensor]]:
    timm = library("timm")
    if asked.seqlen is not None:
        raise InputError(f"{asked.name} takes images: say how large by --size, not --seqlen")
    settings = dict(asked.settings)
    sized = {} if asked.size is None else {"img_size": asked.size}
    try:
        model = timm.create_model(name, pretrained=False, **sized, **settings)
    except TypeError as error:
        if not sized or "img_size" not in str(error):
            raise
        model = timm.create_model(name, pretrained=False, **settings)  # one that takes images of any size
    default = getattr(model, "pretrained_cfg", {}).get("input_size") or (3, 224, 224)
    channels = settings.get("in_chans", default[0])
    given = settings.get("img_size", default[1:])
    sides = (asked.size, asked.size) if asked.size is not None else (given, given) if isinstance(given, int) else given
    first = next(iter(inspect.signature(model.forward).parameters))
    return model, {first: torch.randn(asked.batch, channels, *sides)}


# transformers


def _transformers(
    name: str, asked: _Asked, dtype: torch.dtype, attn_implementation: str | None
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    transformers = library("transformers")
    config = _config(transformers, name, asked)
    for key, value in asked.settings.items():
        if key not in config.to_dict():
            raise InputError(
                f"--set {key}: the configuration of {asked.name} has no such field.{suggestion(key, config.to_dict())}"
            )
        setattr(config, key, value)
    vision = _vision(config)
    if asked.size is not None and hasattr(vision, "image_size"):
        vision.image_size = asked.size
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = transformers.AutoModel.from_config(config, dtype=dtype, **chosen)
    inputs = _inputs(model, config, asked)
    takes = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if hasattr(config, "use_cache") and "use_cache" in takes else {}
    return model, inputs, options


def _config(transformers: Any, name: str, asked: _Asked) -> Any:
    if name in names("transformers"):
        return transformers.AutoConfig.for_model(name)
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no model {asked.name!r}, and no configuration could be had from there: {first}"
            f"{suggestion(name, names('transformers'))}"
        ) from error


def _inputs(model: Any, config: Any, asked: _Asked) -> dict[str, Tensor]:
    """What the model takes: tokens, an image, or a spectrum."""
    batch, main = asked.batch, model.main_input_name
    if main != "pixel_values" and asked.size is not None:
        raise InputError(f"{asked.name} takes {main}, no images: say how long by --seqlen, not --size")
    if main == "pixel_values":
        if asked.seqlen is not None:
            raise InputError(f"{asked.name} takes images: say how large by --size, not --seqlen")
        return {main: torch.randn(batch, _channels(config), *_sides(config, asked))}
    if main == "input_ids":
        inputs = {main: _tokens(config, batch, _seqlen(config, asked))}
    elif main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions  # which Whisper's kind insists on
        inputs = {main: torch.randn(batch, config.num_mel_bins, frames)}
    else:
        raise InputError(
            f"{asked.name} takes {main}: inputs are made for models of tokens, images and Whisper's spectra"
        )
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _tokens(config, batch, _seqlen(config, asked))
    return inputs


def _tokens(config: Any, batch: int, seqlen: int) -> Tensor:
    """Tokens of the vocabulary, without those at its beginning, which often mean padding or an end."""
    vocabulary = config.get_text_config().vocab_size
    return torch.randint(min(10, vocabulary - 1), vocabulary, (batch, seqlen))


def _seqlen(config: Any, asked: _Asked) -> int:
    text = config.get_text_config()
    places = (getattr(text, key, None) for key in ("max_position_embeddings", "max_target_positions", "n_positions"))
    most = next((most for most in places if most), None)
    if asked.seqlen is None:
        return SEQLEN if most is None else min(SEQLEN, most)
    if asked.seqlen < 1 or (most is not None and asked.seqlen > most):
        most_text = "" if most is None else f" to {most}"
        raise InputError(f"{asked.name} takes sequences of 1{most_text} tokens, got {asked.seqlen}")
    return asked.seqlen


def _vision(config: Any) -> Any:
    """The part of the configuration that is about images."""
    return getattr(config, "vision_config", config)


def _channels(config: Any) -> int:
    return int(getattr(_vision(config), "num_channels", 3))


def _sides(config: Any, asked: _Asked) -> tuple[int, int]:
    given = asked.size if asked.size is not None else getattr(_vision(config), "image_size", 224)
    return (given, given) if isinstance(given, int) else tuple(given)
