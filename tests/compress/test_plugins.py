import sys
from pathlib import Path

import pytest
import toys

import edgeprune.architectures
from edgeprune import plugins
from edgeprune.configs import has_own_form, known_types
from edgeprune_runtime.errors import EdgepruneError

OWN_FORMS = [name for name in known_types() if has_own_form({"model_type": name})]


def test_every_architecture_file_is_found_and_has_a_toy() -> None:
    assert sorted({*known_types()} - {*OWN_FORMS}) == sorted(toys.TYPES)


@pytest.mark.parametrize("name", sorted({*known_types()} - {*OWN_FORMS}))
def test_an_architecture_says_what_the_others_need(name: str) -> None:
    module = plugins.find("architectures", name, "architecture")
    assert callable(module.layer_groups)
    assert module.BASE.endswith(("ForCausalLM", "LMHeadModel"))
    assert module.SOURCE in ("decoder", "traced")


@pytest.mark.parametrize("name", OWN_FORMS)
def test_a_form_of_its_own_becomes_a_known_type(name: str) -> None:
    module = plugins.find("architectures", name, "architecture")
    assert module.BECOMES in set(known_types()) - set(OWN_FORMS)
    assert callable(module.stock_config)
    assert callable(module.unpack)


def test_an_unknown_name_answers_with_the_nearest() -> None:
    with pytest.raises(EdgepruneError, match=r"unknown architecture 'lama'; did you mean 'llama'\?"):
        plugins.find("architectures", "lama", "architecture")


@pytest.mark.parametrize("name", ["../llama", "llama.__init__", "__init__", "os", ""])
def test_a_name_reaches_no_other_module(name: str) -> None:
    with pytest.raises(EdgepruneError, match="unknown architecture"):
        plugins.find("architectures", name, "architecture")


@pytest.fixture
def plugin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are architecture plug-ins as long as the test runs."""
    package = edgeprune.architectures
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_a_new_file_is_a_plugin(plugin_folder: Path) -> None:
    (plugin_folder / "new_kind.py").write_text("BASE = 'NewForCausalLM'")
    assert "new-kind" in plugins.names("architectures")
    assert plugins.find("architectures", "New-Kind", "architecture").BASE == "NewForCausalLM"


def test_a_python_keyword_can_be_a_name(plugin_folder: Path) -> None:
    (plugin_folder / "global_.py").write_text("BASE = 'G'")
    assert plugins.find("architectures", "global", "architecture").BASE == "G"


def test_an_error_inside_a_plugin_is_not_swallowed(plugin_folder: Path) -> None:
    (plugin_folder / "broken.py").write_text("import no_such_module_at_all")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        plugins.find("architectures", "broken", "architecture")
