"""`vp.explain`: what a session hooked, what its last call did, and what each layer cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from vla_pruner.core.hooks import implementation
from vla_pruner.core.plan import Plan
from vla_pruner.core.report import StepReport
from vla_pruner.core.session import Session
from vla_pruner.pruning.flops import layered_prefill_flops


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printed, it is a line for each.

    Args:
        what: a sentence for each thing, by its name: method, model, cuts, layers, scores, history,
            attention, last call, tokens, cost.
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


def _runs(last: StepReport) -> str:
    """Layers that compute as many tokens, together."""
    told, layer = [], 0
    for count, group in groupby(last.tokens_per_layer):
        many = len(list(group))
        told.append(
            f"layers {layer} to {layer + many - 1}: {count}"
            if many > 1
            else f"layer {layer}: {count}"
        )
        layer += many
    return "; ".join(told)


def _cost(last: StepReport, session: Session) -> str:
    config: Any = getattr(session.decoder, "config", None)
    hidden, ffn = (getattr(config, name, None) for name in ("hidden_size", "intermediate_size"))
    if not isinstance(hidden, int) or not isinstance(ffn, int):
        return "cannot be told: the decoder's configuration gives no sizes"
    full = layered_prefill_flops(
        [last.tokens_full] * len(last.tokens_per_layer), hidden=hidden, ffn=ffn
    )
    made = layered_prefill_flops(last.tokens_per_layer, hidden=hidden, ffn=ffn)
    return f"{100 * made / full:.0f} % of the prefill's FLOPs by formula, scoring not counted"
