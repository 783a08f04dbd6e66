"""Recipes: every packaged one fits its dataclass; every mistake names what is allowed."""

from __future__ import annotations

from dataclasses import fields

import pytest

from attnpatch.errors import ConfigError
from attnpatch.patch import get_patch
from attnpatch.recipe import Recipe, list_recipes, load_recipe, merge_settings, parse_setting


def test_the_packaged_recipes_are_there():
    assert {"snapkv", "streamingllm", "pyramidkv", "h2o", "random"} <= set(list_recipes())


@pytest.mark.parametrize("name", list_recipes())
def test_packaged_recipe_fits_its_dataclass(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and recipe.families
    (patch,) = recipe.build()
    assert isinstance(patch, get_patch(recipe.patch))
    assert set(recipe.hyperparameters) <= {f.name for f in fields(patch)}
    for key, value in recipe.hyperparameters.items():
        assert str(getattr(patch, key)) == str(value)
    assert set(recipe.sources) == set(recipe.hyperparameters), "every default states its source"


def test_snapkv_defaults():
    wanted = {"budget": 2048, "window_size": 32, "kernel_size": 7, "pooling": "maxpool", "gqa": "group_mean"}
    assert load_recipe("snapkv").hyperparameters == wanted


def test_save_and_load_again(tmp_path):
    recipe = load_recipe("snapkv")
    recipe.hyperparameters["budget"] = "512MiB"
    path = recipe.save(tmp_path / "mine.yaml")
    assert load_recipe(path) == recipe
    assert load_recipe(str(path)) == recipe


def test_name_defaults_to_the_file(tmp_path):
    (tmp_path / "short.yaml").write_text("patch: snapkv\n")
    assert load_recipe(tmp_path / "short.yaml").name == "short"


def test_save_writes_nothing_when_wrong(tmp_path):
    with pytest.raises(ConfigError, match="window_size='x' has the wrong type"):
        Recipe("snapkv", {"window_size": "x"}).save(tmp_path / "bad.yaml")
    assert not list(tmp_path.iterdir())


BAD = {
    "patch: snapkv\npatch: h2o\n": "gives 'patch' twice",
    "patch: snapkv\nhyperparameters: {budget: 64, window_size: 8, budget: 80}\n": "gives 'budget' twice",
    "patch: snapkv\nhyperparameters: &a {pooling: *a}\n": "pooling=.* has the wrong type",
    "patch: snapkv\ncolour: red\n": "unknown key 'colour'; allowed: patch, hyperparameters",
    "hyperparameters: {budget: 4}\n": "lacks the key 'patch'",
    "patch: snapvk\n": "unknown patch 'snapvk'. Did you mean 'snapkv'\\? Known patches: ",
    "patch: snapkv\nhyperparameters: {windowsize: 4}\n": "no hyperparameter 'windowsize'; allowed: budget",
    "patch: snapkv\nhyperparameters: {window_size: '4'}\n": "window_size='4' has the wrong type; expected int",
    "patch: snapkv\nhyperparameters: {budget: 0}\n": "budget 0 is out of range",
    "patch: snapkv\nhyperparameters: {budget: -5}\n": "budget -5 is out of range",
    "patch: snapkv\nhyperparameters: {pooling: sum}\n": "choose one of 'maxpool', 'avgpool'",
    "patch: snapkv\nhyperparameters: [1]\n": "hyperparameters=\\[1\\] has the wrong type; expected mapping",
    "patch: 5\n": "patch=5 has the wrong type; expected text",
    "patch: ''\n": "'patch' is empty",
    "patch: snapkv\nfamilies: [1]\n": "families holds 1",
    "patch: snapkv\nsources: {budgte: paper}\n": "sources names 'budgte', which is no hyperparameter; allowed: ",
    "patch: snapkv\nsources: {budget: 3}\n": "sources\\['budget'\\] is not text",
    "patch: snapkv+snapkv\n": "names a method twice",
    "patch: snapkv+random\nhyperparameters: {budget: 5}\n": "given per patch: 'budget' is none of snapkv, random",
    "patch: snapkv+random\n": "both decide what the cache keeps",
    "patch: [unclosed\n": "is not valid YAML at line 2",
    "just text\n": "is not a mapping",
    "": "is not a mapping",
}


@pytest.mark.parametrize(("text", "message"), BAD.items())
def test_bad_recipe_names_the_remedy(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_missing_binary_and_unknown_recipes(tmp_path):
    with pytest.raises(ConfigError, match="unknown recipe 'snap'; packaged: .*snapkv"):
        load_recipe("snap")
    with pytest.raises(ConfigError, match="no recipe file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "control.yaml").write_bytes(b"patch: \x01\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path / "control.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "folder.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=1e-3", 1e-3),
        ("a=true", True),
        ("a=512MiB", "512MiB"),
        ("a='1'", "1"),
        ("a=", None),
    ],
)
def test_settings_are_yaml_scalars(text, expected):
    key, value = parse_setting(text)
    assert (key, value, type(value)) == ("a", expected, type(expected))


@pytest.mark.parametrize(
    ("text", "message"), [("a", "is not key=value"), ("a=[1]", "a list goes into a recipe"), ("=1", "key=value")]
)
def test_bad_settings(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_setting(text)


def test_settings_on_top_of_a_recipe():
    base = load_recipe("snapkv")
    merged = merge_settings(base, ["budget=0.1", "snapkv.window_size=16"])
    (patch,) = merged.build()
    assert str(patch.budget) == "0.1" and patch.window_size == 16
    assert "budget" not in merged.sources and "window_size" not in merged.sources and "pooling" in merged.sources
    assert base.hyperparameters["budget"] == 2048, "the recipe itself is unchanged"
    with pytest.raises(ConfigError, match="say whose it is, for example a.budget"):
        merge_settings(Recipe("a+b"), ["budget=1"])
    with pytest.raises(ConfigError, match="'h2o' is none of the patches snapkv"):
        merge_settings(base, ["h2o.budget=1"])


def test_two_patches_take_nested_values():
    merged = merge_settings(Recipe("a+b"), ["a.x=1", "b.y=2"])
    assert merged._per_patch() == {"a": {"x": 1}, "b": {"y": 2}}
