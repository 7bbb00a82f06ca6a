"""How the page looks: two themes of one palette, and the rules that use it.

c1 to c6 can be told apart in ordinary, protanopic, deuteranopic and tritanopic sight; c7 is for what shares a colour.
o1 to o7 are the colours of text on them.
"""

from __future__ import annotations

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "bg": "#ffffff",
        "panel": "#f4f5f7",
        "ink": "#15181d",
        "soft": "#565d67",
        "rule": "#d5d9de",
        "grid": "#e8eaed",
        "good": "#0a6b50",
        "good-bg": "#e3f4ee",
        "bad": "#b3261e",
        "bad-bg": "#fcebe9",
        "c1": "#1b4f9c",
        "o1": "#ffffff",
        "c2": "#c98019",
        "o2": "#15181d",
        "c3": "#0a7d5c",
        "o3": "#ffffff",
        "c4": "#7a1f5c",
        "o4": "#ffffff",
        "c5": "#2f93df",
        "o5": "#15181d",
        "c6": "#7440d0",
        "o6": "#ffffff",
        "c7": "#8a929c",
        "o7": "#15181d",
        "t2": "#8a5200",
        "t5": "#1a6cad",
    },
    "dark": {
        "bg": "#14171c",
        "panel": "#1d2127",
        "ink": "#eceef1",
        "soft": "#a6aeb8",
        "rule": "#3a4049",
        "grid": "#272c34",
        "good": "#52d3a6",
        "good-bg": "#12302a",
        "bad": "#ff8f85",
        "bad-bg": "#3b1d1c",
        "c1": "#3f7fdc",
        "o1": "#0f1216",
        "c2": "#d08c42",
        "o2": "#0f1216",
        "c3": "#2fe3aa",
        "o3": "#0f1216",
        "c4": "#f8c6e4",
        "o4": "#0f1216",
        "c5": "#4fc0f8",
        "o5": "#0f1216",
        "c6": "#8450ee",
        "o6": "#ffffff",
        "c7": "#79828c",
        "o7": "#0f1216",
        "t1": "#6fa3f0",
        "t6": "#a982ff",
    },
}

# text on background: contrast of at least 4.5 is asked of each in both themes
TEXT_ON: tuple[tuple[str, str], ...] = (
    *((text, ground) for text in ("ink", "soft") for ground in ("bg", "panel")),
    *((text, f"{text}-bg") for text in ("good", "bad")),
    *(("ink", f"{ground}-bg") for ground in ("good", "bad")),
    ("good", "bg"),
    ("bad", "bg"),
    *((f"o{hue}", f"c{hue}") for hue in range(1, 8)),
    *((f"t{hue}", "bg") for hue in range(1, 7)),
)


def colours(theme: str) -> dict[str, str]:
    """Every colour of a theme. t1 to t6 are for words in a hue: the hue itself unless the theme says otherwise."""
    own = THEMES[theme]
    return {**{f"t{hue}": own[f"c{hue}"] for hue in range(1, 7)}, **own}


def _variables(theme: str) -> str:
    return ";".join(f"--{name}:{value}" for name, value in colours(theme).items())


_HUES = "".join(
    f".f{hue}{{fill:var(--c{hue})}}.o{hue}{{fill:var(--o{hue})}}.s{hue}{{stroke:var(--c{hue})}}"
    f".k{hue}{{background:var(--c{hue})}}"
    for hue in range(1, 8)
) + "".join(f".t{hue}{{fill:var(--t{hue})}}" for hue in range(1, 7))

_PAGE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);overflow-wrap:break-word;
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.page{max-width:1144px;margin:0 auto;padding:28px 16px 40px}
h1,h2{line-height:1.25;margin:0;text-wrap:balance}
h1{font-size:1.6rem;letter-spacing:-.01em}
h1 span{display:inline-block;max-width:100%}
h2{font-size:1.15rem;margin-bottom:4px}
p{margin:0}
.kicker,.note,figcaption,.tag,footer,summary{color:var(--soft);font-size:.875rem}
.kicker{margin-bottom:4px}
header{margin-bottom:20px}
section{margin-top:44px;min-width:0;container:fit/inline-size}
code{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.verdict{margin:0;padding:18px 20px;border-left:6px solid;border-radius:4px}
.verdict.hidden{background:var(--good-bg);border-color:var(--good)}
.verdict.exposed{background:var(--bad-bg);border-color:var(--bad)}
.verdict .word{display:flex;align-items:center;gap:10px;font-weight:700;font-size:1.3rem;letter-spacing:.04em}
.hidden .word{color:var(--good)}
.exposed .word{color:var(--bad)}
.word svg{width:38px;height:20px;flex:none}
.sign{fill:currentColor}
.sign.faint{opacity:.55}
.verdict .sentence{margin-top:4px}
.warnings{margin:12px 0 0;padding-left:1.1em;font-size:.94rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,148px),1fr));gap:18px 24px;margin:24px 0 0}
@media (min-width:900px){
.in4{grid-template-columns:repeat(4,1fr)}
.in5{grid-template-columns:repeat(5,1fr)}
.in6{grid-template-columns:repeat(6,1fr)}
}
.tile{border-top:1px solid var(--rule);padding-top:8px;min-width:0;display:flex;flex-direction:column}
.tile dt{color:var(--soft);font-size:.875rem}
.tile dd{margin:0}
.tile .value{font-size:1.45rem;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.tile .unit{font-size:.94rem;font-weight:400;color:var(--soft)}
.tile .note{line-height:1.35}
"""

_FIGURES = """
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,376px),1fr));column-gap:40px}
figure{margin:0}
figcaption{max-width:85ch;margin:4px 0 12px}
.plot{container-type:inline-size}
.plot>div{display:none}
.plot>.v340{display:block}
@container (min-width:460px){.plot>.v340{display:none}.plot>.v480{display:block}}
@container (min-width:660px){.plot>.v480{display:none}.plot>.v700{display:block}}
@container (min-width:1000px){.wide>.v700{display:none}.wide>.v1080{display:block}}
.pair .plot svg{max-width:760px}
svg{display:block;width:100%;height:auto;font-family:inherit;overflow:visible}
svg text{font-variant-numeric:tabular-nums}
.ink,.strong{fill:var(--ink)}
.strong{font-weight:600}
.soft{fill:var(--soft)}
.halo{paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
.grid{stroke:var(--grid);fill:none}
.axis{stroke:var(--rule);fill:none}
.edge{stroke:var(--ink);fill:none}
.lead{stroke:var(--soft);stroke-width:.8;fill:none}
.band{fill:var(--bad);opacity:.13}
.stall{opacity:.3}
.fixed{fill:var(--c7)}
.slope{stroke-width:2;stroke-linejoin:round}
.open{fill:none}
.ceiling{stroke:var(--ink);stroke-width:2}
.dashed{stroke-dasharray:6 4;stroke-width:1.5}
.threshold{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:2 3}
.mark{fill:var(--c4);stroke:var(--bg);stroke-width:2}
.dots{stroke:var(--soft);stroke-width:3.6;stroke-linecap:round;opacity:.38;fill:none}
.track{fill:var(--panel);stroke:var(--rule)}
.over{fill:none;stroke:var(--bad);stroke-width:2}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;margin:0 0 10px;padding:0;font-size:.875rem}
.legend li{display:flex;align-items:center;gap:7px}
.key{display:inline-block;flex:none;width:14px;height:14px;border-radius:2px}
.key.dot{border-radius:50%;width:10px;height:10px}
.key.bar{height:3px;width:20px}
.key.band{background:var(--bad);opacity:.3}
.key.stall{background:var(--c1)}
.key.fixed{background:var(--c7)}
.key.faint{background:var(--soft);opacity:.45}
"""

_TABLES = """
table{border-collapse:collapse;width:100%;table-layout:fixed;font-size:.9rem;
 line-height:1.4;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding-bottom:6px}
th,td{text-align:left;vertical-align:top;overflow-wrap:anywhere;
 padding:6px 16px 6px 0;border-bottom:1px solid var(--grid)}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--soft);font-weight:500;border-bottom-color:var(--rule);vertical-align:bottom}
tbody th{font-weight:600}
table:not(.stack) tbody th{font-weight:400}
.n,table:not(.stack) td{text-align:right}
.label{display:none}
.chosen th::after{content:" (chosen)";font-weight:400;color:var(--soft)}
.keyed{display:flex;align-items:baseline;gap:8px}
.keyed .key{transform:translateY(2px)}
.tag{white-space:nowrap}
.tag::before{content:"";display:inline-block;width:8px;height:8px;margin-right:7px;border-radius:50%;
 border:1.5px solid var(--soft)}
.tag.measured::before{background:var(--good);border-color:var(--good)}
.tag.vendor::before,.tag.derived::before{background:var(--c1);border-color:var(--c1)}
.tag.derived::before{background:none}
.tag.assumed::before{border-color:var(--bad)}
details{margin-top:14px}
summary{cursor:pointer;padding:4px 0}
summary:focus-visible{outline:2px solid var(--c1);outline-offset:2px}
.list{margin:6px 0 0;padding-left:1.2em;max-width:85ch}
.list li{margin:4px 0}
footer{margin-top:52px;padding-top:14px;border-top:1px solid var(--rule)}
footer code{color:var(--ink);overflow-wrap:anywhere}
footer code span{display:inline-block;max-width:100%}
@container fit (max-width:620px){
.stack colgroup{display:none}
.stack caption{display:block;padding-bottom:0}
.stack thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.stack,.stack tbody,.stack tr,.stack th,.stack td{display:block;width:auto}
.stack tr{border-bottom:1px solid var(--rule);padding:10px 0}
.stack th,.stack td{border:0;padding:1px 0;text-align:left}
.label{display:inline;color:var(--soft)}
th,td{padding-right:8px}
table:not(.stack){font-size:.84rem}
}
"""

_PRINT = """
@page{margin:14mm}
@media print{
body{font-size:11pt}
.page{max-width:none;padding:0}
section{margin-top:26px}
.pair{grid-template-columns:1fr 1fr;column-gap:24px}
section,.tile,figure,tr,.verdict{break-inside:avoid}
section.long{break-inside:auto}
h2{break-after:avoid}
.verdict,svg,.key,.tag::before{-webkit-print-color-adjust:exact;print-color-adjust:exact}
}
"""


def css() -> str:
    """The whole style sheet. Print is always light."""
    light, dark = _variables("light"), _variables("dark")
    themes = f":root{{color-scheme:light dark;{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    rules = "".join((_PAGE, _FIGURES, _TABLES, _PRINT)).splitlines()
    return themes + _HUES + "".join(line.strip() for line in rules)
