"""How the page draws what a model writes: what Markdown becomes, and that nothing in it can do anything."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from serve.browsing import chromium, opened, send, wait_for_answer
from serve.scripted import ScriptedAnswers, ended, text
from serve.servers import running_server

# Code has a head with a button, and scrolling parts have names; here only the Markdown matters.
DRAWN = """async (text) => {
  const { Markdown } = await import('/markdown.js');
  const root = document.createElement('div');
  new Markdown(root).show(text);
  for (const code of root.querySelectorAll('.code')) {
    const [language, pre] = [code.querySelector('span').textContent, code.querySelector('pre')];
    const plain = document.createElement('pre');
    plain.dataset.language = language;
    plain.append(pre.textContent);
    code.replaceWith(plain);
  }
  for (const table of root.querySelectorAll('.table')) table.replaceWith(table.firstChild);
  for (const element of root.querySelectorAll('*'))
    for (const name of ['rel', 'target', 'scope', 'aria-label']) element.removeAttribute(name);
  return root.innerHTML;
}"""
GROWN = """async (text) => {
  const { Markdown } = await import('/markdown.js');
  const [grown, whole] = [document.createElement('div'), document.createElement('div')];
  const growing = new Markdown(grown);
  for (let end = 1; end <= text.length; end += 1) growing.show(text.slice(0, end));
  new Markdown(whole).show(text);
  return [grown.innerHTML, whole.innerHTML];
}"""
KEPT = """async () => {
  const { Markdown } = await import('/markdown.js');
  const root = document.createElement('div');
  const markdown = new Markdown(root);
  markdown.show('one\\n\\n```\\ntw');
  const [paragraph, code] = [root.children[0], root.querySelector('code').firstChild];
  markdown.show('one\\n\\n```\\ntwo\\nthree');
  return [root.children[0] === paragraph, root.querySelector('code').firstChild === code, code.data];
}"""
DANGEROUS = """() => [...document.querySelectorAll('.answer *')].filter((e) =>
  !e.closest('.code-head') && (e.matches('script, iframe, object, embed, img, svg, style, form, base, meta, link') ||
  [...e.attributes].some((a) => a.name.startsWith('on') || a.name === 'style') ||
  (e.href !== undefined && !/^(https?|mailto):/.test(e.href)))).map((e) => e.outerHTML)"""

BECOMES = {
    "emphasis": ("a *b* __c__ ~~d~~", "<p>a <em>b</em> <strong>c</strong> <del>d</del></p>"),
    "both": ("***a***", "<p><strong><em>a</em></strong></p>"),
    "nested": ("**a *b***", "<p><strong>a <em>b</em></strong></p>"),
    "no emphasis": ("2 * 3 * 4, a_b_c, * d*, **e", "<p>2 * 3 * 4, a_b_c, * d*, **e</p>"),
    "escapes": (r"\*a\* \\ \q", r"<p>*a* \ \q</p>"),
    "inline code": ("`*a*` ``b`c`` `d", "<p><code>*a*</code> <code>b`c</code> `d</p>"),
    "line ends": ("a\nb\\\nc", "<p>a<br>b<br>c</p>"),
    "headings": ("# a\n### b ##\n#c", "<h3>a</h3><h5>b</h5><p>#c</p>"),
    "link": ("[a *b*](https://c.example/d_e_f 'g')", '<p><a href="https://c.example/d_e_f">a <em>b</em></a></p>'),
    "mail": ("<mailto:a@b.example>", '<p><a href="mailto:a@b.example">mailto:a@b.example</a></p>'),
    "bare link": ("(https://a.example/b).", '<p>(<a href="https://a.example/b">https://a.example/b</a>).</p>'),
    "a picture is a link": ("![a](https://b.example/c.png)", '<p><a href="https://b.example/c.png">a</a></p>'),
    "list": ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    "numbers": (
        "3. a\n4. b\n  - c\n    - d",
        '<ol start="3"><li>a</li><li>b<ul><li>c<ul><li>d</li></ul></li></ul></li></ol>',
    ),
    "loose list": ("1. a\n\n2. b\n\nc", '<ol class="loose"><li>a</li><li>b</li></ol><p>c</p>'),
    "code in a list": (
        "1. a\n   ```py\n   b\n     c\n   ```\n2. d",
        '<ol><li>a<pre data-language="py">b\n  c</pre></li><li>d</li></ol>',
    ),
    "tasks": (
        "- [x] a\n- [ ] b",
        '<ul><li class="task"><input type="checkbox" disabled="" checked=""> a</li>'
        '<li class="task"><input type="checkbox" disabled=""> b</li></ul>',
    ),
    "list after text": ("a:\n- b\n\nc", "<p>a:</p><ul><li>b</li></ul><p>c</p>"),
    "a number is not a list": ("It was\n1969. Then", "<p>It was<br>1969. Then</p>"),
    "code": ("```js x\n<b>\n\n# c\n```\nd", '<pre data-language="js">&lt;b&gt;\n\n# c</pre><p>d</p>'),
    "open code": ("~~~\na\n```", '<pre data-language="text">a\n```</pre>'),
    "quote": ("> a\nb\n> - c", "<blockquote><p>a<br>b</p><ul><li>c</li></ul></blockquote>"),
    "rule": ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    "table": (
        "|a|b|\n|:-:|-:|\n|`c`|d \\| e<br>f|\n|g|",
        '<table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead><tbody>'
        '<tr><td class="center"><code>c</code></td><td class="right">d | e<br>f</td></tr>'
        '<tr><td class="center">g</td><td class="right"></td></tr></tbody></table>',
    ),
    "html is text": ("<b>a</b> &amp; <!-- c -->", "<p>&lt;b&gt;a&lt;/b&gt; &amp;amp; &lt;!-- c --&gt;</p>"),
    "windows": ("a\r\n\r\n- b\r\n- c", "<p>a</p><ul><li>b</li><li>c</li></ul>"),
}
HOSTILE = """<script>alert(1)</script> <img src=x onerror=alert(1)> <svg onload=alert(1)> <iframe src="//e.example">
[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](data:text/html,<script>alert(1)</script>) [d](vbscript:x)
[e](//e.example) [f](java\tscript:alert(1)) [g](\x01javascript:alert(1)) [h](https://e.example/"onmouseover="alert(1))
![i](javascript:alert(1)) ![j](https://e.example/x.png" onerror="alert(1)) [k](https:javascript:alert(1))
<javascript:alert(1)> [l](file:///etc/passwd) [o](https://e.example/\u202e)

```"><script>alert(1)</script>
</code></pre><script>alert(1)</script>
```

|<img src=x onerror=alert(1)>|
|-|
|[m](javascript:alert(1))|

# <base href="https://e.example/">
- <form action=https://e.example><button>n</button></form>
> <style>*{display:none}</style><meta http-equiv=refresh content=0>
"""
LONG = 30_000
COSTLY = {
    "brackets": "[" * LONG,
    "links": "[a](" * LONG,
    "stars": "*a " * LONG,
    "nested": "*a **b " * LONG,
    "mixed": "*_~~" * LONG,
    "backticks": "".join("`" * (n % 200 + 1) + "a" for n in range(LONG // 100)),
    "angles": "<" * LONG,
    "quotes": "> " * LONG,
    "lists": "- " * LONG,
    "indents": "\n".join(" " * n + "- a" for n in range(400)),
    "bars": "|a" * LONG + "\n" + "|-" * LONG,
    "addresses": "https://" * LONG,
    "lines": "a\n" * LONG,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    answers = ScriptedAnswers()
    answers.longest = 1
    with running_server(answers) as url, opened(browser, url) as page:
        yield page


@pytest.mark.parametrize("name", BECOMES)
def test_markdown_becomes_elements(page, name):
    written, drawn = BECOMES[name]
    assert page.evaluate(DRAWN, written) == drawn


@pytest.mark.parametrize("name", [*BECOMES, "all", "hostile"])
def test_an_answer_drawn_as_it_grows_is_the_answer_drawn_at_once(page, name):
    all_of_it = "\n\n".join(written for written, _ in BECOMES.values() if "~~~" not in written)
    written = {"all": all_of_it, "hostile": HOSTILE}.get(name) or BECOMES[name][0]
    grown, whole = page.evaluate(GROWN, written)
    assert grown == whole


def test_blocks_that_are_done_are_not_drawn_again_and_code_grows_in_place(page):
    assert page.evaluate(KEPT) == [True, True, "two\nthree"]


@pytest.mark.parametrize("name", COSTLY)
def test_odd_text_is_drawn_and_none_of_it_is_lost(page, name):
    # A search that goes back over its steps would take minutes here, and the browser's time limit ends it.
    drawn = page.evaluate(DRAWN, COSTLY[name])
    assert len(drawn) > 0
    shown = re.sub("<[^>]*>", "", drawn)
    assert shown.count("a") >= COSTLY[name].count("a")


def test_attempts_to_run_something_stay_inert(browser):
    answers = ScriptedAnswers(ended(text(HOSTILE)))
    answers.longest = 4096
    with running_server(answers) as url, opened(browser, url) as page:
        page.on("dialog", lambda dialog: pytest.fail("a script ran"))
        send(page, HOSTILE)
        wait_for_answer(page)
        page.locator(".answer a").first.wait_for()
        assert page.evaluate(DANGEROUS) == []
        assert "<script>alert(1)</script>" in page.locator(".answer").inner_text()
        assert page.locator(".question .said").inner_text() == HOSTILE
        links = page.locator(".answer a").evaluate_all("(all) => all.map((a) => [a.href, a.rel, a.target])")
        assert all(href.startswith("https://e.example/") for href, _, _ in links)
        assert all(about == ["noopener noreferrer", "_blank"] for _, *about in links)
        page.reload()
        assert page.evaluate(DANGEROUS) == []
