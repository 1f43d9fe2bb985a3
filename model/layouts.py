"""Other people's ConvMixer state dicts ↔ ours, so that weights published elsewhere load here and ours load there.

All layouts hold the same tensors in the same shapes; only the names differ. Sources: `paper` is the `nn.Sequential` of
the paper's appendix D and of locuslab/convmixer; `timm` is timm/models/convmixer.py; `labml` is the annotated
implementation of labml.ai (conv_mixer/__init__.py); `native` is `model.convmixer`.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from torch import Tensor

from model.convmixer import ConvMixerConfig

ForeignLayout = Literal["paper", "timm", "labml"]


class _Layout(NamedTuple):
    """Module names by role: `{i}` is the block's number, `{j}` = i + 3, `{last}` = depth + 5."""

    stem: tuple[str, str]  # convolution, norm
    block: tuple[str, str, str, str]  # depthwise, its norm, pointwise, its norm
    head: str
    block_number: re.Pattern[str]  # matches every key of a block


_LAYOUTS = {
    "native": _Layout(
        ("stem.conv", "stem.norm"),
        ("blocks.{i}.depthwise", "blocks.{i}.depthwise_norm", "blocks.{i}.pointwise", "blocks.{i}.pointwise_norm"),
        "head",
        re.compile(r"blocks\.(\d+)\."),
    ),
    "paper": _Layout(("0", "2"), ("{j}.0.fn.0", "{j}.0.fn.2", "{j}.1", "{j}.3"), "{last}", re.compile(r"(\d+)\.\d")),
    "timm": _Layout(
        ("stem.0", "stem.2"),
        ("blocks.{i}.0.fn.0", "blocks.{i}.0.fn.2", "blocks.{i}.1", "blocks.{i}.3"),
        "head",
        re.compile(r"blocks\.(\d+)\."),
    ),
    "labml": _Layout(
        ("patch_emb.conv", "patch_emb.norm"),
        (
            "conv_mixer_layers.{i}.depth_wise_conv",
            "conv_mixer_layers.{i}.norm1",
            "conv_mixer_layers.{i}.point_wise_conv",
            "conv_mixer_layers.{i}.norm2",
        ),
        "classification.linear",
        re.compile(r"conv_mixer_layers\.(\d+)\."),
    ),
}
_LINEAR = ("weight", "bias")
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def to_layout(state_dict: dict[str, Tensor], layout: ForeignLayout) -> dict[str, Tensor]:
    """Renames a native state dict into another layout; the tensors are shared, not copied.

    Raises:
        ValueError: the layout is unknown, or the state dict lacks a native key or has another one.
    """
    return _rename(state_dict, "native", layout)


def from_layout(state_dict: dict[str, Tensor], layout: ForeignLayout) -> dict[str, Tensor]:
    """Renames a state dict of another layout into the native one; the tensors are shared, not copied.

    Raises:
        ValueError: the layout is unknown, or the state dict lacks a key of it or has another one.
    """
    return _rename(state_dict, layout, "native")


def detect_layout(state_dict: dict[str, Tensor]) -> str:
    """`native`, `paper`, `timm` or `labml`, by the name of the patch embedding.

    Raises:
        ValueError: it is none of them.
    """
    for name, layout in _LAYOUTS.items():
        if f"{layout.stem[0]}.weight" in state_dict:
            return name
    raise ValueError(f"no ConvMixer layout has keys like {', '.join(list(state_dict)[:3]) or '(none)'}")


def infer_config(state_dict: dict[str, Tensor]) -> ConvMixerConfig:
    """The configuration of a native state dict, from the shapes of its tensors.

    Shapes do not tell an activation or a residual connection: both are taken to be the paper's. A network of others (the
    ConvMixer-768/32 that its authors released has ReLU) needs `dataclasses.replace` before it gives its own answers.

    Raises:
        ValueError: a key is missing or unexpected, or there is no block.
    """
    _rename(state_dict, "native", "native")
    h, in_channels, p, _ = state_dict["stem.conv.weight"].shape
    k = state_dict["blocks.0.depthwise.weight"].shape[-1]
    return ConvMixerConfig(h, _depth(state_dict, "native"), k, p, len(state_dict["head.bias"]), in_channels)


def _rename(state_dict: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    for name in (source, target):
        if name not in _LAYOUTS:
            raise ValueError(f"unknown layout {name!r}; known: {', '.join(_LAYOUTS)}")
    depth = _depth(state_dict, source)
    old, new = _keys(source, depth), _keys(target, depth)
    missing, unexpected = [k for k in old if k not in state_dict], sorted(set(state_dict) - set(old))
    if missing or unexpected or not depth:
        found = f"missing {', '.join(missing) or 'none'}; unexpected {', '.join(unexpected) or 'none'}"
        raise ValueError(f"not a state dict of the {source} layout with {depth} blocks: keys {found}")
    return {after: state_dict[before] for before, after in zip(old, new, strict=True)}


def _depth(state_dict: dict[str, Tensor], layout: str) -> int:
    matches = (_LAYOUTS[layout].block_number.match(key) for key in state_dict)
    return len({match[1] for match in matches if match})


def _keys(name: str, depth: int) -> list[str]:
    layout = _LAYOUTS[name]
    modules = [*layout.stem, *(part.format(i=i, j=i + 3) for i in range(depth) for part in layout.block)]
    keys = [f"{module}.{key}" for n, module in enumerate(modules) for key in (_NORM if n % 2 else _LINEAR)]
    return keys + [f"{layout.head.format(last=depth + 5)}.{key}" for key in _LINEAR]
