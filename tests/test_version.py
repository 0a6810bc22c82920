"""The version that panel, routes and command line say."""

from pathlib import Path

from lib_layerdiffuse import version


def test_of_a_checkout():
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{version.own_version()}"\n' in text


def test_of_an_installed_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(version, "PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(version, "version", {"sd-forge-layerdiffuse": "1.2.3"}.get)
    assert version.own_version() == "1.2.3"
