"""Recipes: a method, its hyperparameters, and where each default comes from, in one YAML file."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from attnpatch import patch as registry
from attnpatch.errors import ConfigError, did_you_mean

_TEXT_OR_NONE = (str, type(None))
_TYPES: dict[str, tuple[type, ...]] = {
    "patch": (str,),
    "hyperparameters": (dict,),
    "description": (str,),
    "families": (list,),
    "sources": (dict,),
    "evidence": _TEXT_OR_NONE,
    "name": (str,),
}
_SCALARS = (str, int, float, bool, type(None))


@dataclass
class Recipe:
    """What to apply and why.

    patch: a method's name, or "a+b"; then hyperparameters holds one mapping per method: {"a": {...}, "b": {...}}.
    sources: hyperparameter -> where its value comes from. evidence: a file with the measurement, if there is one.
    """

    patch: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    families: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    evidence: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        where = f"recipe {self.name!r}" if self.name else "recipe"
        for f in fields(self):
            _check_type(where, f.name, getattr(self, f.name))
        if not self.patch.strip():
            raise ConfigError(f"{where}: 'patch' is empty; name a method (attnpatch list shows all).")
        if bad := [x for x in self.families if not isinstance(x, str)]:
            raise ConfigError(f"{where}: families holds {bad[0]!r}; give a list of model families such as llama.")
        if bad := [k for k, v in self.sources.items() if not (isinstance(k, str) and isinstance(v, str))]:
            raise ConfigError(f"{where}: sources[{bad[0]!r}] is not text; give one line of text.")

    @property
    def patches(self) -> list[str]:
        """The method names in `patch`."""
        return [part.strip() for part in self.patch.split("+")]

    def build(self) -> list[registry.Patch]:
        """One Patch object per method, every value checked. Raises ConfigError."""
        where = f"recipe {self.name!r}: " if self.name else ""
        try:
            built = [registry.build(registry.get_patch(n), values) for n, values in self._per_patch().items()]
            registry.compose(built)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
        self._check_sources(where, built)
        return built

    def _per_patch(self) -> dict[str, dict[str, Any]]:
        names = self.patches
        if len(set(names)) < len(names):
            raise ConfigError(f"patch {self.patch!r} names a method twice; name it once.")
        if len(names) == 1:
            return {names[0]: self.hyperparameters}
        if unknown := [k for k in self.hyperparameters if k not in names]:
            raise ConfigError(
                f"hyperparameters of {self.patch!r} are given per patch: {unknown[0]!r} is none of {', '.join(names)}."
            )
        values = {name: self.hyperparameters.get(name) or {} for name in names}
        if wrong := [n for n, v in values.items() if not isinstance(v, dict)]:
            raise ConfigError(f"hyperparameters of {wrong[0]!r} must be a mapping such as {{budget: 1024}}.")
        return values

    def _check_sources(self, where: str, built: list[registry.Patch]) -> None:
        known = {name for p in built for f in fields(p) for name in (f.name, f"{p.name}.{f.name}")}
        if unknown := [k for k in self.sources if k not in known]:
            allowed = ", ".join(sorted(k for k in known if "." not in k))
            raise ConfigError(f"{where}sources names {unknown[0]!r}, which is no hyperparameter; allowed: {allowed}.")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, in the order of the file."""
        values = asdict(self)
        return {"name": values.pop("name"), **values}

    def to_yaml(self) -> str:
        """The text of the recipe's file."""
        import yaml

        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True, width=116)

    def save(self, path: str | Path) -> Path:
        """Check the recipe and write it. Raises ConfigError before anything is written."""
        self.build()
        target = Path(path)
        target.write_text(self.to_yaml(), encoding="utf-8")
        return target


def _check_type(where: str, key: str, value: Any) -> None:
    expected = _TYPES[key]
    if not isinstance(value, expected):
        kinds = {"dict": "mapping", "list": "list", "str": "text", "NoneType": "null"}
        wanted = " or ".join(kinds[t.__name__] for t in expected)
        raise ConfigError(f"{where}: {key}={value!r} has the wrong type; expected {wanted}.")


def list_recipes() -> list[str]:
    """Names of the packaged recipes, sorted."""
    folder = resources.files("attnpatch.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A packaged recipe by name, or one from a .yaml file. Raises ConfigError naming what is allowed."""
    text, label, stem = _read(name_or_path)
    return parse_recipe(text, label, stem)


def _read(name_or_path: str | Path) -> tuple[str, str, str]:
    """(text, what to call it in messages, default name)."""
    given = str(name_or_path)
    if given in (known := list_recipes()):
        return (resources.files("attnpatch.recipes") / f"{given}.yaml").read_text(encoding="utf-8"), given, given
    path = Path(name_or_path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        hint = did_you_mean(given.lower(), known)
        raise ConfigError(
            f"unknown recipe {given!r}; packaged: {', '.join(known)}. Or give the path of a .yaml file.{hint}"
        )
    try:
        return path.read_text(encoding="utf-8"), given, path.stem
    except FileNotFoundError:
        raise ConfigError(f"no recipe file {given!r}; packaged recipes: {', '.join(known)}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {given!r} is not UTF-8 text; save it as UTF-8 YAML.") from None
    except OSError as error:
        raise ConfigError(
            f"recipe {given!r} cannot be read ({error.strerror}); check the path and its rights."
        ) from None


def parse_recipe(text: str, label: str, name: str = "") -> Recipe:
    """YAML text -> Recipe. `label` names it in messages."""
    import yaml

    try:
        data, twice = yaml.safe_load(text), _twice(yaml.compose(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise ConfigError(f"recipe {label!r} is not valid YAML{line} ({problem}); correct the file.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {label!r} is not a mapping; it needs at least a line 'patch: NAME'.")
    if unknown := sorted(str(k) for k in data if k not in _TYPES):
        raise ConfigError(f"recipe {label!r} has an unknown key {unknown[0]!r}; allowed: {', '.join(_TYPES)}.")
    if twice:
        raise ConfigError(f"recipe {label!r} gives {twice!r} twice; YAML would take the last, so give it once.")
    if "patch" not in data:
        raise ConfigError(f"recipe {label!r} lacks the key 'patch'; name a method (attnpatch list shows all).")
    if "name" not in data:
        data["name"] = name
    recipe = Recipe(**data)
    recipe.build()
    return recipe


def _twice(node: Any, around: tuple[int, ...] = ()) -> str | None:
    """A key that stands twice in one mapping of a YAML node, or None; around: ids of nodes that may hold themselves."""
    if not isinstance(node.value if node is not None else None, list) or id(node) in around:
        return None
    pairs = [x if isinstance(x, tuple) else (None, x) for x in node.value]  # of a mapping, or items of a list
    keys = [str(key.value) for key, _ in pairs if key is not None]
    own = (key for i, key in enumerate(keys) if key in keys[:i])
    return next(own, None) or next(filter(None, (_twice(value, (*around, id(node))) for _, value in pairs)), None)


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` -> (key, value read as a YAML scalar); the key may be `patch.key`."""
    import yaml

    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r} is not key=value; write for example --set budget=0.1.")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: the value is not a YAML scalar; put quotes around it.") from None
    if not isinstance(value, _SCALARS):
        raise ConfigError(
            f"--set {text!r}: the value must be a number, true, false or text; a list goes into a "
            "recipe, which attnpatch recipe new begins."
        )
    if isinstance(value, str) and not raw.strip().startswith(("'", '"')):
        with suppress(ValueError):  # text that is no number stays text
            value = float(value)  # YAML reads 1e-3 as text
    return key.strip(), value


def merge_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with `key=value` settings on top; its sources for changed keys are dropped."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in recipe.hyperparameters.items()}
    changed = set()
    for setting in settings:
        key, value = parse_setting(setting)
        patch, dot, short = key.rpartition(".")
        if dot and patch not in recipe.patches:
            raise ConfigError(f"--set {setting!r}: {patch!r} is none of the patches {', '.join(recipe.patches)}.")
        if not dot and len(recipe.patches) > 1:
            raise ConfigError(f"--set {setting!r}: say whose it is, for example {recipe.patches[0]}.{key}=...")
        target = values if len(recipe.patches) == 1 else values.setdefault(patch, {})
        target[short] = value
        changed |= {key, short}
    sources = {k: v for k, v in recipe.sources.items() if k not in changed}
    return Recipe(recipe.patch, values, recipe.description, recipe.families, sources, recipe.evidence, recipe.name)
