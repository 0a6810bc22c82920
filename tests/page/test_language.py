"""The panel in Chinese, by way of the web UI's own localization and Reload UI."""

import json
import re

from playwright.sync_api import expect

from tests.forge.client import alpha_varies
from tests.page.tab import LAYERS, Tab, eventually
from tools.forge import CHECKOUT

WORDS = json.loads((CHECKOUT / "localizations" / "zh_CN.json").read_text(encoding="utf-8"))
OURS = "[id^=layerdiffuse-][id$=img], #differential-img2img, [id*=_send_to_layerdiffuse_]"
# What the elements say, in order: their text, word by word as it stands in the page, their tooltips and placeholders.
SAID = """places => places.flatMap(place => [place, ...place.querySelectorAll("*")].flatMap(element => [
    ...[...element.childNodes].filter(node => node.nodeType == Node.TEXT_NODE).map(node => node.textContent.trim()),
    element.title, element.placeholder || "",
])).filter(words => words)"""
# Names, words that are Gradio's to translate, and a control that is never shown.
NAMES = ("LayerDiffuse method: ", "LayerDiffuse 0.")
NOT_OURS = {"LayerDiffuse", "Differential Diffusion", "Drop Image Here", "or", "Click to Upload", "Output Original"}


def said(page):
    return page.locator(OURS).evaluate_all(SAID)


def translated(words):
    return [WORDS.get(each, each) for each in words]


def test_the_panel_speaks_chinese_and_works_after_reload_ui(page, in_chinese):
    tab = Tab(page, "txt2img")
    english = said(page)
    words = {each for each in english if re.search("[A-Za-z]{2}", each) and not each.startswith(NAMES)} - NOT_OURS
    assert words - WORDS.keys() == set(), "words of the panel that the translation does not have"
    assert {"Method", "Change Map", "for this layer alone", "weights are present"} <= words

    in_chinese()
    eventually(lambda: said(page), translated(english))
    tab.prepare()
    tab.open()
    tab.choose(WORDS[LAYERS])
    eventually(lambda: tab.method, WORDS[LAYERS])
    tab.set_number("batch_size", 2)
    status = [
        ("3", "images per picture:", "foreground", "·", "background", "·", "blend"),
        ("batch size", "2", "becomes", "3"),
        ("weights are present",),
    ]
    eventually(lambda: tab.status, [" ".join(translated(sentence)) for sentence in status])
    assert [alpha_varies(picture) for picture in tab.made()[:3]] == [True, False, False]
    expect(tab.results.locator(".caption").first).to_have_text(WORDS["foreground"])
