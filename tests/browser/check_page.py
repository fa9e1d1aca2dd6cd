"""The chat page in a real browser: `make test-browser`. With SCREENSHOTS=FOLDER it leaves pictures there."""

import json
import os
import re
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest
from conftest import DESKTOP, NARROW, PHONE
from playwright.sync_api import expect
from stub_server import Answer, Refuse, StubServer

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
MARKDOWN = """Her er **tre** ting, med `kode` og *trykk*:

1. Først 2*3*4
2. Så <b>ikke</b> fet
   - under *her*
   - og der

10) Ti

## Overskrift
Linje én
linje to

```python
print("<script>alert(1)</script>")
```

Slutt på **åpen"""


@pytest.fixture
def server():
    """Makes a server with a script, which has to be used up."""
    servers = []

    def make(*script, **options):
        servers.append(StubServer(script, **options).__enter__())
        return servers[-1]

    yield make
    for one in servers:
        one.__exit__()
        assert not one.script, "not everything that was scripted was asked for"


def send(page, text):
    page.get_by_label(re.compile("Skriv en melding|Write a message")).fill(text)
    page.keyboard.press("Enter")


def last(page):
    return page.locator(".turn").last


def done(page):
    """Wait for the end of an answer."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_an_answer_streams_and_the_next_question_comes_with_the_conversation(open_page, server):
    more = Event()
    chat = server(Answer(["Oslo ", "er ", more, "hovedstaden."]), Answer(["Ja."]))
    page = open_page(chat.url)
    expect(page.locator("#model-name")).to_have_text("demo")
    send(page, "Hva heter hovedstaden i Norge?")
    expect(last(page).locator(".text")).to_have_text("Oslo er")
    expect(page.get_by_role("button", name="Stopp")).to_be_visible()
    expect(page.get_by_label("Skriv en melding")).to_have_value("")
    more.set()
    expect(last(page).locator(".text")).to_have_text("Oslo er hovedstaden.")
    done(page)
    send(page, "Er du sikker?")
    expect(last(page).locator(".text")).to_have_text("Ja.")
    assert [(message["role"], message["content"]) for message in chat.asked[1]["messages"]] == [
        ("user", "Hva heter hovedstaden i Norge?"),
        ("assistant", "Oslo er hovedstaden."),
        ("user", "Er du sikker?"),
    ]
    assert chat.asked[0]["stream"] is True
    assert "temperature" not in chat.asked[0]  # the model's own
    assert "max_tokens" not in chat.asked[0]


def test_shift_enter_makes_a_line_and_the_field_grows(open_page, server):
    chat = server(Answer(["Ja."]))
    page = open_page(chat.url)
    field = page.get_by_label("Skriv en melding")
    low = field.bounding_box()["height"]
    field.press_sequentially("én")
    page.keyboard.press("Shift+Enter")
    field.press_sequentially("to")
    assert field.bounding_box()["height"] > low
    page.keyboard.press("Enter")
    done(page)
    assert chat.asked[0]["messages"][0]["content"] == "én\nto"
    assert abs(field.bounding_box()["height"] - low) < 1


def test_nothing_is_sent_without_a_message(open_page, server):
    page = open_page(server().url)
    send(page, "  \n ")
    expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stop_leaves_what_was_written_and_the_server_notices(open_page, server, by):
    slow = Answer(["Det var ", Event()])
    chat = server(slow, Answer(["Ja."]))
    page = open_page(chat.url)
    send(page, "Fortell.")
    expect(last(page).locator(".text")).to_have_text("Det var")
    if by == "button":
        page.get_by_role("button", name="Stopp").click()
    else:
        page.keyboard.press("Escape")
    expect(last(page).locator(".note")).to_have_text("Stoppet.")
    assert slow.gone.wait(10)
    send(page, "Gå videre.")
    expect(last(page).locator(".text")).to_have_text("Ja.")
    assert chat.asked[1]["messages"][1] == {"role": "assistant", "content": "Det var "}


def test_another_answer_replaces_the_last(open_page, server):
    chat = server(Answer(["Bergen."]), Answer(["Oslo."]))
    page = open_page(chat.url)
    send(page, "Hovedstaden?")
    page.get_by_role("button", name="Nytt svar").click()
    expect(last(page).locator(".text")).to_have_text("Oslo.")
    assert chat.asked[0] == chat.asked[1]


def test_the_last_question_is_edited_and_earlier_ones_are_not(open_page, server):
    chat = server(Answer(["A"]), Answer(["B"]), Answer(["C"]))
    page = open_page(chat.url)
    send(page, "første")
    done(page)
    send(page, "andre")
    done(page)
    edit = page.get_by_role("button", name="Rediger")
    expect(edit).to_have_count(1)
    edit.click()
    page.keyboard.press("Escape")
    expect(edit).to_be_focused()
    edit.click()
    page.get_by_label("Rediger meldingen").fill("tredje")
    page.keyboard.press("Enter")
    expect(last(page).locator(".text")).to_have_text("C")
    expect(last(page).locator(".said")).to_have_text("tredje")
    assert [message["content"] for message in chat.asked[2]["messages"]] == ["første", "A", "tredje"]


def test_a_new_conversation_forgets_the_old_one_and_asks_first(open_page, server):
    chat = server(Answer(["A", Event()]), Answer(["B"]))
    page = open_page(chat.url)
    send(page, "hemmelig")
    expect(last(page).locator(".text")).to_have_text("A")
    restart = page.get_by_role("button", name="Ny samtale")
    restart.click()
    page.get_by_role("button", name="Avbryt").click()
    expect(page.locator(".turn")).to_have_count(1)
    restart.click()
    page.get_by_role("dialog").get_by_role("button", name="Ny samtale").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_role("heading", name="Hva vil du spørre om?")).to_be_visible()
    assert "hemmelig" not in page.content()
    send(page, "nytt")
    expect(last(page).locator(".text")).to_have_text("B")
    assert [message["content"] for message in chat.asked[1]["messages"]] == ["nytt"]


def test_settings_are_sent_and_wrong_ones_are_not_taken(open_page, server):
    chat = server(Answer(["A"]))
    page = open_page(chat.url)
    page.get_by_role("button", name="Innstillinger").click()
    page.get_by_label("Systemmelding").fill("Svar kort.")
    page.get_by_label("Temperatur").fill("9")
    page.get_by_role("button", name="Ferdig").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_label("Temperatur").fill("0.4")
    page.get_by_label("Lengste svar").fill("1000")  # more than the server gives
    page.get_by_role("button", name="Ferdig").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_label("Lengste svar").fill("12")
    page.get_by_role("button", name="Ferdig").click()
    expect(page.get_by_role("button", name="Innstillinger")).to_be_focused()
    send(page, "Hei")
    done(page)
    assert (chat.asked[0]["temperature"], chat.asked[0]["max_tokens"]) == (0.4, 12)
    assert chat.asked[0]["messages"][0] == {"role": "system", "content": "Svar kort."}


def test_one_of_several_models_is_chosen(open_page, server):
    chat = server(Answer(["A"]), models=("liten", "stor"))
    page = open_page(chat.url)
    page.get_by_label("Modell").select_option("stor")
    send(page, "Hei")
    done(page)
    assert chat.asked[0]["model"] == "stor"


def test_a_question_may_come_before_the_models_are_known(open_page, server):
    chat = server(Answer(["Ja."]))
    chat.listable.clear()
    page = open_page(chat.url)
    send(page, "Hei")
    expect(last(page).locator(".waiting")).to_be_visible()
    chat.listable.set()
    expect(last(page).locator(".text")).to_have_text("Ja.")
    assert chat.asked[0]["model"] == "demo"


def test_a_base_model_is_not_offered(open_page, server):
    page = open_page(server(models=("grunnmodell-base",)).url)
    expect(page.locator("#no-model")).to_contain_text("ingen modell som kan føre en samtale")


def test_reasoning_is_folded_and_is_not_sent_back(open_page, server):
    more = Event()
    chat = server(Answer(["Oslo."], reasoning=["Jeg tenker ", more, "på Norge."]), Answer(["Ja."]))
    page = open_page(chat.url)
    send(page, "Hovedstaden?")
    folded = last(page).locator(".reasoning")
    expect(folded.locator("summary")).to_have_text("Tenker")
    expect(folded.locator("div")).to_be_hidden()
    more.set()
    expect(folded.locator("summary")).to_have_text("Resonnement")
    folded.locator("summary").click()
    expect(folded.locator("div")).to_have_text("Jeg tenker på Norge.")
    expect(last(page).locator(".text")).to_have_text("Oslo.")
    send(page, "Sikker?")
    done(page)
    assert chat.asked[1]["messages"][1] == {"role": "assistant", "content": "Oslo."}


def test_markdown_becomes_nodes_and_markup_stays_text(open_page, server):
    pieces = [MARKDOWN[at : at + 3] for at in range(0, len(MARKDOWN), 3)]
    page = open_page(server(Answer(pieces)).url)
    send(page, "<img src=x onerror=alert(1)>")
    done(page)
    expect(last(page).locator(".said")).to_have_text("<img src=x onerror=alert(1)>")
    text = last(page).locator(".text")
    expect(text.locator("strong")).to_have_text(["tre"])
    expect(text.locator("p code")).to_have_text("kode")
    expect(text.locator("em")).to_have_text(["trykk", "her"])
    expect(text.locator("ol > li")).to_have_count(3)
    expect(text.locator("ol > li").nth(0)).to_have_text("Først 2*3*4")
    expect(text.locator("ol > li ul > li")).to_have_text(["under her", "og der"])
    expect(text.locator("ol > li").nth(1)).to_contain_text("Så <b>ikke</b> fet")
    expect(text.locator("h3")).to_have_text("Overskrift")
    expect(text.locator("pre")).to_have_text('print("<script>alert(1)</script>")')
    assert text.locator("p").nth(1).inner_text() == "Linje én\nlinje to"
    expect(text.locator("p").last).to_have_text("Slutt på **åpen")
    assert text.locator("b, script, img").count() == 0


def test_the_answer_and_its_code_are_copied(open_page, server):
    chat = server(Answer(["Slik:\n\n```\nls -l\n```"]))
    page = open_page(chat.url, permissions=["clipboard-read", "clipboard-write"])
    send(page, "Hvordan?")
    done(page)
    page.get_by_role("button", name="Kopier svaret").click()
    expect(page.get_by_role("button", name="Kopier svaret")).to_have_text("Kopiert")
    assert page.evaluate("navigator.clipboard.readText()") == "Slik:\n\n```\nls -l\n```"
    page.get_by_role("button", name="Kopier", exact=True).click()
    page.wait_for_function("async () => await navigator.clipboard.readText() === 'ls -l'")


def test_copying_works_where_the_browser_has_no_clipboard(open_page, server):
    page = open_page(server(Answer(["Oslo."])).url, permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('insecure')); }")
    send(page, "Hva?")
    page.get_by_role("button", name="Kopier svaret").click()
    expect(page.get_by_role("button", name="Kopier svaret")).to_have_text("Kopiert")
    assert page.evaluate("navigator.clipboard.readText()") == "Oslo."


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        (Refuse(429, "queue full", headers={"Retry-After": "7"}), "Prøv igjen om 7 sekunder"),
        (Refuse(503), "kan ikke svare akkurat nå"),
        (Refuse(413), "for lang for tjeneren"),
        (Refuse(500, "the engine failed"), "Noe gikk galt hos tjeneren"),
        (Refuse(400, "temperature must be below 2"), "avviste forespørselen"),
        (Refuse(400, "too long", "context_length_exceeded"), "lengre enn modellen har plass til"),
    ],
)
def test_a_refusal_is_explained_where_it_happened_and_can_be_retried(open_page, server, refusal, says):
    chat = server(refusal, Answer(["Nå gikk det."]))
    page = open_page(chat.url)
    send(page, "Hei")
    problem = last(page).get_by_role("alert")
    expect(problem).to_contain_text(says)
    expect(problem).to_contain_text(refusal.message)
    problem.get_by_role("button", name="Prøv igjen").click()
    expect(last(page).locator(".text")).to_have_text("Nå gikk det.")
    expect(problem).to_be_hidden()
    assert chat.asked[0] == chat.asked[1]


def test_what_was_refused_is_no_part_of_the_conversation(open_page, server):
    chat = server(Refuse(500), Answer(["Ja."]))
    page = open_page(chat.url)
    send(page, "gikk ikke")
    expect(last(page).get_by_role("alert")).to_be_visible()
    send(page, "gikk")
    expect(last(page).locator(".text")).to_have_text("Ja.")
    assert [message["content"] for message in chat.asked[1]["messages"]] == ["gikk"]
    expect(page.get_by_role("button", name="Prøv igjen")).to_have_count(0)


@pytest.mark.parametrize("ending", ["reset", "silent", "error"])
def test_a_connection_that_breaks_says_so_and_keeps_what_came(open_page, server, ending):
    seen = Event()
    chat = server(Answer(["Det var ", "en gang", seen], ending=ending), Answer(["Oslo."]))
    page = open_page(chat.url)
    send(page, "Fortell.")
    expect(last(page).locator(".text")).to_have_text("Det var en gang")
    seen.set()
    problem = last(page).get_by_role("alert")
    expect(problem).to_contain_text("the engine failed" if ending == "error" else "brutt midt i svaret")
    expect(last(page).locator(".text")).to_have_text("Det var en gang")
    problem.get_by_role("button", name="Prøv igjen").click()
    expect(last(page).locator(".text")).to_have_text("Oslo.")


def test_a_connection_that_breaks_before_the_answer_says_so(open_page, server):
    page = open_page(server(Answer([], ending="silent")).url)
    send(page, "Fortell.")
    expect(last(page).get_by_role("alert")).to_contain_text("brutt før svaret kom")


def test_a_server_that_is_gone_is_told(open_page, server):
    chat = server()
    page = open_page(chat.url)
    expect(page.locator("#model-name")).to_have_text("demo")
    page.context.set_offline(True)
    send(page, "Hei")
    expect(last(page).get_by_role("alert")).to_contain_text("Får ikke kontakt med tjeneren")


@pytest.mark.parametrize(
    ("tokens", "says"), [(120, "nådde lengdegrensen"), (400, "tar all plassen")], ids=["limit", "context"]
)
def test_an_answer_that_was_cut_off_says_why(open_page, server, tokens, says):
    page = open_page(server(Answer(["Det var en"], finish="length", total_tokens=tokens)).url)
    send(page, "Fortell.")
    expect(last(page).locator(".note")).to_contain_text(says)


@pytest.mark.parametrize(("locale", "speed", "left"), [
    ("nb-NO", r"\d,\d tokener/s", "1\xa0200 av 4\xa0000 tokener igjen"),
    ("en-GB", r"\d\.\d tokens/s", "1,200 of 4,000 tokens left"),
])  # fmt: skip
def test_speed_and_room_are_told_below_the_answer(open_page, server, locale, speed, left):
    more = Event()
    page = open_page(server(Answer(["a ", "b ", more, "c"], total_tokens=2800), context_length=4000).url, locale=locale)
    page.get_by_role("textbox").first.fill("Tell.")
    page.keyboard.press("Enter")
    expect(last(page).locator(".figures")).to_have_text(re.compile(rf"^[\d\s\xa0,.]*{speed}$"))
    more.set()
    expect(last(page).locator(".figures")).to_have_text(re.compile(rf"{speed} · {left}$"))
    assert page.locator("#spoken").inner_text().count("token") == 0  # nobody wants that read out


def test_what_to_leave_out_is_chosen_and_told(open_page, server):
    chat = server(Answer(["Ja."]), Answer(["Nei."], left_out=1234))
    page = open_page(chat.url)
    send(page, "Hei")
    done(page)
    page.get_by_role("button", name="Innstillinger").click()
    page.get_by_label("Når samtalen blir for lang").select_option("Utelat midten av de lengste meldingene")
    page.get_by_role("button", name="Ferdig").click()
    send(page, "Og nå?")
    expect(last(page).locator(".note")).to_have_text("1\xa0234 tokener av samtalen er utelatt av plassmangel.")
    assert ["overflow" in asked for asked in chat.asked] == [False, True]
    assert chat.asked[1]["overflow"] == "cut-middle"


def test_the_key_is_asked_for_and_kept_in_the_tab_only(open_page, server):
    chat = server(Answer(["Ja."]), Answer(["Igjen."]), key="hemmelig")
    page = open_page(chat.url)
    expect(page.get_by_role("dialog")).to_contain_text("ber om en nøkkel")
    page.get_by_role("button", name="Avbryt").click()
    expect(page.locator("#no-model")).to_contain_text("godtok ikke nøkkelen")
    page.get_by_role("button", name="Oppgi nøkkel").click()
    for key in ("feil", "hemmelig"):
        page.get_by_label("API-nøkkel").fill(key)
        page.keyboard.press("Enter")
    expect(page.locator("#model-name")).to_have_text("demo")
    send(page, "Hei")
    expect(last(page).locator(".text")).to_have_text("Ja.")
    stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, sessionStorage.key]")
    assert stored[:3] == [0, 1, ""]
    page.evaluate("sessionStorage.setItem('key', 'gammel')")  # was changed at the server
    send(page, "Hei igjen")
    page.get_by_label("API-nøkkel").fill("hemmelig")
    page.keyboard.press("Enter")
    expect(last(page).locator(".text")).to_have_text("Igjen.")


def test_finished_parts_of_an_answer_are_read_out(open_page, server):
    more = Event()
    page = open_page(server(Answer(["Første avsnitt.\n\n", "Andre", more, " avsnitt."])).url)
    spoken = page.locator("#spoken[aria-live=polite]")
    send(page, "Fortell.")
    expect(spoken).to_contain_text("Første avsnitt.")
    expect(spoken).not_to_contain_text("Andre")
    more.set()
    expect(spoken).to_contain_text("Andre avsnitt.")
    expect(spoken).to_contain_text("Svaret er ferdig.")


def test_all_of_it_can_be_done_with_the_keyboard(open_page, server):
    chat = server(Answer(["En."]), Answer(["To."]))
    page = open_page(chat.url)
    expect(page.get_by_label("Skriv en melding")).to_be_focused()
    page.keyboard.type("Hei")
    page.keyboard.press("Enter")
    done(page)
    expect(page.get_by_label("Skriv en melding")).to_be_focused()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        reached.add(page.evaluate("document.activeElement.textContent"))
    assert {"Nytt svar", "Kopier", "Rediger", "Innstillinger", "Ny samtale"} <= reached
    page.get_by_role("button", name="Nytt svar").focus()
    page.keyboard.press("Enter")
    expect(last(page).locator(".text")).to_have_text("To.")
    expect(page.get_by_label("Skriv en melding")).to_be_focused()


def test_it_speaks_english_to_others(open_page, server):
    page = open_page(server().url, locale="en-GB")
    expect(page.get_by_label("Write a message")).to_be_visible()
    assert page.locator("html").get_attribute("lang") == "en"
    assert not re.search("[æøåÆØÅ]", page.locator("body").inner_text().replace("Bokmål", ""))


def test_both_languages_have_the_same_texts(open_page, server):
    page = open_page(server().url)
    of = "(l) => [Object.keys(TEXTS[l]), Object.keys(TEXTS[l].problems)].flat().sort().join()"
    assert page.evaluate(of, "nb") == page.evaluate(of, "en")


def test_a_script_that_got_in_would_not_run(open_page, server, browser):
    page = browser.new_page()  # not a watched one: the browser reports what it blocks
    page.goto(server().url)
    ran = page.evaluate(
        """() => {
          const script = document.createElement("script");
          try { script.text = "window.ran = true"; } catch { return "refused"; }
          document.body.append(script);
          return String(window.ran);
        }"""
    )
    assert ran in ("refused", "undefined")
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    page.close()


def show_a_conversation(page):
    """Everything that a conversation can show, within one page."""
    send(page, "Kan du forklare kort hva en reguleringsplan er?")
    done(page)
    send(page, "Skriv det som en liste, og vis et eksempel på en dato i Python.")
    done(page)
    send(page, "Takk!")
    expect(last(page).get_by_role("alert")).to_be_visible()


EXPLANATION = (
    "En **reguleringsplan** er et kart med bestemmelser som sier hva et område kan brukes til, og hva som kan bygges "
    "der. Kommunestyret vedtar planen, og den er bindende for senere tiltak.\n\nAlle som berøres, skal få uttale seg "
    "før planen vedtas."
)
LIST = (
    "Saken går slik:\n\n1. **Oppstart** varsles, og naboene får brev.\n2. Forslaget legges ut til *offentlig ettersyn*"
    " i minst seks uker.\n3. Kommunestyret vedtar planen.\n\nDatoen skrives slik:\n\n```python\nfrom datetime import "
    'date\n\nprint(date(2026, 11, 25).strftime("%d.%m.%Y"))\n```'
)


@pytest.mark.parametrize("language", ["nb", "en"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE, NARROW], ids=["desktop", "phone", "narrow"])
def test_it_fits_and_can_be_read(open_page, server, viewport, scheme, language):
    script = (
        Answer([EXPLANATION], reasoning=["Brukeren spør om plan- og bygningsloven. Jeg svarer kort."]),
        Answer([LIST], finish="length"),
        Refuse(429, "the queue is full: 16 requests are waiting", headers={"Retry-After": "12"}),
    )
    locale = {"nb": "nb-NO", "en": "en-GB"}[language]
    page = open_page(server(*script).url, viewport=viewport, color_scheme=scheme, locale=locale)
    name = f"{viewport['width']}-{scheme}-{language}"

    def look(state):
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{name}-{state}.png")
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, f"{state} has to be scrolled sideways"
        assert page.evaluate(CONTRAST) == []

    expect(page.locator("#model-name")).to_have_text("demo")
    look("start")
    page.get_by_role("button", name=re.compile("Innstillinger|Settings")).click()
    look("settings")
    page.keyboard.press("Escape")
    show_a_conversation(page)
    look("end")
    page.evaluate("document.documentElement.scrollTop = 0")
    look("top")
    for button in page.get_by_role("button").all():  # WCAG 2.2, 2.5.8: a target has at least 24 pixels each way
        box = button.bounding_box()
        assert box is None or min(box["width"], box["height"]) >= 24


@pytest.fixture(scope="module")
def real_server():
    """`normistral serve` with the demo model, as `make test-browser` has them."""
    if "ARTIFACT" not in os.environ:
        pytest.skip("ARTIFACT and NORMISTRAL are set by `make test-browser`")
    command = [*shlex.split(os.environ["NORMISTRAL"]), "serve", os.environ["ARTIFACT"], "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            for _ in range(600):
                with suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{url}/ready"):
                    break
                time.sleep(0.1)
            yield f"{url}/"
        finally:
            process.terminate()


def test_the_real_server_answers_in_the_page(open_page, real_server):
    page = open_page(real_server)
    expect(page.locator("#model-name")).to_have_text(Path(os.environ["ARTIFACT"]).name)
    page.get_by_role("button", name="Innstillinger").click()
    page.get_by_label("Temperatur").fill("0")
    page.get_by_role("button", name="Ferdig").click()
    send(page, "What is the capital of Norway?")
    expect(last(page).locator(".text")).to_contain_text("Oslo", timeout=30_000)
    done(page)
    send(page, "Write a very long story about a fisherman.")
    expect(last(page).locator(".text")).to_contain_text(re.compile(r"\w+ \w+ \w+"), timeout=30_000)
    page.keyboard.press("Escape")
    expect(last(page).locator(".note")).to_have_text("Stoppet.")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "real.png")
    page.get_by_role("button", name="Rediger").click()
    page.get_by_label("Rediger meldingen").fill("word " * 9000)
    page.get_by_role("button", name="Send på nytt").click()
    problem = last(page).get_by_role("alert")
    expect(problem).to_contain_text("lengre enn modellen har plass til")
    expect(problem.get_by_role("button", name="Ny samtale")).to_be_visible()


def test_the_real_server_says_when_an_answer_was_cut_off(open_page, real_server):
    page = open_page(real_server)
    page.get_by_role("button", name="Innstillinger").click()
    page.get_by_label("Lengste svar").fill("5")
    page.get_by_role("button", name="Ferdig").click()
    send(page, "Write a story about a fisherman.")
    expect(last(page).locator(".note")).to_contain_text("nådde lengdegrensen", timeout=30_000)
