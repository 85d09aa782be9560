"""Sentences of what a session refuses: what was wrong, what was expected, what to do.

Each function makes the exception that its caller raises, so that a step reads without them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner._flags import refuse
from vla_pruner._short import short

if TYPE_CHECKING:
    from vla_pruner.core.layout import Layout

# -- calls ---------------------------------------------------------------------------------------


def second_thread(owner: threading.Thread, other: threading.Thread) -> RuntimeError:
    return RuntimeError(
        f"this pruned model is being called by thread {owner.name!r} and now by {other.name!r}; a "
        "session follows one call at a time. Put a lock around the calls, or give each thread its "
        "own model and session."
    )


def outside_the_blocks(ids: Sequence[Any]) -> RuntimeError:
    names = ", ".join(short(one) for rows in ids for one in rows or ())
    return RuntimeError(
        f"the blocks of several episodes are open ({names}), and this call comes from a thread or "
        "task that is in none of them. Open one there: `with session.episode(name):`."
    )


def still_running(owner: threading.Thread) -> RuntimeError:
    return RuntimeError(
        f"thread {owner.name!r} is inside a call of this model, whose cache and masks go by what "
        "was cut; remove the session when the call has come back."
    )


def past_hooks(module: nn.Module) -> RuntimeError:
    name = type(module).__name__
    return RuntimeError(
        f"`forward` of this {name} was called by itself, past the hooks that pruning stands on; "
        "call the module (`model(...)`, not `model.forward(...)`). Where that call is not yours, "
        "vla_pruner.models.adapters.patching.run_hooks_on_forward(module, undo) mends it."
    )


def refuse_past_hooks(model: nn.Module | None) -> None:
    """Refuse a `forward` of the model that is running although no call of the model has begun."""
    frame = inspect.currentframe()
    while model is not None and frame is not None:
        running = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if running is model:
            raise past_hooks(running)
        frame = frame.f_back


def no_inputs(stack: nn.Module, names: Sequence[str]) -> NotImplementedError:
    return NotImplementedError(
        f"{type(stack).__name__} was called without any of {', '.join(names)}; pruning has to see "
        "what goes into the decoder. See docs/adding-a-model.md."
    )


def no_values() -> NotImplementedError:
    return NotImplementedError(
        "a traced or exported graph would keep the same tokens of every image, and inside "
        "`torch.vmap` or on the meta device nobody can look at values: pruning decides anew in "
        "each call. Trace the model without a session, use `session.compile()`, give the rows as a "
        'batch, or load the weights first (`model.to_empty(device="cpu")`).'
    )


def guesses(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"`{name}`: guessing tokens ahead takes some back from the cache, which pruning does not "
        "follow; generate without it."
    )


def packs(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"`{name}` packs the prompts of several calls into one row, which pruning does not follow; "
        "use `generate`, with a batch if need be."
    )


def chunked_prefill() -> NotImplementedError:
    return NotImplementedError(
        "`prefill_chunk_size`: an image that is split over several passes cannot be pruned as a "
        "whole; generate without it (what pruning leaves needs less memory, too)."
    )


def checkpointing() -> NotImplementedError:
    return NotImplementedError(
        "gradient checkpointing runs layers twice, which pruning does not follow; call "
        "`model.gradient_checkpointing_disable()` or `model.eval()`."
    )


def other_rows(named: int, batch: int) -> ValueError:
    return ValueError(f"`session.episodes` named {named} rows, but this batch has {batch}.")


# -- caches --------------------------------------------------------------------------------------


def other_batch(filled: int, batch: int) -> ValueError:
    return ValueError(
        f"this cache was filled by {filled} rows and is continued with {batch}; batches cannot "
        "change between prefill and decode while pruning."
    )


def other_session() -> RuntimeError:
    return RuntimeError(
        "this cache was filled and pruned in another session; continue it while that one is "
        "attached, or prefill it again."
    )


def uneven_cache() -> RuntimeError:
    return RuntimeError(
        "this cache holds fewer tokens in some layers than in others and does not say why: it is a "
        "copy, made by hand, of one that was pruned, or was in no output of the decoder. Copy "
        "caches with `copy.deepcopy(cache)`, or prefill again with one of your own "
        "(`past_key_values=DynamicCache()`)."
    )


def unshown_cache(decoder: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"{type(decoder).__name__} goes on from keys and values of a prompt with an image, and "
        "neither its arguments nor its output showed where that prompt left them, so that nobody "
        "knows what was pruned there. Give the prompt a cache of your own "
        "(`past_key_values=DynamicCache()`), and the same one to what follows."
    )


def unknown_cache(cache: Any) -> NotImplementedError:
    return NotImplementedError(
        f"`past_key_values` is a {type(cache).__name__} that does not say how many tokens it holds "
        "(`get_seq_length`), nor carry a note of what was pruned; use a cache of transformers "
        "(`DynamicCache`), or one built like it."
    )


def changed_cache(past: int) -> RuntimeError:
    return RuntimeError(
        f"this cache now holds {past} tokens, which is not what its prefill and the tokens after "
        "it left there; it was cropped or rebuilt, which pruning does not follow. Prefill it again."
    )


def other_order() -> RuntimeError:
    return RuntimeError(
        "the rows of this cache stand in another order than their prefill left them, and belong to "
        "different episodes, of which different tokens were kept; pruning does not follow that. "
        "Keep the order (beams of one episode may be exchanged), or prefill again."
    )


def beyond_window(seen: int, window: int) -> NotImplementedError:
    return NotImplementedError(
        f"this pass reaches {seen} tokens, and layers behind the cut look back on a sliding window "
        f"of {window}, which removed tokens would shift. Keep prompt and answer within {window} "
        "tokens, or use a model without sliding windows."
    )


# -- prefills ------------------------------------------------------------------------------------


def refuse_split_image(one: Layout, other: Layout) -> None:
    """Refuse an image that ends one pass, at its end, and begins the next."""
    if one.visual.shape[1] - 1 in one.read and bool((other.visual[:, 0] == 0).any()):
        raise NotImplementedError(
            "an image began in one pass and goes on in the next; an image that is split over "
            "several passes cannot be pruned as a whole. Give the prompt at once."
        )


def refuse_second_image(hides: bool, cut: int, method: str) -> None:
    """Refuse a second image in a cache whose first one was pruned, where that cannot be."""
    if hides:
        raise NotImplementedError(
            'a second image in a cache whose first one was pruned needs `mode="drop"` and episodes '
            "that are all at the same step; use one cache per episode, or begin anew."
        )
    if cut == 0:
        raise NotImplementedError(
            f"method {method!r} cuts before layer 0, where a second image in the same cache is not "
            "supported; use `layer` >= 1, or give the whole prompt at once."
        )


def masks_of_kinds(decoder: nn.Module, cut: int) -> NotImplementedError:
    return NotImplementedError(
        f"{type(decoder).__name__} has layers of several kinds, and the mask of a kind is sized by "
        f"its first layer, which lies behind the cut before layer {cut}; with a cache the masks "
        "would not fit. Cut later (`layer`), or run without a cache."
    )


def no_text(method: str, adapter: Any) -> ValueError:
    return ValueError(
        f"method {method!r} needs to know which tokens are the instruction, and "
        f"{type(adapter).__name__} does not say, or there is none; set `Layout.text_rows` in the "
        "adapter, or use another method."
    )


def impossible_schedule(
    method: str, counts: Sequence[int], cuts: Sequence[int], visual: int
) -> ValueError:
    return ValueError(
        f"method {method!r} plans to leave {counts} tokens after its cuts before layers {cuts}; "
        "expected one number for each, none larger than the one before or than the "
        f"{visual} visual tokens."
    )


def other_cameras(name: Any, had: int, visual: int) -> ValueError:
    return ValueError(
        f"episode {name!r} had {had} visual tokens and now has {visual}; call `session.reset()` "
        "when the cameras change."
    )


def no_motion(method: str, name: Any) -> ValueError:
    return ValueError(
        f"method {method!r} decides by the robot's motion, and none was reported for episode "
        f"{name!r}; call `session.motion(distance)` after each step, or use another method."
    )


# -- layers --------------------------------------------------------------------------------------


def flex_attention() -> NotImplementedError:
    return NotImplementedError(
        "flex_attention keeps its masks in blocks, which pruning cannot shorten; load the model "
        'with attn_implementation="sdpa" or "eager".'
    )


def refuse_replaced(began: Sequence[nn.Module], now: Sequence[nn.Module]) -> None:
    """Refuse layers that others stand for now, unless these hold them."""
    for number, (mine, other) in enumerate(zip_longest(began, now)):
        if mine is None or other is None:
            raise RuntimeError(
                f"the decoder had {len(began)} layers when the session began and has {len(now)}; "
                "change the model first, and attach vla-pruner last."
            )
        if not any(module is mine for module in other.modules()):
            raise RuntimeError(
                f"the hooks of decoder layer {number} did not run and would not: something has "
                "replaced the layer since the session began. Attach vla-pruner last."
            )


def other_kernel(began: str | None, now: str | None) -> RuntimeError:
    return RuntimeError(
        f"the attention was {began!r} when the session began and is {now!r}, so that masks are "
        "made for another kernel than runs; call `set_attn_implementation` first, and attach "
        "vla-pruner last."
    )


def ran_twice(index: int, decoder: nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"layer {index} of {type(decoder).__name__} ran more than once in one pass, or behind a "
        "later one, and would meet rows that a cut has taken out; pruning needs a decoder that "
        "runs each layer once, in the order of its list."
    )


def ran_again(decoder: nn.Module, length: int) -> NotImplementedError:
    return NotImplementedError(
        f"{type(decoder).__name__} ran more than once over {length} rows in one call of the model. "
        "If that is one stack whose output goes in again (recurrent depth), the rows that were cut "
        "are missing there: such a model cannot be pruned. If these are several prompts, call the "
        "model once for each, or give them as a batch; if they are one step of a policy that reads "
        "its prompt anew (denoising), call it inside of `with session.step():`."
    )


def refuse_other_image(decoder: nn.Module, shown: Tensor, now: Tensor) -> None:
    """Refuse visual tokens `[B, M, ...]` of a step that are others than its first prefill brought.

    One vector added to all of them, such as a time's, is all right: no row that was cut is read.
    """
    broken = torch.tensor(shown.shape != now.shape, dtype=torch.bool)
    if shown.shape == now.shape and now.is_floating_point():
        moved = now.float() - shown.float()
        nearly = max(1e-3, 8 * torch.finfo(now.dtype).eps) * shown.float().abs().max()
        broken = (moved - moved[:, :1]).abs().max() > nearly
    refuse(
        broken,
        f"inside of `session.step()` {type(decoder).__name__} ran over other visual tokens than "
        "those of the first prefill, by which the step was decided. If its output went in again "
        "(recurrent depth), the rows that were cut are missing there: such a model cannot be "
        "pruned. If it is another image, give each a step of its own.",
    )


def behind_the_decoder(layer: nn.Module, rows: int) -> NotImplementedError:
    return NotImplementedError(
        f"a {type(layer).__name__} that is none of the decoder's layers reads all {rows} rows of a "
        "prompt behind the decoder, where rows that were cut are zeros; pruning needs a decoder "
        "whose output at other rows than those kept nobody reads. If that layer belongs to the "
        "decoder, name all layers in the order in which they run (`layers`)."
    )


def written_elsewhere(decoder: nn.Module, past: int, rows: int, holds: int) -> NotImplementedError:
    return NotImplementedError(
        f"the first layer of this cache held {past} tokens before {type(decoder).__name__} ran "
        f"over {rows} rows, and holds {holds} now, not {past + rows}: other layers than those of "
        "the decoder write there, or they run several times with a place for each. Name all layers "
        "of the model that share the cache, each of which runs once (`layers`), or run without a "
        "cache."
    )


def refuse_shared(modules: Sequence[nn.Module], what: str, which: Iterable[int]) -> None:
    """Refuse modules, `which` of the list, that stand in it more than once."""
    for index in which:
        places = [i for i, module in enumerate(modules) if module is modules[index]]
        if len(places) > 1:
            raise NotImplementedError(
                f"{what} {', '.join(map(str, places))} are one module, which runs several times in "
                "a pass, so that nobody can tell where tokens are cut and what was seen where; "
                "pruning needs layers that are modules of their own, each run once."
            )


def unhooked(cut: int) -> RuntimeError:
    return RuntimeError(
        f"the hooks of decoder layer {cut} did not run, so that nothing was cut: something has "
        "replaced the layer since the session began, or runs a compiled copy. Attach vla-pruner "
        "last."
    )


def unwatched(missing: int, expected: int, attention: nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"{missing} of the {expected} layers whose action attention is watched "
        f"({type(attention).__name__}) ran without showing it; use a decoder whose attention is "
        "chosen by `config._attn_implementation`, or a method without action scores. If something "
        "has replaced the layers since, attach vla-pruner last."
    )


def unseen(index: int, attention: nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"the attention of layer {index} ({type(attention).__name__}) ran without showing its "
        "queries and keys, so that its score is missing; use a decoder whose attention is chosen "
        "by `config._attn_implementation`, or a method without scores (divprune, random). If "
        "something has replaced the layer since, attach vla-pruner last."
    )


def unknown_attention(attention: nn.Module, name: str, value: Any) -> NotImplementedError:
    return NotImplementedError(
        f"{type(attention).__name__} gives its attention function `{name}` {tuple(value.shape)}, "
        "and what that does to the attention is unknown, so that it cannot be scored; use a method "
        "without scores (divprune, random)."
    )


def unknown_argument(kind: str, name: str, shape: Any) -> NotImplementedError:
    return NotImplementedError(
        f"decoder layers ({kind}) get `{name}` {shape}, one entry per token, and it is unknown how "
        'to shorten it; use `mode="mask"`, or open an issue with the model.'
    )


def unnamed_arguments(kind: str, given: int, named: int) -> NotImplementedError:
    return NotImplementedError(
        f"{kind} is called with {given} positional arguments, and its `forward` names {named}; "
        "pruning has to know which is the mask and which the cache. Give the layer's `forward` "
        "named parameters."
    )


def no_hidden_states(kind: str, first: str) -> NotImplementedError:
    return NotImplementedError(
        f"{kind} is not called with hidden states [B, S, D] first (`{first}`); pruning takes rows "
        "out of them. See docs/adding-a-model.md for what a decoder has to hand its layers."
    )


def other_length(layer: nn.Module, shape: Any, length: int) -> NotImplementedError:
    return NotImplementedError(
        f"{type(layer).__name__} is not called with hidden states [B, S, D] first, but with "
        f"{tuple(shape)} where the decoder got {length} tokens; pruning takes rows out of them. "
        "See docs/adding-a-model.md for what a decoder has to hand its layers."
    )


def several_outputs(layer: nn.Module, count: int) -> NotImplementedError:
    return NotImplementedError(
        f"{type(layer).__name__} returns {count} things, which a skipped layer cannot make up; use "
        "a method that skips none, or newer transformers."
    )


def no_mask_to_hide_in() -> NotImplementedError:
    return NotImplementedError(
        'hiding tokens (mode="mask", or a batch in which some episodes run on all tokens) needs '
        'attn_implementation="sdpa" or "eager".'
    )


def no_rotary_tables() -> NotImplementedError:
    return NotImplementedError(
        'decoder layers get no rotary tables [B, S, D], which positions="compact" has to renumber; '
        'use positions="keep".'
    )


def no_position_ids() -> NotImplementedError:
    return NotImplementedError(
        'decoder layers get no `position_ids`, which positions="compact" has to renumber; use '
        'positions="keep".'
    )


# -- choices -------------------------------------------------------------------------------------


def wrong_choice(method: str, shape: Any, number: int, expected: Any) -> ValueError:
    return ValueError(
        f"method {method!r} chose {tuple(shape)} at cut {number}; expected [B, k] = {expected}."
    )


def refuse_unordered(method: str, kept: Tensor, number: int, size: int) -> None:
    """Refuse a choice `[B, k]` that is not ascending in 0..size-1: rows would come twice."""
    what = f"method {method!r} chose, at cut {number},"
    wanted = f"expected int64, each number of 0..{size - 1} at most once, ascending (`.sort()`)."
    if kept.dtype != torch.int64:
        raise ValueError(f"{what} tokens as {kept.dtype}; {wanted}")
    broken = (kept < 0).any() | (kept >= size).any() | (kept[:, 1:] <= kept[:, :-1]).any()
    refuse(broken, f"{what} tokens out of order or of range, or one twice; {wanted}")


def wrong_merge(method: str, shape: Any, number: int, expected: Any) -> ValueError:
    return ValueError(
        f"method {method!r} gave merge {tuple(shape)} at cut {number}; expected [B, k, m] = "
        f"{expected}."
    )


def read_under_views(method: str) -> NotImplementedError:
    return NotImplementedError(
        f"method {method!r} cuts several times with a budget per view, and a visual token that the "
        "caller reads stays beside it, so that the shares do not come out; use "
        'budget="global" for prompts that end with the image or have labels behind it.'
    )
