"""Profiles: what is written is read, and a profile of another model, kind or version is refused."""

import json

import pytest
import torch
from transformers import LlamaConfig

from attnpatch.errors import ConfigError
from attnpatch.profile import Profile, structure

CONFIG = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)


def made(folder, kind="retrieval-heads", config=CONFIG):
    score = torch.rand(config.num_hidden_layers, config.num_attention_heads)
    return Profile(kind, {"score": score}, structure(config), {"seed": 3}).save(folder), score


def test_round_trip(tmp_path):
    folder, score = made(tmp_path / "p")
    read = Profile.load(folder, "retrieval-heads")
    assert torch.equal(read.tensors["score"], score) and read.about == {"seed": 3}
    read.check(CONFIG)


def test_another_model_is_refused(tmp_path):
    folder, _ = made(tmp_path / "p")
    other = LlamaConfig(**{**CONFIG.to_dict(), "num_key_value_heads": 4})
    with pytest.raises(ConfigError, match="kv_heads 2 instead of 4"):
        Profile.load(folder, "retrieval-heads").check(other)


def test_missing_layers_are_refused():
    with pytest.raises(ConfigError, match="'score' holds 2 layers, the model has 3"):
        Profile("sinks", {"score": torch.zeros(2, 4)}, structure(CONFIG)).check(CONFIG)


def test_wrong_kind_version_and_damage(tmp_path):
    folder, _ = made(tmp_path / "p")
    with pytest.raises(ConfigError, match="of kind 'retrieval-heads', but 'sinks'"):
        Profile.load(folder, "sinks")
    head = json.loads((folder / "profile.json").read_text())
    (folder / "profile.json").write_text(json.dumps({**head, "version": 99}))
    with pytest.raises(ConfigError, match="version 99"):
        Profile.load(folder, "retrieval-heads")
    (folder / "profile.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        Profile.load(folder, "retrieval-heads")
    (folder / "profile.safetensors").unlink()
    with pytest.raises(ConfigError, match="damaged|cannot be read"):
        Profile.load(folder, "retrieval-heads")
    with pytest.raises(ConfigError, match="no profile at"):
        Profile.load(tmp_path / "none", "sinks")
    with pytest.raises(ConfigError, match="is a file"):
        Profile("sinks", {}, {}).save(folder / "profile.json")
