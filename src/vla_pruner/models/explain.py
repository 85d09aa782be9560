"""`vp.explain`: what a session hooked and refused, what its last call did, and what that cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby
from typing import Any

from torch import nn

from vla_pruner.core.hooks import OBSERVER, Hook, implementation
from vla_pruner.core.plan import Plan
from vla_pruner.core.report import StepReport
from vla_pruner.core.session import Session
from vla_pruner.pruning.flops import layered_prefill_flops


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printed, it is a line for each.

    Args:
        what: a sentence for each thing, by its name: method, model, cuts, scores, history,
            attention, hooked, refused, last call, tokens, cost.
    """

    what: Mapping[str, str]

    def __str__(self) -> str:
        wide = max(map(len, self.what))
        return "\n".join(f"{name:{wide}}  {said}" for name, said in self.what.items())


def explain(session: Session) -> Explanation:
    """Say what a session does to its model, in words.

        with vp.prune(policy, "vla-pruner", keep=0.25) as session:
            policy.predict_action(...)
            print(vp.explain(session))

    Args:
        session: made by `vp.prune`. After a call the explanation also says what that call did.

    Raises:
        TypeError: something else was given.
    """
    if not isinstance(session, Session):
        raise TypeError(f"`session` must be what `vp.prune` returned; got {type(session).__name__}")
    plan, method, adapter = session._cut.plan, session.method, session.adapter
    options = ", ".join(f"{f.name}={getattr(method, f.name)}" for f in fields(method) if f.init)
    state = "" if session.attached else " (removed: the model is what it was)"
    said = {
        "method": f"{method.name}: {options}",
        "model": adapter.describe() + state,
        "cuts": _cuts(plan, session.mode),
        "scores": _scores(plan),
        "history": _history(plan, session),
        "attention": _kernels(session),
        "hooked": _hooked(session),
        "refused": session._passes.calls.failed or "no call",
    }
    last = session.last
    if last is None:
        return Explanation(said | {"last call": "none with an image yet"})
    said["last call"] = str(last)
    if last.left_alone is None and last.tokens_per_layer:
        said |= {"tokens": _runs(last), "cost": _cost(last, session)}
    return Explanation(said)


def _cuts(plan: Plan, mode: str) -> str:
    if not plan.cuts:
        return "none: every layer sees every token"
    where = ", ".join(map(str, plan.cuts))
    what = "leave" if mode == "drop" else "are hidden, not removed,"
    left_out = f"; layers {sorted(plan.skipped)} do not run" if plan.skipped else ""
    return f"tokens {what} before layer {where} of {plan.depth}{left_out}"


def _scores(plan: Plan) -> str:
    read = [f"{r.spec.rows} rows of layer {r.spec.layer} ({r.spec.kind})" for r in plan.readings]
    return ", ".join(read) or "none"


def _history(plan: Plan, session: Session) -> str:
    spec = session.method.history
    if spec is None or not plan.action_layers:
        return "none: every call stands alone"
    first, last = plan.action_layers[0], plan.action_layers[-1]
    stack = "decoder" if session.adapter.reader is None else "action expert"
    return f"{spec.kind}: action attention of layers {first} to {last} of the {stack}"


def _kernels(session: Session) -> str:
    try:
        names = {
            implementation(session.adapter.attention(layer)) for layer in session.adapter.layers
        }
    except (TypeError, AttributeError, NotImplementedError) as error:
        return f"cannot be told: {error}"
    return ", ".join(sorted(names)) + "; the same as without a session"


def _hooked(session: Session) -> str:
    """Modules that carry hooks of this package, by class, and methods that it stands before."""
    kinds: Counter[str] = Counter()
    methods = []
    for module in _modules(session):
        tables = (module._forward_pre_hooks, module._forward_hooks)
        ours = any(isinstance(one, Hook) for table in tables for one in table.values())
        if ours or hasattr(module, OBSERVER):
            kinds[type(module).__name__] += 1
        own = [name for name, value in vars(module).items() if isinstance(value, Hook)]
        methods += [f"{type(module).__name__}.{name}" for name in own if not name.startswith("_")]
    told = [name if count == 1 else f"{count} {name}" for name, count in kinds.items()]
    return ", ".join([*told, *dict.fromkeys(methods)]) or "nothing"


def _modules(session: Session) -> list[nn.Module]:
    roots = (session.model, session.decoder, session.adapter.reader)
    found = {id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}
    return list(found.values())


def _groups(counts: Sequence[int]) -> list[tuple[str, int, int]]:
    """Layers that compute as many tokens, together: in words, how many, tokens."""
    told, layer = [], 0
    for count, group in groupby(counts):
        many = len(list(group))
        words = f"layers {layer} to {layer + many - 1}" if many > 1 else f"layer {layer}"
        told.append((words, many, count))
        layer += many
    return told


def _runs(last: StepReport) -> str:
    return "; ".join(f"{words}: {count}" for words, _, count in _groups(last.tokens_per_layer))


def _cost(last: StepReport, session: Session) -> str:
    config: Any = getattr(session.decoder, "config", None)
    hidden, ffn = (getattr(config, name, None) for name in ("hidden_size", "intermediate_size"))
    if not isinstance(hidden, int) or not isinstance(ffn, int):
        return "cannot be told: the decoder's configuration gives no sizes"
    flops = partial(layered_prefill_flops, hidden=hidden, ffn=ffn)
    full = flops([last.tokens_full] * len(last.tokens_per_layer))
    parts = [
        (words, flops([count] * many)) for words, many, count in _groups(last.tokens_per_layer)
    ]
    if (scores := _score_macs(last, session, hidden)) and not bool(last.warm_up.all()):
        parts.append(("reading scores, at most", scores))
    total = sum(cost for _, cost in parts)
    each = ", ".join(f"{words} {100 * cost / full:.1f} %" for words, cost in parts)
    return (
        f"{100 * total / full:.0f} % of the prefill's FLOPs by formula: {each}; choosing by them "
        "is not counted (`vla-pruner bench` times it)"
    )


def _score_macs(last: StepReport, session: Session, hidden: int) -> int:
    """Products of queries and keys of visual tokens, over the rows that may vote."""
    plan, latest = session._cut.plan, session._passes.latest
    acting = 1 if latest is None else latest.prefill.acting
    rows = {"last": 1, "action": acting}
    macs = sum(rows.get(r.spec.rows, last.tokens_full) * last.visual_full for r in plan.readings)
    if session.adapter.reader is None:
        macs += len(plan.action_layers) * acting * last.visual_kept
    return macs * hidden
