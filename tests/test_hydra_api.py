"""Hydra is called in the way that its version asks for."""

from __future__ import annotations

from typing import Any

import hydra
import hydra.utils
import pytest
from omegaconf import OmegaConf

from pl_sparse.app import hydra_api


def test_targets_of_a_node_are_on_the_white_list(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, Any] = {}
    monkeypatch.setattr(hydra_api, "_WHITE_LIST", True)
    monkeypatch.setattr(hydra.utils, "instantiate", lambda node, **arguments: passed.update(arguments))
    cfg = OmegaConf.create(
        {
            "other": {"_target_": "package.Other"},
            "node": {"_target_": "package.Class", "parts": [{"_target_": "package.Part"}], "other": "${other}"},
            "aside": {"_target_": "package.Aside"},
        }
    )
    hydra_api.instantiate(cfg.node, value=1)
    assert passed.pop("value") == 1
    assert passed == {"_execution_whitelist_": [*hydra_api.PACKAGES, "package.Class", "package.Part", "package.Other"]}


def test_hydra_refuses_what_is_not_on_the_white_list() -> None:
    if not hydra_api._WHITE_LIST:
        pytest.skip("Hydra 1.3 has no white list")
    cfg = OmegaConf.create({"_target_": "collections.Counter"})
    with pytest.raises(Exception, match="whitelist"):
        hydra.utils.instantiate(cfg, _execution_whitelist_=hydra_api.PACKAGES)
    assert hydra_api.instantiate(cfg) == {}
    with pytest.raises(Exception, match=r"os\.system"):
        hydra_api.instantiate(OmegaConf.create({"_target_": "os.system", "_args_": ["true"]}))


def test_a_resolver_replaces_the_one_of_its_name() -> None:
    for value in ("first", "second"):
        hydra_api.register_resolver("pl_sparse_test", lambda value=value: value)
    try:
        assert OmegaConf.create({"key": "${pl_sparse_test:}"}).key == "second"
    finally:
        OmegaConf.clear_resolver("pl_sparse_test")


def test_optimizers_are_given_plain_types() -> None:
    # what an optimizer keeps is in checkpoints, which are loaded as plain types
    for name in ("adam", "adamw"):
        with hydra_api.composition():
            cfg = hydra.compose("train", [f"optimizer={name}"])
        assert type(hydra_api.instantiate(cfg.optimizer).keywords["betas"]) is list
