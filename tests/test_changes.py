"""Functions of a web UI, changed."""

from types import SimpleNamespace

from lib_layerdiffuse.webui.changes import after, change, divert


def test_a_function_is_changed_once():
    owner = SimpleNamespace(double=lambda x: 2 * x)
    for _ in range(2):
        after(owner, "double", lambda answer: answer + 1)
    assert owner.double(4) == 9


def test_only_what_is_ours_is_diverted():
    owner = SimpleNamespace(double=lambda x: 2 * x)
    divert(owner, "double", lambda x: x < 0, lambda x: 0)
    assert [owner.double(x) for x in (4, -4)] == [8, 0]


def test_what_a_web_ui_does_not_have_is_said_and_left_alone(caplog):
    owner = SimpleNamespace()
    change(owner, "double", lambda original: original)
    assert not vars(owner)
    assert "double" in caplog.text
