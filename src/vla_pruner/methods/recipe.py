"""A calibration recipe: what a search on recorded observations found for one model, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vla_pruner.methods.base import Method

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ModelStamp:
    """What tells the model of a recipe from others.

    Args:
        policy: name of the model's class.
        layers: decoder layers T.
        hidden: width d of the decoder.
        vocabulary: rows of its embedding.
        weights: twelve hexadecimal digits over a sample of the weights.
    """

    policy: str
    layers: int
    hidden: int
    vocabulary: int
    weights: str

    def __post_init__(self) -> None:
        for name in ("policy", "weights"):
            _require(name, getattr(self, name), str)
        for name in ("layers", "hidden", "vocabulary"):
            _require(name, getattr(self, name), int)

    def differs(self, other: ModelStamp, *, weights: bool = True) -> str | None:
        """The first difference, for people; None: the same model.

        Args:
            other: what the recipe is about to be used on.
            weights: False accepts other weights of the same architecture.
        """
        for name, mine in asdict(self).items():
            its = getattr(other, name)
            if its != mine and (weights or name != "weights"):
                what = {"policy": "class", "hidden": "hidden size"}.get(name, name)
                return f"{what} {mine} instead of {its}"
        return None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one method for one model, with where they come from.

    Args:
        method: name of the method that reads it.
        model: the model it was made for.
        values: what the method reads; each method says what that is.
        keep: budget that the search aimed at; None: it aimed at none.
        observations: how many there were, and from where.
        settings: options of the search.
        environment: versions, date, machine.

    Raises:
        ValueError: a field of the wrong type.
    """

    method: str
    model: ModelStamp
    values: Mapping[str, Any]
    keep: float | int | None = None
    observations: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require("method", self.method, str)
        _require("model", self.model, ModelStamp)
        if self.keep is not None:
            _require("keep", self.keep, (int, float))
        for name in ("values", "observations", "settings", "environment"):
            _require(name, getattr(self, name), Mapping)

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON; the folder is made if need be."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no recipe, or one of another format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no recipe {str(path)!r}; make one with `vla-pruner calibrate`."
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            _require("a recipe", found, dict)
            version = found.pop("format", None)
            if version != FORMAT:
                raise ValueError(f"it has format {version!r}, this version reads {FORMAT}")
            _refuse_keys(found, cls)
            _require("model", found["model"], dict)
            _refuse_keys(found["model"], ModelStamp)
            return cls(**{**found, "model": ModelStamp(**found["model"])})
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is no calibration recipe: {error}; make a new one with "
                "`vla-pruner calibrate`."
            ) from error


@dataclass(frozen=True, kw_only=True)
class CalibratedMethod(Method):
    """A method that needs a recipe, always or with some of its options.

    Args:
        recipe: path of a recipe, or a `Recipe`; None: the one that lies beside the model's weights,
            if there is one (`recipes/METHOD-KEEP.json` or `recipes/METHOD.json`).
        other_weights: accept a recipe made with other weights of the same architecture (another
            fine-tuning).

    Raises:
        FileNotFoundError, ValueError: no recipe there, or one of another method or budget.
    """

    recipe: Recipe | str | Path | None = None
    other_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.other_weights, bool):
            raise ValueError(f"`other_weights={self.other_weights!r}` must be True or False.")
        if self.recipe is None:
            return
        if isinstance(self.recipe, (str, Path)):
            object.__setattr__(self, "recipe", Recipe.load(self.recipe))
        if not isinstance(self.recipe, Recipe):
            raise ValueError(f"`recipe={self.recipe!r}` must be a path or a Recipe.")
        if self.recipe.method != self.name:
            raise ValueError(f"the recipe is for {self.recipe.method!r}, not for {self.name!r}.")
        if self.recipe.keep is not None and self.recipe.keep != self.keep:
            raise ValueError(
                f"the recipe was made for keep={self.recipe.keep} and `keep={self.keep}` is asked "
                f"for; pass keep={self.recipe.keep}, or make another recipe with "
                f"`vla-pruner calibrate {self.name} --keep {self.keep}`."
            )
        self.read(self.recipe)

    @property
    def wants_recipe(self) -> bool:
        """Whether a recipe is needed and was not given."""
        return self.recipe is None

    def read(self, recipe: Recipe) -> Any:
        """What the method takes from `recipe.values`.

        Raises:
            ValueError: values that make no sense.
        """
        raise NotImplementedError

    def given(self) -> Recipe:
        """The recipe.

        Raises:
            ValueError: there is none.
        """
        if isinstance(self.recipe, Recipe):
            return self.recipe
        raise ValueError(
            f"method {self.name!r} needs a calibration recipe for this model: run "
            f"`vla-pruner calibrate {self.name} --policy ... --keep {self.keep} --out recipe.json` "
            'and pass recipe="recipe.json".'
        )

    def check(self, config: Any, num_layers: int) -> None:
        """Refuse a decoder of other sizes than the recipe's (ValueError)."""
        super().check(config, num_layers)
        if self.wants_recipe:
            self.given()
        if not isinstance(self.recipe, Recipe):
            return
        model = self.recipe.model
        sizes = {
            "layers": (model.layers, num_layers),
            "hidden size": (model.hidden, getattr(config, "hidden_size", None)),
            "vocabulary": (model.vocabulary, getattr(config, "vocab_size", None)),
        }
        for name, (made_for, found) in sizes.items():
            if found is not None and found != made_for:
                self._refuse(f"{name} {made_for} instead of {found}")

    def check_model(self, stamp: ModelStamp) -> None:
        """Refuse a recipe that was made for another model than the stamped one (ValueError)."""
        if isinstance(self.recipe, Recipe):
            difference = self.recipe.model.differs(stamp, weights=not self.other_weights)
            if difference is not None:
                self._refuse(difference)

    def _refuse(self, difference: str) -> None:
        only_weights = difference.startswith("weights")
        raise ValueError(
            f"the recipe was made for another model ({difference}); calibrate this one with "
            f"`vla-pruner calibrate {self.name}`"
            + (", or pass other_weights=True to use it all the same." if only_weights else ".")
        )


def _require(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise ValueError(f"{name} must be {wanted}; got {type(value).__name__} {value!r}")


def _refuse_keys(found: dict[str, Any], kind: type[Recipe] | type[ModelStamp]) -> None:
    known = {one.name for one in fields(kind)}
    if unknown := sorted(set(found) - known):
        raise ValueError(f"unknown entries {', '.join(unknown)}")
    if missing := sorted(known - set(found)):
        raise ValueError(f"no entry {', '.join(missing)}")
