"""transformers knows the layer once both are imported, in either order, and neither imports the other for its sake."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megamoe.model.registration import refuse_old

KNOWN = """
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import auto
quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
registries = EPImplementationInterface(), ALL_EXPERTS_FUNCTIONS, *quantizers
assert all("megamoe" in registry for registry in registries)
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import gc; gc.disable()\n{code}"],  # imports leave no garbage
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_room_imports_neither_transformers_nor_torch() -> None:
    run("import sys, megamoe.model; assert not {'transformers', 'torch'} & sys.modules.keys()")


@pytest.mark.parametrize(
    "code",
    [f"import megamoe.model\n{KNOWN}", f"import transformers.modeling_utils\nimport megamoe.model\n{KNOWN}"],
    ids=["before_transformers", "after_transformers"],
)
def test_the_order_of_imports_does_not_matter(code: str) -> None:
    run(code)


def test_a_module_that_waits_is_found_as_if_nobody_waited() -> None:
    run(
        "import inspect, sys, megamoe.model, transformers.quantizers.auto as auto\n"
        "assert auto.__spec__.origin == auto.__file__ and 'register_quantizer' in inspect.getsource(auto)\n"
        "import importlib; importlib.reload(megamoe.model.registration); megamoe.model.register()\n"
        "assert len([f for f in sys.meta_path if type(f).__name__ == '_Finder']) <= 2"
    )


def test_without_transformers_the_room_works_and_says_what_is_missing() -> None:
    run(
        "import sys\nsys.modules['transformers'] = None\nimport megamoe.model\n"
        "from importlib import metadata\nfrom unittest.mock import patch\n"
        "from megamoe.model import read_structure, RoutedExperts\n"
        "with patch.object(metadata, 'version', side_effect=metadata.PackageNotFoundError):\n"
        "    try:\n        megamoe.model.packed_config\n"
        "    except ValueError as refusal:\n        assert 'transformers is not installed' in str(refusal), refusal\n"
        "    else:\n        raise AssertionError\n"
    )


def test_an_old_transformers_is_refused_with_the_version_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_old()
    monkeypatch.setattr(metadata, "version", lambda _: "5.9.1")
    with pytest.raises(ValueError, match=r"transformers 5.9.1 is too old: pip install 'transformers>=5.23'"):
        refuse_old()
