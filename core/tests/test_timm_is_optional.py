"""Without timm, its integration can be imported, and says what to type when it is used."""

import subprocess
import sys

import pytest
from attn_core.integrations import timm as attn_timm
from attn_core.integrations.missing import MissingPackageError
from attn_core.testing import fake_distribution
from torch import nn


@pytest.fixture
def no_timm(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    return monkeypatch


def test_enable_says_what_to_install_and_changes_nothing(no_timm):
    with pytest.raises(MissingPackageError, match=r'pip install "timm>=1\.0\.31,<1\.1"'):
        attn_timm.enable()
    assert not attn_timm.is_enabled()


def test_a_class_of_layers_says_what_to_install(no_timm):
    with pytest.raises(MissingPackageError, match="timm"):
        attn_timm.Attention  # noqa: B018


def test_a_torchvision_of_another_torch_is_named_as_such(no_timm, tmp_path):
    (tmp_path / "timm.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    fake_distribution(tmp_path, "timm", "1.0.31", {}, {})
    no_timm.delitem(sys.modules, "timm")
    no_timm.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=r"torchvision::nms does not exist(.|\n)*pip install --upgrade torch"):
        attn_timm.enable()


def test_disable_and_a_report_need_no_timm(no_timm):
    attn_timm.disable()
    assert len(attn_timm.report(nn.Linear(2, 2))) == 0


def test_importing_the_integration_imports_no_timm():
    code = "import sys; import attn_core.integrations.timm; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
