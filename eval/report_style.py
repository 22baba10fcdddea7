"""The look of the report: one style sheet, light and dark, from a phone to a wide screen."""

CSS = """
:root{--ink:#1d2129;--soft:#5d6675;--line:#dfe3e8;--page:#fff;--panel:#f6f7f9;--good:#1a7f4b;--bad:#c0322b;
--c1:#2563b8;--c2:#c2571a;--c3:#1a7f4b;--c4:#8a3fb0;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ec;--soft:#9aa3b2;--line:#343a44;--page:#15181d;--panel:#1d2128;
--good:#57c98c;--bad:#ff7a70;--c1:#7db0f5;--c2:#f0a36b;--c3:#57c98c;--c4:#cf9bea}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:2.75rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p{margin:.25rem 0 .75rem;max-width:72ch}
.soft,.note{color:var(--soft)}.note{font-weight:400;font-size:.8125rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.75rem;margin:1.25rem 0}
.tile{background:var(--panel);border-radius:8px;padding:.75rem .9rem}
.tile b{display:block;white-space:nowrap;font-size:1.55rem;line-height:1.2;
font-weight:650;font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:.8125rem;color:var(--soft);line-height:1.35}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.5rem 0}
th,td{padding:.4rem .9rem .4rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;font-size:.875rem}td.num,th.num{text-align:right}td.num{white-space:nowrap}td:last-child,th:last-child{padding-right:0}
.figures td,.figures th{width:20%}.figures th:first-child{width:40%}
tr.bound td,tr.bound th{color:var(--soft);font-weight:400}
.wide{width:100%}
.checks td:first-child{width:1.4rem}.checks td,.checks th{padding-right:1.5rem}
.complaints{margin:.5rem 0 1.25rem;padding-left:1.2rem;max-width:88ch}
.charts{align-items:start;display:grid;
grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1.25rem 1.5rem}
figure{margin:0}figcaption{font-size:.875rem;font-weight:600;margin-bottom:.25rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
.rule{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}polyline.raw{stroke-width:1;opacity:.3}
.c1{stroke:var(--c1);--key:var(--c1)}.c2{stroke:var(--c2);--key:var(--c2)}
.c3{stroke:var(--c3);--key:var(--c3)}.c4{stroke:var(--c4);--key:var(--c4)}.dot{fill:var(--key)}
.legend{float:right;font-weight:400;font-size:.8125rem}.key{margin-left:.75rem;white-space:nowrap}
.key::before{content:"";display:inline-block;width:.9em;height:3px;background:var(--key);margin-right:.35em;
vertical-align:middle}
img{image-rendering:pixelated;display:block;border-radius:3px;background:var(--panel)}
img.photo{image-rendering:auto}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(158px,1fr));gap:1rem .9rem;margin:.75rem 0}
.card{font-size:.8125rem;line-height:1.35}
.pair{display:flex;gap:6px;align-items:flex-end;margin-bottom:.35rem}
.pair img:first-child{width:96px;height:96px}.pair img+img{width:48px;height:48px}
.card p{margin:0 0 .15rem}
.right{color:var(--good)}.wrong{color:var(--bad);font-weight:600}
.time td,.time th{padding:.2rem .35rem .2rem 0;border:0;vertical-align:middle}
.time th{font-weight:400;color:var(--soft);font-size:.8125rem}
.time th.prompt{color:var(--ink);min-width:8.5rem;max-width:13rem;padding-right:.75rem}
.time img{width:72px;height:72px}
.pairs{display:flex;flex-wrap:wrap;gap:.6rem}.pairs img{width:72px;height:72px}.pairs img+img{margin-top:3px}
.sheet{max-width:100%;width:544px;height:auto}
details{margin:.5rem 0}summary{cursor:pointer;font-weight:600}
pre{background:var(--panel);padding:.9rem 1rem;border-radius:8px;overflow-x:auto;font-size:.8125rem;line-height:1.45}
code{font-size:.9em;overflow-wrap:anywhere}
@media (max-width:520px){main{padding:1.25rem 1rem 3rem}h1{font-size:1.5rem}.tile b{font-size:1.3rem}
.tiles{grid-template-columns:1fr 1fr}.cards{grid-template-columns:1fr 1fr}.time img{width:56px;height:56px}
th,td,.checks td,.checks th{padding-right:.6rem}}
@media print{.charts,.cards{break-inside:avoid}main{max-width:none}}
"""
