"""Whether a model sees its images and can be pruned faithfully: the checks of `doctor`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_pruner.core.hooks import implementation
from vla_pruner.core.layout import Adapter, Layout
from vla_pruner.core.session import Session
from vla_pruner.measure.costs import COSTS
from vla_pruner.methods import build
from vla_pruner.models.base import find_adapter
from vla_pruner.models.loading import locate
from vla_pruner.models.openvla import OpenVLA, OpenVLAOFTConfig
from vla_pruner.models.pi0 import Pi0
from vla_pruner.models.prune import prune

Act = Callable[[np.ndarray], Any]
"""Shows the model one uint8 frame [H, W, 3] in every camera and lets it act."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest accepted difference between dropping tokens and hiding them, relative to the outputs."""

ADAPTER_ADVICE = "see docs/adding-a-model.md, or describe it with vp.models.Decoder"


@dataclass(frozen=True)
class Finding:
    """One check: whether it is well (None: could not be checked), what was found, what to do."""

    check: str
    well: bool | None
    found: str
    advice: str = ""

    @property
    def cost(self) -> str:
        """What a mistake here costs."""
        return COSTS[self.check]


@dataclass(frozen=True)
class Look:
    """The decoder's pass over one frame: inputs and outputs [B, S, D], and where things are.

    `read`: `[B, R, D]` outputs of the first pass of the stack that reads its cache, if any.
    """

    inputs: Tensor
    outputs: Tensor
    layout: Layout
    read: Tensor | None = None

    @property
    def action(self) -> Tensor:
        """Outputs of the action queries, [B, R, D]."""
        if self.read is not None:
            return self.read
        return self.outputs[:, self.layout.action_rows or slice(-1, None)]


# -- looking at frames ---------------------------------------------------------------------------


def look(adapter: Adapter, act: Act, frame: np.ndarray, *, in_session: bool = False) -> Look | None:
    """Let the model act on a frame and note its first pass that shows visual tokens, if any.

    `in_session`: a session has attached the adapter.
    """
    seen: list[Look] = []
    read: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = kwargs.get("inputs_embeds", args[0] if args else None)
        if seen or inputs is None:
            return
        layout = adapter.layout(inputs, kwargs)
        if layout is not None:
            seen.append(Look(inputs.clone(), output[0].clone(), layout))

    def note_reader(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if seen and not read:
            read.append((output if isinstance(output, Tensor) else output[0]).clone())

    with ExitStack() as undo, torch.no_grad():
        if not in_session:
            adapter.attach(undo)
        undo.callback(adapter.decoder.register_forward_hook(note, with_kwargs=True).remove)
        if adapter.reader is not None:
            undo.callback(adapter.reader.register_forward_hook(note_reader).remove)
        act(frame)
    if not seen:
        return None
    return replace(seen[0], read=read[0]) if read else seen[0]


def act_of(model: nn.Module, name: str, instruction: str) -> Act:
    """How to show a frame to a loaded model."""
    if isinstance(model, OpenVLA):
        config = model.config
        proprio = None
        if isinstance(config, OpenVLAOFTConfig) and config.proprio_dim is not None:
            proprio = np.zeros(config.proprio_dim)
        key = next(iter(config.norm_stats), None)
        return lambda frame: model.predict_action(
            [frame] * config.num_images, instruction, proprio, unnorm_key=key
        )
    if isinstance(model, Pi0):
        cameras, state = model.config.num_images, np.zeros(model.config.proprio_dim)
        return lambda frame: model.predict_action([frame] * cameras, instruction, state)
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(locate(name), trust_remote_code=False)
    if getattr(processor, "chat_template", None):
        words = [{"type": "image"}, {"type": "text", "text": instruction}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": words}], add_generation_prompt=True
        )
    else:
        text = f"{getattr(processor, 'image_token', '<image>')} {instruction}"

    def act(frame: np.ndarray) -> Any:
        inputs = processor(text=text, images=[Image.fromarray(frame)], return_tensors="pt")
        return model(**inputs.to(model.device, model.dtype))

    return act


def check_budget(session: Session) -> None:
    """Refuse a budget that does not fit, of a policy that knows how many visual tokens it has.

    Raises:
        ValueError: it keeps more than there are, or shares them among other cameras.
    """
    views = getattr(getattr(session.model, "config", None), "views", None)
    if isinstance(views, tuple) and views:
        session.method.schedule(views, len(session.adapter.layers))


# -- the checks ----------------------------------------------------------------------------------


def examine(
    model: nn.Module,
    act: Act,
    *,
    adapter: Adapter | None = None,
    keep: float | int = 0.25,
    tick: Callable[[str], None] = lambda check: None,
) -> list[Finding]:
    """Check a model; stops early when later checks would mean nothing.

    Args:
        model: the model.
        act: lets it act on a frame.
        adapter: where things are in it; None: that of its family.
        keep: visual tokens kept where something is really dropped.
        tick: called with the name of each check when it begins.

    Returns:
        Findings in the order checked.
    """
    tick("model family")
    try:
        adapter = adapter or find_adapter(model)
        adapter.bind(model)
    except (TypeError, ValueError) as error:
        return [Finding("model family", False, str(error), ADAPTER_ADVICE)]
    findings = [Finding("model family", True, adapter.describe())]

    tick("visual tokens")
    black = np.zeros((224, 224, 3), np.uint8)
    white = np.full_like(black, 255)
    try:
        dark, bright = look(adapter, act, black), look(adapter, act, white)
    except (TypeError, ValueError, RuntimeError) as error:
        advice = "the model cannot act; mend this before anything else"
        return [*findings, Finding("acts on a frame", False, str(error), advice)]
    findings.append(_visual_tokens(dark, bright))
    if not findings[-1].well:
        blind = dark is None and bright is None
        return [*findings, *(_mended(model, adapter, act, white) if blind else [])]
    assert dark is not None and bright is not None
    findings.append(_image_reaches_action(dark, bright))

    kernels = _kernels(adapter)
    layer = max(adapter.earliest_cut, min(3, len(adapter.layers) - 1))
    options: dict[str, Any] = {"adapter": adapter, "layer": layer}
    try:
        tick("attention kernel")
        with prune(model, "vla-pruner", keep=1.0, window=1, **options):
            findings.append(_same_kernels(kernels, _kernels(adapter)))
            tick("keep=1.0")
            act(white)  # the one step that this session takes to warm up
            all_kept = look(adapter, act, white, in_session=True)
        findings.append(_exact("keep=1.0 changes nothing", bright, all_kept))

        tick("dropping equals hiding")
        findings.append(_dropping_equals_hiding(model, adapter, act, white, keep, options))
    except (TypeError, ValueError, RuntimeError) as error:
        advice = "this model or its attention cannot be pruned as it is loaded; see the message"
        return [*findings, Finding("can be pruned", False, str(error), advice)]

    tick("undone")
    findings.append(_exact("undone without a trace", bright, look(adapter, act, white)))
    return findings


def _visual_tokens(dark: Look | None, bright: Look | None) -> Finding:
    """The positions whose inputs follow the image are exactly those that the adapter names."""
    check = "visual tokens are where expected"
    if dark is None or bright is None:
        return Finding(
            check,
            False,
            "no pass of the decoder showed visual tokens",
            "the image never reaches the language model: often a prompt trimmed to one token "
            "because an empty cache was passed in; or the adapter looks in the wrong place",
        )
    if dark.inputs.shape != bright.inputs.shape:
        found = f"{dark.inputs.shape[1]} tokens for black, {bright.inputs.shape[1]} for white"
        return Finding(check, False, found, "pruning needs a fixed number of tokens per image")
    follow = (dark.inputs != bright.inputs).any(dim=2)[0].nonzero()[:, 0].tolist()
    named = dark.layout.visual[0].tolist()
    views = " + ".join(map(str, dark.layout.views))
    if follow == named:
        return Finding(check, True, f"{len(named)} ({views}) at {_spans(named)}")
    if not follow:
        advice = "the decoder's input ignores the frame: look at preprocessing and projector"
        return Finding(check, False, "black and white frames give the same input", advice)
    found = f"expected {len(named)} at {_spans(named)}; the image moves {_spans(follow)}"
    return Finding(check, False, found, f"correct Layout.visual: {ADAPTER_ADVICE}")


def _mended(model: nn.Module, adapter: Adapter, act: Act, frame: np.ndarray) -> list[Finding]:
    """Whether a session mends what hides the image (see `models/adapters/openvla.py`)."""
    with prune(model, "none", adapter=adapter) as session:
        act(frame)
        last = session.last
    if last is None:
        return []
    return [
        Finding(
            "visual tokens in a session",
            True,
            f"while vp.prune is attached, {last.visual_full} visual tokens are seen",
            "`generate` hands the model an empty cache, which it takes for a filled one; vp.prune "
            "mends that while attached. Without it the policy is blind: use the transformers "
            "version that it was made for, or vla_pruner.models.load",
        )
    ]


def _image_reaches_action(dark: Look, bright: Look) -> Finding:
    check = "the image reaches the action"
    change = _difference(dark.action, bright.action)
    found = f"black against white moves the action queries by {100 * change:.3g} %"
    if change > 0:
        return Finding(check, True, found)
    return Finding(
        check,
        False,
        found,
        "attention never looks at the image: check the attention mask and the cache of the prefill",
    )


def _same_kernels(before: list[str], during: list[str]) -> Finding:
    check = "same attention kernel when pruned"
    if before == during:
        return Finding(check, True, ", ".join(dict.fromkeys(before)))
    changed = [i for i, pair in enumerate(zip(before, during, strict=True)) if len({*pair}) > 1]
    found = f"layers {_spans(changed)} change from {before[changed[0]]} to {during[changed[0]]}"
    advice = "baseline and pruned run would differ by their kernels alone"
    return Finding(check, False, found, advice)


def _exact(check: str, expected: Look, got: Look | None) -> Finding:
    if got is not None and torch.equal(expected.outputs, got.outputs):
        return Finding(check, True, "equal to the last bit")
    found = "no visual tokens any more"
    if got is not None:
        found = f"outputs differ by {_difference(expected.outputs, got.outputs):.1e}"
    return Finding(
        check,
        False,
        found,
        "run twice without pruning: if that differs too, the model is not deterministic "
        "(dropout, sampling); if not, please report this",
    )


def _dropping_equals_hiding(
    model: nn.Module,
    adapter: Adapter,
    act: Act,
    frame: np.ndarray,
    keep: float | int,
    options: dict[str, Any],
) -> Finding:
    check = "dropping equals hiding"
    looks = []
    for mode in ("drop", "mask"):
        chosen = build("fastv", keep=keep, layer=options["layer"])
        with prune(model, chosen, adapter=adapter, mode=mode) as session:
            try:
                looks.append(look(adapter, act, frame, in_session=True))
            except NotImplementedError as error:
                return Finding(check, None, str(error))
            last = session.last
    assert last is not None
    dropped, hidden = looks
    if dropped is None or hidden is None:
        return Finding(check, False, "no visual tokens any more", "please report this")
    difference = _difference(hidden.action, dropped.action)
    limit = TOLERANCE.get(dropped.outputs.dtype, 1e-4)
    found = (
        f"{last.visual_kept} of {last.visual_full} visual tokens kept before layer "
        f"{options['layer']}; action queries differ by {difference:.1e}"
    )
    if difference <= limit:
        kind = str(dropped.outputs.dtype).removeprefix("torch.")
        return Finding(check, True, f"{found}, within rounding of {kind} (limit {limit:.0e})")
    advice = "positions or masks go wrong behind the cut on this model; please report this"
    return Finding(check, False, found + f" (limit {limit:.0e})", advice)


def _kernels(adapter: Adapter) -> list[str]:
    return [implementation(adapter.attention(layer)) for layer in adapter.layers]


def _difference(reference: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    reference, other = reference.float(), other.float()
    return float((reference - other).abs().max() / reference.abs().max().clamp_min(1e-12))


def _spans(positions: list[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    spans: list[list[int]] = []
    for position in positions:
        if spans and position == spans[-1][1] + 1:
            spans[-1][1] = position
        else:
            spans.append([position, position])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in spans[:6]]
    return ", ".join(shown) + (", ..." if len(spans) > 6 else "")
